"""Losses against their formulas, and gradients against finite differences and closed forms."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.numerics.distillation import (
    ROWS,
    Loss,
    Total,
    divergence,
    forward_kl,
    teach,
)

ALL: list[Loss] = ["kl", "tv", "ce", "lk_hybrid"]


def example(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, rows, 7, generator=generator)
    return logits, (2 * teacher).softmax(-1)


def total_variation(logits: Tensor, teacher: Tensor) -> Tensor:
    return 1 - torch.minimum(logits.softmax(-1), teacher).sum(-1)


def plain(kind: Loss, logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The mean loss by autograd through the formulas."""
    logits, teacher = logits[mask], teacher[mask]
    if kind == "ce":
        return functional.cross_entropy(logits, teacher.argmax(-1))
    kl, variation = (f(logits, teacher).mean() for f in (forward_kl, total_variation))
    share = {"kl": 1, "tv": 0, "lk_hybrid": torch.exp(-3 * (1 - variation.detach()))}[kind]
    return share * kl + (1 - share) * variation


def test_values_are_the_formulas() -> None:
    logits, teacher = example()
    q, mask = logits.softmax(-1), torch.ones(4, dtype=torch.bool)
    kl = sum(
        float(p * math.log(p / r)) for row, other in zip(teacher, q, strict=True)
        for p, r in zip(row, other, strict=True)
    ) / 4  # fmt: skip
    tv = float((teacher - q).abs().sum(-1).mean()) / 2
    top = teacher.argmax(-1)
    ce = -float(q[torch.arange(4), top].log().mean())
    weight = math.exp(-3 * (1 - tv))
    wanted = {"kl": kl, "tv": tv, "ce": ce, "lk_hybrid": weight * kl + (1 - weight) * tv}
    for kind in ALL:
        assert float(divergence(kind, logits, teacher, mask)) == pytest.approx(wanted[kind], 1e-5)


def test_the_gradient_of_kl_is_q_minus_p() -> None:
    logits, teacher = example()
    logits.requires_grad_()
    forward_kl(logits, teacher).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - teacher)


def test_the_gradient_of_tv_is_that_of_the_formula() -> None:
    """d TV / d z_v = q_v (A - [q_v < p_v]) with A = Σ_{q<p} q, from d min(p, q)."""
    logits, teacher = example()
    logits.requires_grad_()
    total_variation(logits, teacher).sum().backward()
    q = logits.detach().softmax(-1)
    below = (q < teacher).float()
    mass = (q * below).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, q * (mass - below))


@pytest.mark.parametrize("kind", ["kl", "tv", "lk_hybrid"])
def test_a_perfect_student_has_no_loss(kind: Loss) -> None:
    _, teacher = example()
    mask = torch.ones(4, dtype=torch.bool)
    assert float(divergence(kind, teacher.log(), teacher, mask)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_masked_positions_do_not_count(kind: Loss) -> None:
    logits, teacher = example()
    mask = torch.tensor([True, False, True, False])
    alone = divergence(kind, logits[mask], teacher[mask], torch.ones(2, dtype=torch.bool))
    assert torch.equal(divergence(kind, logits, teacher, mask), alone)
    assert float(divergence(kind, logits, teacher, torch.zeros(4, dtype=torch.bool))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL)
def test_a_few_positions_at_a_time_are_all_of_them(
    kind: Loss, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient, in rows of several texts; logits and p may come in half precision."""
    monkeypatch.setattr("compressor.numerics.recovery._CACHED", 2 * 7)
    logits, teacher = (tensor.view(3, 5, 7).to(dtype) for tensor in example(15))
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    logits.requires_grad_()
    whole = plain(kind, logits.float(), teacher.float(), mask)
    found = divergence(kind, logits, teacher, mask)
    assert float(found.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    ours, theirs = (torch.autograd.grad(3 * loss, logits)[0] for loss in (found, whole))
    exact = dtype == torch.float32
    torch.testing.assert_close(
        ours, theirs, rtol=1e-4 if exact else 0.02, atol=1e-7 if exact else 1e-3
    )


@pytest.mark.parametrize("kind", ALL)
def test_teaching_is_the_divergence_of_the_logits(kind: Loss) -> None:
    """Value and gradients, over more positions than are worked on at once."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(ROWS + 9, 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    teacher = torch.randn(40, 11, generator=generator).mul(2).softmax(-1)
    places = torch.randint(0, 40, (ROWS + 9,), generator=generator)
    mask = torch.rand(len(states), generator=generator) < 0.7
    whole = plain(kind, states @ weight.T, teacher[places], mask)
    found = teach(states, weight, teacher, places, mask, kind)
    assert float(found.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (states, weight)),
        torch.autograd.grad(3 * whole, (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def together(loss: Callable[[Tensor, Total], Tensor], shares: list[Tensor]) -> list[Tensor]:
    """A loss on each share, at once, as by processes that add up what they find."""
    said, meeting = [torch.zeros(())] * len(shares), threading.Barrier(len(shares), timeout=30)

    def work(rank: int) -> Tensor:
        def total(tensor: Tensor) -> Tensor:
            said[rank] = tensor
            meeting.wait()
            found = torch.stack(said).sum(0)
            meeting.wait()
            return found

        return loss(shares[rank], total)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, range(len(shares))))


@pytest.mark.parametrize("kind", ALL)
def test_parts_of_processes_add_up_to_the_whole(kind: Loss) -> None:
    """Value and gradients, of unequal shares, one of which has no position."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(9, 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    teacher = torch.randn(9, 11, generator=generator).mul(2).softmax(-1)
    mask = torch.tensor([True] * 7 + [False] * 2)
    shares = [torch.tensor([0, 3, 4, 5, 6, 7]), torch.tensor([1, 2]), torch.tensor([8])]

    def of_logits(rows: Tensor, total: Total) -> Tensor:
        return divergence(kind, (states @ weight.T)[rows], teacher[rows], mask[rows], total=total)

    def of_states(rows: Tensor, total: Total) -> Tensor:
        return teach(states[rows], weight, teacher, rows, mask[rows], kind, total=total)

    whole = plain(kind, states @ weight.T, teacher, mask)
    wanted = torch.autograd.grad(whole, (states, weight))
    for loss in (of_logits, of_states):
        found = torch.stack(together(loss, shares)).sum()
        assert float(found.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(found, (states, weight)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_teaching_in_half_precision_is_near() -> None:
    generator = torch.Generator().manual_seed(4)
    states, weight = (torch.randn(n, 16, generator=generator) for n in (50, 30))
    teacher, places = torch.randn(50, 30, generator=generator).softmax(-1), torch.arange(50)
    everywhere = torch.ones(50, dtype=torch.bool)
    exact = teach(states, weight, teacher, places, everywhere, "kl")
    half = teach(states, weight, teacher.bfloat16(), places, everywhere, "kl")
    assert float(half) == pytest.approx(float(exact), rel=0.02)
    assert float(half) != float(exact)
    assert float(teach(states, weight, teacher, places, ~everywhere, "kl")) == 0
