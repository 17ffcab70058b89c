"""The whole evaluation: base, variant, comparison, and numbers that can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compressor import resources
from compressor.errors import UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.measure import BaseCache, TokenScores
from compressor.evaluation.protocols import tokenize
from compressor.evaluation.results import Estimate, Evaluation
from compressor.evaluation.run import Settings, evaluate, evaluate_base
from compressor.evaluation.scoring import TransformersScorer
from compressor.evaluation.suites import load_text
from compressor.evaluation.summary import Summary, compare
from tests.evaluation.conftest import VOCAB, sample_text, tiny_llama

Measured = tuple[Evaluation, BaseCache, Evaluation, Path]


@pytest.fixture(scope="module")
def settings(tokenizer: PreTrainedTokenizerFast) -> Settings:
    return Settings(
        tokenize(sample_text(), tokenizer),
        lambda: tokenizer,
        batch=4,
        resamples=300,
        in_calibration={"prose": True, "code": False},
    )


@pytest.fixture(scope="module")
def measured(
    settings: Settings,
    base: TransformersScorer,
    variant: TransformersScorer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Measured:
    folder = tmp_path_factory.mktemp("run")
    base_row, cache = evaluate_base(base, settings, folder, "hash", save=folder / "base.npz")
    row = evaluate(variant, settings, cache, base, variant="v", save=folder / "v.npz")
    return base_row, cache, row, folder


def inside(estimate: Estimate) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= estimate.value <= estimate.high


def test_an_evaluation_is_complete(measured: Measured) -> None:
    base_row, _, row, _ = measured
    assert base_row.worst is None
    assert base_row.overall.divergence is None
    assert base_row.noise_floor is not None
    assert abs(base_row.noise_floor.mean.value) < 1e-6
    assert row.overall.divergence is not None
    assert row.overall.divergence.mean.value > 100 * abs(base_row.noise_floor.mean.value)
    assert row.overall.delta_bits_per_byte is not None
    for estimate in (
        row.overall.perplexity,
        row.overall.bits_per_byte,
        row.overall.delta_bits_per_byte,
        row.overall.divergence.mean,
        row.overall.divergence.top1_agreement,
    ):
        assert inside(estimate)
    assert row.domains["prose"].in_calibration is True
    assert row.domains["code"].in_calibration is False
    assert Evaluation.model_validate_json(row.model_dump_json()) == row


def test_domains_weigh_the_same(measured: Measured) -> None:
    _, _, row, _ = measured
    parts = list(row.domains.values())
    assert row.overall.bits_per_byte.value == pytest.approx(
        np.mean([part.bits_per_byte.value for part in parts])
    )
    assert row.overall.perplexity.value == pytest.approx(
        np.exp(np.mean([np.log(part.perplexity.value) for part in parts]))
    )
    assert row.overall.tokens == sum(part.tokens for part in parts)


def test_differences_are_differences(measured: Measured) -> None:
    base_row, _, row, _ = measured
    for name, score in row.domains.items():
        before = base_row.domains[name]
        assert score.delta_bits_per_byte is not None
        assert score.delta_perplexity_ratio is not None
        assert score.delta_bits_per_byte.value == pytest.approx(
            score.bits_per_byte.value - before.bits_per_byte.value, abs=1e-9
        )
        assert score.delta_perplexity_ratio.value == pytest.approx(
            score.perplexity.value / before.perplexity.value
        )


def test_pairing_narrows_the_interval(measured: Measured) -> None:
    _, _, row, _ = measured
    plain, paired = row.overall.bits_per_byte, row.overall.delta_bits_per_byte
    assert paired is not None
    widths = [e.high - e.low for e in (plain, paired)]  # type: ignore[operator]
    assert widths[1] < widths[0]


def test_perplexities_of_few_documents_stay_positive(measured: Measured) -> None:
    """Documents that differ much leave a wide interval in nats, and so no end below zero."""
    scores = TokenScores.load(measured[-1] / "v.npz")
    half = scores.cluster % 2
    two = replace(scores, cluster=half, nll=np.float32(0.5) + 3 * half.astype(np.float32))
    for score in Summary(two).domains().values():
        assert score.delta_perplexity_ratio is not None
        for estimate in (score.perplexity, score.delta_perplexity_ratio):
            assert inside(estimate)
            assert estimate.low is not None
            assert estimate.low > 0


def test_quantiles_and_worst_tokens_come_from_the_scores(
    measured: Measured, settings: Settings
) -> None:
    _, _, row, folder = measured
    scores = TokenScores.load(folder / "v.npz")
    divergence = row.overall.divergence
    assert divergence is not None
    assert divergence.p99 == pytest.approx(np.quantile(scores.kl, 0.99))
    assert divergence.flips == int((scores.top1 != scores.base_top1).sum())
    for value, share in divergence.ccdf[1:-1:7]:
        assert np.mean(scores.kl > value) == pytest.approx(share, abs=2 / len(scores.kl))
    assert len(row.worst_tokens) == 10
    assert row.worst_tokens[0].kl == pytest.approx(float(scores.kl.max()))
    worst = row.worst_tokens[0]
    (document,) = [d for d in sample_text().domains[worst.domain] if d.id == worst.document]
    assert worst.context.removeprefix("<s>").rstrip("\ufffd") in document.text
    assert len(worst.context) <= 120
    counts = np.bincount(np.log2(scores.position).astype(int))
    assert sum(
        k * n for (_, k), n in zip(row.kl_by_position, counts, strict=True)
    ) / counts.sum() == pytest.approx(scores.kl.mean(), rel=1e-5)


def test_uniform_model_has_known_bits_per_byte(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """All-zero weights give log2(vocabulary) bits per token, and a token here is a byte."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "zero")
    text = tokenize(sample_text(), tokenizer)
    settings = Settings(text, lambda: tokenizer, noise_floor=False)
    row, _ = evaluate_base(TransformersScorer(tmp_path / "zero"), settings, tmp_path, "zero")
    assert row.overall.bits_per_byte.value == pytest.approx(math.log2(VOCAB), rel=1e-6)
    assert row.overall.perplexity.value == pytest.approx(VOCAB, rel=1e-6)
    assert row.overall.bytes == row.overall.tokens
    assert row.noise_floor is None


