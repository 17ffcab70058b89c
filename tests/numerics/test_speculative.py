"""Acceptance against enumeration, closed forms and, for the sampler, the χ² distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import speculative
from compressor.numerics.speculative import (
    ROOT,
    Sampling,
    accept_chain,
    acceptance_length,
    accepted_by_position,
    best_drafted,
    expected_length,
    follow_tree,
    overlap,
    residual,
    sample,
    speedup,
    warp,
)

SAMPLINGS = [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, None, 0.6)]


def distributions(rows: int, vocab: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).softmax(-1)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """p-value; cells that expect fewer than five are pooled."""
    large = expected >= 5
    seen = [*counts[large].tolist(), float(counts[~large].sum())]
    wanted = [*expected[large].tolist(), float(expected[~large].sum())]
    if wanted[-1] < 5:
        seen[-2:] = [sum(seen[-2:])]
        wanted[-2:] = [sum(wanted[-2:])]
    return float(stats.chisquare(seen, wanted).pvalue)


def first_tokens(draws: int) -> tuple[Tensor, float, Tensor, Tensor]:
    """Counts of the first token emitted, the accepted share, p and q."""
    target, draft = distributions(2, 20, 0), distributions(1, 20, 1)
    generator = torch.Generator().manual_seed(2)
    counts, accepted = torch.zeros(20), 0
    for _ in range(draws):
        tokens = sample(draft, generator)
        kept, token = accept_chain(target, draft, tokens, generator)
        counts[int(tokens[0]) if kept else token] += 1
        accepted += kept
    return counts, accepted / draws, target[0], draft[0]


def test_emitted_tokens_follow_the_target() -> None:
    draws = 8_000
    counts, accepted, target, draft = first_tokens(draws)
    assert chi_square(counts.double(), target * draws) > 1e-3
    wanted = float(overlap(target, draft))
    assert abs(accepted - wanted) < 4 * (wanted * (1 - wanted) / draws) ** 0.5


def test_the_test_of_the_sampler_rejects_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "residual", lambda target, draft: target)
    draws = 8_000
    counts, _, target, _ = first_tokens(draws)
    assert chi_square(counts.double(), target * draws) < 1e-12


def test_two_tokens_follow_the_joint_distribution() -> None:
    vocab, draws = 3, 8_000
    first, after = distributions(1, vocab, 3)[0], distributions(vocab, vocab, 4)
    own, own_after = distributions(1, vocab, 5)[0], distributions(vocab, vocab, 6)
    generator = torch.Generator().manual_seed(7)
    counts = torch.zeros(vocab, vocab)
    for _ in range(draws):
        a = int(sample(own, generator))
        b = int(sample(own_after[a], generator))
        target = torch.stack([first, after[a], after[b]])
        draft = torch.stack([own, own_after[a]])
        kept, token = accept_chain(target, draft, torch.tensor([a, b]), generator)
        out = [*[a, b][:kept], token]
        if len(out) == 1:
            out.append(int(sample(after[out[0]], generator)))
        counts[out[0], out[1]] += 1
    wanted = first[:, None] * after * draws
    assert chi_square(counts.double().flatten(), wanted.flatten()) > 1e-3


def test_a_tree_emits_the_joint_distribution() -> None:
    vocab, draws = 3, 8_000
    first, after = distributions(1, vocab, 8)[0], distributions(vocab, vocab, 9)
    tokens, parents = [0, 1, 2, 0], [ROOT, ROOT, 0, 0]  # 0, 1, 0 2, 0 0
    target = torch.stack([first, *(after[token] for token in tokens)])
    generator = torch.Generator().manual_seed(10)
    counts = torch.zeros(vocab, vocab)
    for _ in range(draws):
        path, token = follow_tree(target, tokens, parents, generator)
        out = [*(tokens[node] for node in path), token]
        if len(out) == 1:
            out.append(int(sample(after[out[0]], generator)))
        counts[out[0], out[1]] += 1
    wanted = first[:, None] * after * draws
    assert chi_square(counts.double().flatten(), wanted.flatten()) > 1e-3


def test_a_certain_chain_is_judged_alike_as_chain_and_as_tree() -> None:
    target = distributions(3, 4, 11)
    one_hot = torch.zeros(2, 4, dtype=torch.float64)
    one_hot[0, 1] = one_hot[1, 2] = 1
    lengths = {"chain": 0, "tree": 0}
    generator = torch.Generator().manual_seed(12)
    for _ in range(4000):
        lengths["chain"] += accept_chain(target, one_hot, torch.tensor([1, 2]), generator)[0]
        lengths["tree"] += len(follow_tree(target, [1, 2], [ROOT, 0], generator)[0])
    wanted = float(target[0, 1] * (1 + target[1, 2]))
    for total in lengths.values():
        assert abs(total / 4000 - wanted) < 0.05


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    target = distributions(4, 30, 13)
    generator = torch.Generator().manual_seed(14)
    for _ in range(200):
        tokens = sample(target[:3], generator)
        assert accept_chain(target, target[:3], tokens, generator)[0] == 3


def test_tokens_outside_the_drafts_vocabulary_keep_their_probability() -> None:
    """Emitted = min(p, q) + (1 - Σ min(p, q)) · residual = p, also where q is zero."""
    target, draft = distributions(2, 12, 15, 2.0)
    draft = draft.masked_fill(torch.arange(12) >= 6, 0)
    draft = draft / draft.sum()
    emitted = torch.minimum(target, draft) + (1 - overlap(target, draft)) * residual(target, draft)
    torch.testing.assert_close(emitted, target, rtol=0, atol=1e-15)


def test_residual_of_a_draft_that_covers_the_target_is_the_target() -> None:
    target = distributions(1, 5, 16)
    assert torch.equal(residual(target, target), target)


def test_greedy_is_one_hot_at_the_first_largest_logit() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert warp(logits, Sampling()).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, None, 0.6)]
)
def test_warpers_are_those_of_transformers(sampling: Sampling) -> None:
    from transformers import generation

    logits = 2 * torch.randn(3, 40, generator=torch.Generator().manual_seed(17))
    ids = torch.zeros(3, 1, dtype=torch.int64)
    scores = generation.TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        scores = generation.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = generation.TopPLogitsWarper(sampling.top_p)(ids, scores)
    torch.testing.assert_close(warp(logits, sampling), scores.softmax(-1))


def test_a_distribution_without_mass_is_an_error() -> None:
    with pytest.raises(NumericalError, match="no mass"):
        sample(torch.tensor([[0.0, 0.0]]), None)
    with pytest.raises(NumericalError, match="NaN"):
        sample(torch.tensor([[0.5, torch.nan]]), None)


def test_expected_length_is_the_sum_over_all_outcomes() -> None:
    acceptance, drafted = 0.7, 4
    total = 0.0
    for outcome in itertools.product([True, False], repeat=drafted):
        chance = 1.0
        for accepted in outcome:
            chance *= acceptance if accepted else 1 - acceptance
        run = next((i for i, accepted in enumerate(outcome) if not accepted), drafted)
        total += chance * (run + 1)
    assert expected_length(acceptance, drafted) == pytest.approx(total)
    assert expected_length(acceptance, drafted) == pytest.approx((1 - 0.7**5) / 0.3)
    assert expected_length(1.0, 4) == 5
    powers = [acceptance**j for j in range(1, drafted + 1)]
    assert acceptance_length(powers) == pytest.approx(total)


def test_the_best_length_of_the_known_table() -> None:
    """α = 0.6 and v = 1: the best speed-ups are 1.92 (c = .05), 1.67 (.1), 1.19 (.35)."""
    positions = [0.6**j for j in range(1, 13)]
    for cost, wanted in ((0.05, 1.92), (0.1, 1.67), (0.35, 1.19)):
        _, best = best_drafted(positions, cost, [1.0] * 12)
        assert best == pytest.approx(wanted, abs=0.006)
    drafted, best = best_drafted([0.6**j for j in range(1, 13)], 0.1, [1.0] * 12)
    assert best == pytest.approx(speedup(expected_length(0.6, drafted), drafted, 0.1, 1.0))


def test_a_draft_that_is_never_right_only_costs() -> None:
    assert best_drafted([0.0, 0.0], 0.1, [1.0, 1.0]) == (1, pytest.approx(1 / 1.1))
    with pytest.raises(NumericalError):
        best_drafted([0.5], 0.1, [])


def test_positions_count_whole_runs() -> None:
    """Half the blocks accept all, half nothing: marginals would give 1/2, 1/4."""
    assert accepted_by_position([(2, 2), (2, 0)], 2) == [0.5, 0.5]
    assert accepted_by_position([(1, 1), (3, 1), (3, 3)], 3) == [1.0, 0.5, 0.5]
