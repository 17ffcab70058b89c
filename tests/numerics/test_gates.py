"""Hard-concrete gates against simulation, and the Lagrangian against its target."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.gates import expected, hard, kept_probability, lagrangian, sampled


@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 1.0, 4.6])
def test_the_probability_of_an_open_gate_is_what_draws_have(logit: float) -> None:
    uniform = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]  # every quantile once
    logits = torch.full_like(uniform, logit)
    share = float((sampled(logits, uniform) > 0).double().mean())
    assert share == pytest.approx(float(kept_probability(logits[0])), abs=1e-4)


def test_gates_begin_open_and_bounded() -> None:
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    drawn = sampled(torch.full((10_000,), 4.6), uniform)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1
    assert float((drawn == 1).float().mean()) > 0.95


def test_hard_gates_keep_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert hard(logits, 2).tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert hard(logits, 4).tolist() == [[1] * 4] * 2


def test_expected_gates_close_as_many_as_go_on_average() -> None:
    logits = torch.tensor([[4.6] * 6 + [-4.6] * 2])
    gates = expected(logits)
    assert (gates[0, 6:] == 0).all()
    assert (gates[0, :6] > 0.99).all()


def test_descent_and_ascent_meet_at_the_target() -> None:
    """Units that a loss wants most stay; the share that goes is the target."""
    worth = torch.linspace(0, 1, 20)
    logits = torch.full((1, 20), 4.6, requires_grad=True)
    multipliers = torch.zeros(2, requires_grad=True)
    descent = torch.optim.AdamW([logits], lr=0.3, weight_decay=0)
    ascent = torch.optim.AdamW([multipliers], lr=0.3, weight_decay=0, maximize=True)
    for _ in range(400):
        kept = kept_probability(logits)[0]
        loss = ((1 - kept) * worth).sum() + lagrangian(logits, 0.4, multipliers)
        for optimizer in (descent, ascent):
            optimizer.zero_grad()
        loss.backward()
        descent.step()
        ascent.step()
        with torch.no_grad():
            logits.clamp_(-4.6, 4.6)
    share = 1 - float(kept_probability(logits.detach()).mean())
    assert share == pytest.approx(0.4, abs=0.03)
    assert hard(logits.detach(), 12)[0].tolist() == [0] * 8 + [1] * 12
