"""Exact divergences from cached states, against full float64 logits; pairing; crash safety."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compressor.errors import UsageError
from compressor.evaluation import measure
from compressor.evaluation.divergence import diverge
from compressor.evaluation.measure import (
    BaseCache,
    TokenScores,
    fill,
    protocol_of,
    require_same,
    score_base,
    score_variant,
)
from compressor.evaluation.protocols import TokenizedText, tokenize
from compressor.evaluation.scoring import TransformersScorer
from tests.evaluation.conftest import sample_text, tiny_llama


@pytest.fixture
def cache(base: TransformersScorer, windows: TokenizedText, tmp_path: Path) -> BaseCache:
    cache = BaseCache.at(tmp_path, windows, protocol_of(windows, base, 4), "model")
    fill(cache, base, windows)
    return cache


def brute_force(
    base_path: Path, variant_path: Path, windows: TokenizedText
) -> dict[str, np.ndarray]:
    """Every column from full logits in float64, one window at a time."""
    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64)
        for p in (base_path, variant_path)
    ]
    columns: dict[str, list[torch.Tensor]] = {
        k: [] for k in ("kl", "reverse_kl", "nll", "base_nll", "top1", "base_top1")
    }
    for window in windows.windows:
        ids = torch.from_numpy(window.tokens)
        with torch.no_grad():
            p, q = (m(ids[None]).logits[0, window.first - 1 : -1].log_softmax(-1) for m in models)
        target = ids[window.first :, None]
        columns["kl"].append((p.exp() * (p - q)).sum(-1))
        columns["reverse_kl"].append((q.exp() * (q - p)).sum(-1))
        columns["nll"].append(-q.gather(-1, target)[:, 0])
        columns["base_nll"].append(-p.gather(-1, target)[:, 0])
        columns["top1"].append(q.argmax(-1))
        columns["base_top1"].append(p.argmax(-1))
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()}


@pytest.mark.parametrize("protocol", ["rolling", "gptq", "llama.cpp"])
def test_columns_equal_full_logits(
    protocol: str,
    base: TransformersScorer,
    variant: TransformersScorer,
    base_path: Path,
    variant_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "rows_per_chunk", lambda *_: 7)  # chunks that divide nothing
    windows = tokenize(sample_text(protocol), tokenizer)
    cache = BaseCache.at(tmp_path, windows, protocol_of(windows, base, 4), "model")
    fill(cache, base, windows)
    head = TransformersScorer(base_path)
    scores = score_variant(variant, windows, cache, head, "v")
    expected = brute_force(base_path, variant_path, windows)
    assert expected["kl"].mean() > 1e-3  # the two models do differ
    for name in ("kl", "reverse_kl"):
        np.testing.assert_allclose(getattr(scores, name), expected[name], atol=1e-5)
        assert abs(getattr(scores, name).mean(dtype=float) - expected[name].mean()) < 1e-6
    for name in ("nll", "base_nll"):
        np.testing.assert_allclose(getattr(scores, name), expected[name], atol=2e-5)
    for name in ("top1", "base_top1"):
        assert (getattr(scores, name) == expected[name]).mean() > 0.999
    alone = score_base(cache, head, windows, "base")
    np.testing.assert_array_equal(alone.nll, scores.base_nll)
    np.testing.assert_array_equal(alone.top1, scores.base_top1)


def test_batch_size_does_not_matter(
    base: TransformersScorer,
    variant: TransformersScorer,
    windows: TokenizedText,
    cache: BaseCache,
) -> None:
    one = score_variant(variant, windows, cache, base, "v", batch=1)
    four = score_variant(variant, windows, cache, base, "v", batch=4)
    assert len({len(w.tokens) for w in windows.windows}) > 2  # ragged
    np.testing.assert_allclose(one.kl, four.kl, atol=1e-5)
    np.testing.assert_allclose(one.nll, four.nll, atol=1e-5)


def test_self_comparison_is_zero(
    base: TransformersScorer, windows: TokenizedText, cache: BaseCache
) -> None:
    scores = score_variant(base, windows, cache, base, "again")
    assert (scores.kl == 0).all()
    assert (scores.reverse_kl == 0).all()
    assert (scores.top1 == scores.base_top1).all()
    other_batch = score_variant(base, windows, cache, base, "again", batch=3)
    assert abs(other_batch.kl).max() < 2e-6
    assert (other_batch.top1 == other_batch.base_top1).mean() > 0.999


def test_masked_logits_do_not_poison_the_divergence() -> None:
    """A family may set logits of unused ids to -inf."""
    logits = torch.randn(3, 9)
    logits[:, 7:] = -torch.inf
    result = diverge(logits.clone(), logits.clone() * 0.9, torch.tensor([0, 1, 2]))
    short = diverge(logits[:, :7].clone(), logits[:, :7] * 0.9, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(result.kl, short.kl)
    torch.testing.assert_close(result.reverse_kl, short.reverse_kl)
    assert (result.kl > 0).all()


def test_low_precision_logits_are_compared_in_float32() -> None:
    logits = torch.randn(5, 300)
    low = logits.bfloat16()
    result = diverge(low, low + 0.5, torch.zeros(5, dtype=torch.int64))
    assert result.kl.dtype == torch.float32
    exact = diverge(low.float(), (low + 0.5).float(), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(result.kl, exact.kl)


MUTATIONS = {
    "backend": "torch 1.0 abacus",
    "dtype": "bfloat16",
    "batch": 5,
    "text_sha256": "0",
    "tokenizer_sha256": "0",
    "length": 7,
    "bos": "none",
    "id": "gptq",
    "documents_limit": 3,
}


@pytest.mark.parametrize("field", MUTATIONS)
def test_a_differing_protocol_is_refused(
    field: str, base: TransformersScorer, windows: TokenizedText
) -> None:
    protocol = protocol_of(windows, base, 4)
    require_same(protocol, protocol)
    changed = protocol.model_copy(update={field: MUTATIONS[field]})
    with pytest.raises(UsageError, match=f"differ in {field} ") as caught:
        require_same(protocol, changed)
    assert repr(MUTATIONS[field]) in str(caught.value)


def test_a_variant_in_another_precision_is_refused(
    base: TransformersScorer, base_path: Path, windows: TokenizedText, cache: BaseCache
) -> None:
    low = TransformersScorer(base_path, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="dtype"):
        score_variant(low, windows, cache, base, "low")


def test_another_vocabulary_is_refused(
    base: TransformersScorer, windows: TokenizedText, cache: BaseCache, tmp_path: Path
) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "other")
    other = TransformersScorer(tmp_path / "other")
    with pytest.raises(UsageError, match="other has 300 logits and the base 258"):
        score_variant(other, windows, cache, base, "other")


def test_an_interrupted_base_goes_on_where_it_stopped(
    base: TransformersScorer, windows: TokenizedText, cache: BaseCache
) -> None:
    shards = sorted(cache.folder.iterdir())
    before = {path: path.read_bytes() for path in shards}
    assert len(shards) > 2
    shards[1].unlink()
    written = []
    write = BaseCache.write

    class Watched(BaseCache):
        def write(self, number: int, states: torch.Tensor) -> None:
            written.append(number)
            write(self, number, states)

    again = Watched(cache.folder, windows, cache.protocol)
    fill(again, base, windows)
    assert written == [1]
    assert {path: path.read_bytes() for path in sorted(cache.folder.iterdir())} == before


def test_cache_is_keyed_by_protocol_and_model(
    base: TransformersScorer, windows: TokenizedText, tmp_path: Path
) -> None:
    protocol = protocol_of(windows, base, 4)
    folders = {
        BaseCache.at(tmp_path, windows, protocol, "a").folder,
        BaseCache.at(tmp_path, windows, protocol, "b").folder,
        BaseCache.at(tmp_path, windows, protocol_of(windows, base, 2), "a").folder,
    }
    assert len(folders) == 3
    assert BaseCache.at(tmp_path, windows, protocol, "a").folder in folders


def test_scores_survive_the_disk(
    base: TransformersScorer,
    variant: TransformersScorer,
    windows: TokenizedText,
    cache: BaseCache,
    tmp_path: Path,
) -> None:
    scores = score_variant(variant, windows, cache, base, "v")
    path = tmp_path / "scores" / "v.npz"
    scores.save(path)
    first = path.read_bytes()
    scores.save(path)
    assert path.read_bytes() == first
    loaded = TokenScores.load(path)
    assert (loaded.variant, loaded.protocol, loaded.domains) == (
        "v",
        scores.protocol,
        ("prose", "code"),
    )
    np.testing.assert_array_equal(loaded.kl, scores.kl)
    (tmp_path / "no.npz").write_bytes(b"nothing")
    for name in ("no.npz", "absent.npz"):
        with pytest.raises(UsageError, match=name):
            TokenScores.load(tmp_path / name)
