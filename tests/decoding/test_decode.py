"""Decoding is lossless: the same ids when greedy, the same distribution when sampled."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from compressor import resources
from compressor.decoding import cached
from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Decoded, Limits, decode, first_difference, margin
from compressor.decoding.measure import _acceptance
from compressor.decoding.proposals import Chain, Committed, ModelDraft, PromptLookup, Tree
from compressor.errors import ModelError, UsageError
from compressor.model.load import load_model, load_tokenizer
from compressor.numerics.speculative import Sampling, acceptance_length, warp
from tests.model.conftest import build

TIE = 1e-3  # a smaller difference of two logits may be decided by the order of additions
TEXTS = (
    "def read(path):\n    with open(path) as file:\n        return",
    "The history of the city begins in the twelfth century, when",
    "To be,",
)


@cache
def tiny() -> Any:
    return load_model(resources.builtin_model("tiny"), "cpu", torch.float32)


@cache
def shallow() -> Any:
    """The same without its last two blocks: a poor draft that is right now and then."""
    model = load_model(resources.builtin_model("tiny"), "cpu", torch.float32)
    model.model.layers = model.model.layers[:2]
    return model


@cache
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resources.builtin_model("tiny"))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@cache
def plain() -> Decoded:
    return decode(CachedModel(tiny()), prompts(), Limits(40))


def assert_same(found: Decoded) -> None:
    for prompt, mine, theirs in zip(prompts(), found.tokens, plain().tokens, strict=True):
        place = first_difference(mine, theirs)
        if place is not None:
            assert margin(CachedModel(tiny()), [*prompt, *mine[:place]]) < TIE
        else:
            assert len(mine) == len(theirs)


def test_plain_decoding_is_that_of_transformers() -> None:
    for prompt, mine in zip(prompts(), plain().tokens, strict=True):
        ids = torch.tensor([prompt])
        theirs = tiny().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert list(mine) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", [Chain(1), Chain(5), Tree(4, 3, 10), Tree(3, 1, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_ids_do_not_depend_on_the_draft(shape: Any, rows: int) -> None:
    found = [
        decode(
            CachedModel(tiny()),
            prompts()[start : start + rows],
            Limits(40),
            draft=ModelDraft(CachedModel(shallow())),
            shape=shape,
        )
        for start in range(0, 3, rows)
    ]
    whole = Decoded(
        tuple(tokens for part in found for tokens in part.tokens),
        tuple(blocks for part in found for blocks in part.blocks),
        found[0].timing,
    )
    assert_same(whole)
    blocks = [block for row in whole.blocks for block in row]
    assert any(block.accepted for block in blocks)
    assert any(block.accepted < block.proposed for block in blocks)


@pytest.mark.parametrize("gaps", [-1000, 1000], ids=["always", "never"])
@pytest.mark.parametrize("shape", [Chain(5), Tree(4, 3, 10)], ids=str)
def test_gaps_in_the_cache_change_nothing(
    shape: Any, gaps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that commit different numbers of tokens, closed up after every pass or never."""
    monkeypatch.setattr(cached, "_GAPS", gaps)
    target = CachedModel(tiny())
    draft = ModelDraft(CachedModel(shallow()))
    assert_same(decode(target, prompts(), Limits(40), draft=draft, shape=shape))
    width, longest = target.cache.get_seq_length(), int(target.lengths.max())
    assert width == longest if gaps < 0 else width > longest


def test_a_tree_accepts_more_than_a_chain_of_its_depth() -> None:
    accepted = {}
    for shape in (Chain(4), Tree(4, 4, 24)):
        found = decode(
            CachedModel(tiny()), prompts(), Limits(60), draft=ModelDraft(CachedModel(shallow())),
            shape=shape,
        )  # fmt: skip
        blocks = [block for row in found.blocks for block in row]
        accepted[type(shape)] = sum(block.emitted for block in blocks) / len(blocks)
    assert accepted[Tree] > accepted[Chain] + 0.1


def test_prompt_lookup_copies_and_stays_lossless() -> None:
    found = decode(CachedModel(tiny()), prompts(), Limits(40), draft=PromptLookup(), shape=Chain(4))
    assert_same(found)
    lookup = PromptLookup()
    lookup.start(1)
    lookup.observe(Committed(((5, 6, 7, 8, 5),), None, (6,)))
    assert lookup.propose(Chain(3), Sampling(), None).tokens == ((7, 8, 5),)
    lookup.observe(Committed(((6, 7),), None, (9,)))
    assert lookup.propose(Chain(3), Sampling(), None).tokens == ((),)


def test_the_target_as_its_own_draft_is_always_right() -> None:
    for sampling in (Sampling(), Sampling(1.0)):
        found = decode(
            CachedModel(tiny()), prompts(), Limits(21), draft=ModelDraft(CachedModel(tiny())),
            shape=Chain(4), sampling=sampling,
        )  # fmt: skip
        assert {block.emitted for row in found.blocks for block in row} == {5}
        assert all(len(row) == 4 for row in found.blocks)


