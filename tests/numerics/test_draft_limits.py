"""Which term holds a draft back, from which size it pays, and losses on few tokens."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.distillation import divergence, truncated
from compressor.numerics.speculative import (
    best_drafted,
    limiting_term,
    paying_scale,
    predicted_costs,
    products_share,
)

GOOD = [0.8**j for j in range(1, 6)]
FREE = [1.0] * 5


@pytest.mark.parametrize(
    ("shares", "cost", "verify", "term"),
    [
        (GOOD, 0.6, FREE, "draft cost"),
        (GOOD, 0.05, [1.2, 1.6, 2.0, 2.5, 3.0], "verify cost"),
        ([0.2, 0.05, 0.01, 0.0, 0.0], 0.05, FREE, "acceptance"),
    ],
)
def test_the_worst_term_is_named(
    shares: list[float], cost: float, verify: list[float], term: str
) -> None:
    found = limiting_term(shares, cost, verify)
    assert found.term == term
    now = best_drafted(shares, cost, verify)[1]
    assert min(found.better_cost, found.better_verify, found.better_acceptance) >= now - 1e-12


def test_a_good_term_is_not_made_worse() -> None:
    found = limiting_term([0.95**j for j in range(1, 6)], 0.01, [0.9] * 5)
    now = best_drafted([0.95**j for j in range(1, 6)], 0.01, [0.9] * 5)[1]
    assert (found.better_cost, found.better_verify, found.better_acceptance) == (now, now, now)


def test_from_that_size_on_it_pays_exactly() -> None:
    shares, cost, verify = [0.6, 0.3, 0.1], 0.7, [1.1, 1.2, 1.3]
    scale = paying_scale(shares, cost, verify, 1.05)
    assert scale is not None
    assert scale > 1
    assert best_drafted(shares, cost / scale, verify)[1] == pytest.approx(1.05)
    assert best_drafted(shares, cost / (0.99 * scale), verify)[1] < 1.05


def test_no_size_helps_where_verifying_eats_it_all() -> None:
    assert paying_scale([0.3, 0.1], 0.1, [1.4, 1.6], 1.05) is None


def test_predicted_costs_are_the_ratios_of_the_times() -> None:
    target, draft, byte, flop = 3e9, 2e8, 2 / 50e9, 1 / 400e9  # bf16 at 50 GB/s, 400 GFLOP/s

    def seconds(weights: float, tokens: int) -> float:
        return weights * (byte + 2 * tokens * flop)

    once = seconds(target, 1)
    verify = [seconds(target, drafted + 1) / once for drafted in range(1, 6)]
    share = products_share(verify)
    assert share == pytest.approx(2 * flop / (byte + 2 * flop))
    cost, found = predicted_costs(target, draft, 5, share)
    assert cost == pytest.approx(seconds(draft, 1) / once)
    assert found == pytest.approx(verify)
    assert predicted_costs(target, draft, 2, 0.0)[1] == (1.0, 1.0)


def test_only_the_likeliest_tokens_are_learned() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = truncated(teacher, 2)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(truncated(teacher, 9), teacher)
    mask = torch.tensor([True])
    logits = torch.tensor([[0.3, 0.1, -0.2, 0.0]], requires_grad=True)
    divergence("kl", logits, teacher, mask, 2).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - kept)
    whole, same = (divergence("kl", logits.detach(), teacher, mask, top) for top in (None, 4))
    torch.testing.assert_close(whole, same)