def test_bits_count_bytes_and_perplexity_counts_tokens(measured: Measured) -> None:
    scores = TokenScores.load(measured[3] / "v.npz")
    longer = Summary(replace(scores, sizes=3 * scores.sizes), 300).overall()
    same = Summary(scores, 300).overall()
    assert longer.bytes == 3 * same.bytes
    assert longer.perplexity == same.perplexity
    assert longer.bits_per_byte.value == pytest.approx(same.bits_per_byte.value / 3)
    assert longer.delta_bits_per_byte is not None
    assert same.delta_bits_per_byte is not None
    assert longer.delta_bits_per_byte.value == pytest.approx(same.delta_bits_per_byte.value / 3)


def test_self_comparison_stays_under_the_noise_floor(
    measured: Measured, settings: Settings, base: TransformersScorer
) -> None:
    base_row, cache, _, _ = measured
    again = evaluate(base, settings, cache, base, variant="again")
    assert again.overall.divergence is not None
    assert base_row.noise_floor is not None
    assert again.overall.divergence.flips == 0
    assert again.overall.divergence.maximum <= abs(base_row.noise_floor.maximum)
    assert again.overall.delta_bits_per_byte == Estimate(value=0, low=0, high=0)


def test_compare_is_antisymmetric_and_matches_the_base_difference(measured: Measured) -> None:
    _, _, row, folder = measured
    a, b = (TokenScores.load(folder / f"{name}.npz") for name in ("base", "v"))
    there, back = compare(a, b, 300), compare(b, a, 300)
    assert there.overall.delta_bits_per_byte == row.overall.delta_bits_per_byte
    assert there.overall.delta_bits_per_byte.value == -back.overall.delta_bits_per_byte.value
    assert there.overall.flips == back.overall.flips == row.overall.divergence.flips  # type: ignore[union-attr]
    assert there.overall.delta_kl is not None
    assert row.overall.divergence is not None
    assert there.overall.delta_kl.value == pytest.approx(row.overall.divergence.mean.value)
    assert compare(b, b, 300).overall.delta_kl == Estimate(value=0, low=0, high=0)
    assert compare(a, a, 300).overall.delta_kl is None


def test_compare_refuses_another_protocol(measured: Measured) -> None:
    a = TokenScores.load(measured[3] / "v.npz")
    b = replace(a, protocol=a.protocol.model_copy(update={"backend": "torch 1.0 cpu"}))
    with pytest.raises(UsageError, match="backend"):
        compare(a, b)


def test_the_builtin_model_on_shipped_text(tmp_path: Path) -> None:
    path = resources.builtin_model("tiny")
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = EvaluateConfig(documents=4)
    text = tokenize(load_text(config), tokenizer)
    row, _ = evaluate_base(
        TransformersScorer(path), Settings(text, lambda: tokenizer), tmp_path, "tiny"
    )
    assert 0.3 < row.overall.bits_per_byte.value < 4.0
    assert row.noise_floor is not None
    assert row.noise_floor.maximum < 1e-3
    assert row.noise_floor.top1_agreement.value > 0.998
    for domain, score in row.domains.items():
        size = sum(len(d.text.encode()) for d in load_text(config).domains[domain])
        assert score.bytes == size > score.tokens
        bits = math.log2(score.perplexity.value) * score.tokens
        assert score.bits_per_byte.value == pytest.approx(bits / size)