def test_a_row_ends_at_a_stop_token_within_a_block() -> None:
    stop = plain().tokens[1][6]
    first = plain().tokens[1].index(stop)
    found = decode(
        CachedModel(tiny()), prompts(), Limits(40, frozenset({stop})),
        draft=ModelDraft(CachedModel(tiny())), shape=Chain(5),
    )  # fmt: skip
    assert found.tokens[1] == plain().tokens[1][: first + 1]
    for mine, theirs in zip(found.tokens, plain().tokens, strict=True):
        assert stop not in mine[:-1]
        assert mine == theirs[: len(mine)]


def test_decoding_ends_where_the_context_does() -> None:
    model = build("llama")  # 64 positions
    prompt = list(range(3, 60))
    for draft in (None, ModelDraft(CachedModel(model))):
        found = decode(CachedModel(model), [prompt], Limits(40), draft=draft, shape=Chain(4))
        assert len(found.tokens[0]) == 64 - 57 + 1  # the last one has no place to be read
    with pytest.raises(UsageError, match="prompt 0 has 64 tokens"):
        decode(CachedModel(model), [list(range(64))], Limits(1))
    with pytest.raises(UsageError, match="prompt 0 has 0 tokens"):
        decode(CachedModel(model), [[]], Limits(1))


@pytest.mark.parametrize("variant", ["qwen2", "olmo2", "gpt2", "opt", "mixtral", "granite"])
def test_a_tree_in_the_cache_gives_the_logits_of_each_path(variant: str) -> None:
    """One pass with a tree mask equals a pass over every path by itself; then a path is kept."""
    model = build(variant)
    cached = CachedModel(model)
    cached.start(1)
    prompt, tokens = [5, 9, 11], [20, 21, 22, 23]
    cached.forward(torch.tensor([prompt]))
    cached.commit([range(3)])
    visible = torch.tensor(
        [[[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool
    )
    found = cached.forward(torch.tensor([tokens]), visible=visible, depth=visible.sum(-1) - 1)
    for node in range(4):
        path = [tokens[i] for i in range(4) if visible[0, node, i]]
        torch.testing.assert_close(
            found.logits[0, node], alone(model, [*prompt, *path]), rtol=1e-4, atol=1e-4
        )
    cached.commit([[0, 2]])
    after = cached.forward(torch.tensor([[30]])).logits[0, -1]
    torch.testing.assert_close(after, alone(model, [*prompt, 20, 22, 30]), rtol=1e-4, atol=1e-4)


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def test_rows_of_different_lengths_do_not_see_each_other() -> None:
    model = build("llama")
    cached = CachedModel(model, layers=(0, 1))
    cached.start(2)
    cached.forward(torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]))
    cached.commit([range(4), range(2)])
    cached.forward(torch.tensor([[10, 11], [12, 13]]))
    cached.commit([[], [0, 1]])
    found = cached.forward(torch.tensor([[14], [15]]))
    for row, ids in enumerate([[4, 5, 6, 7, 14], [8, 9, 12, 13, 15]]):
        torch.testing.assert_close(found.logits[row, 0], alone(model, ids), rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        wanted = torch.cat([states[0][0, -1], states[1][0, -1]])
        assert found.features is not None
        torch.testing.assert_close(found.features[row, 0], wanted, rtol=1e-4, atol=1e-5)
    cached.commit([[0], []])
    cached.select([1])
    again = cached.forward(torch.tensor([[16]])).logits[0, 0]
    torch.testing.assert_close(again, alone(model, [8, 9, 12, 13, 16]), rtol=1e-4, atol=1e-5)


def test_features_of_the_last_layer_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        CachedModel(build("llama"), layers=(2,))


@pytest.mark.parametrize("shape", [Chain(2), Tree(2, 2, 4)], ids=str)
def test_sampled_text_follows_the_target(shape: Any) -> None:
    """Three tokens of 3,000 samples against the exact joint distribution."""
    target, draft = build("llama", vocab_size=6), build("qwen2", vocab_size=6)
    for model in (target, draft):
        model.lm_head.weight.data *= 1.5
    sampling, prompt, draws = Sampling(0.8, top_p=0.95), [1, 2, 3], 3000
    wanted: dict[tuple[int, ...], float] = {(): float(draws)}
    for _ in range(3):
        wanted = {
            (*path, token): weight * chance
            for path, weight in wanted.items()
            for token, chance in enumerate(warp(alone(target, [*prompt, *path]), sampling).tolist())
            if chance
        }
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(draws // 500):
        found = decode(
            CachedModel(target), [prompt] * 500, Limits(3),
            draft=ModelDraft(CachedModel(draft)), shape=shape, sampling=sampling, seed=seed,
        )  # fmt: skip
        counts.update(found.tokens)
        accepted += sum(block.accepted for row in found.blocks for block in row)
    assert draws / 10 < accepted < 2 * draws
    assert set(counts) <= set(wanted)
    large = [path for path, expected in wanted.items() if expected >= 5]
    seen, expected = [counts[path] for path in large], [wanted[path] for path in large]
    assert len(large) > 20
    seen.append(draws - sum(seen))
    expected.append(draws - sum(expected))
    assert expected[-1] >= 5
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_acceptance_counts_blocks_without_a_proposal() -> None:
    found = _acceptance([(2, 2), (0, 0), (2, 0)], 2)
    assert found.by_position == (0.5, 0.5)
    assert found.length == 1 + 2 / 3
    whole = _acceptance([(2, 2), (2, 1), (2, 0)], 2)
    assert whole.length == pytest.approx(acceptance_length(whole.by_position))
