"""The χ²-ball rule against a published vector, closed forms and a general optimiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from compressor.numerics.robust import (
    chi_square_weights,
    divergence,
    drifted,
    guarded_radius,
    trusted_radius,
)

BASE = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
EXCESS = (0.10, 0.05, 0.12, 0.06, 0.20, 0.07, 0.11)
PUBLISHED = (0.6267, 0.0089, 0.0585, 0.0041, 0.1244, 0.0097, 0.1677)


def vector(values: tuple[float, ...] | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    count = draw(st.integers(2, 8))
    shares = draw(st.lists(st.floats(0.02, 1), min_size=count, max_size=count))
    excess = draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    base = vector(shares) / sum(shares)
    return base, vector(excess), draw(st.sampled_from((1e-4, 0.01, 0.1, 0.5, 3.0)))


def test_the_published_vector() -> None:
    weights = chi_square_weights(vector(BASE), vector(EXCESS), 0.1)
    assert weights.tolist() == pytest.approx(PUBLISHED, abs=6e-5)
    assert divergence(weights, vector(BASE)) == pytest.approx(0.1, rel=1e-4)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_in_the_simplex_in_the_ball_ordered_and_never_below_the_base(
    problem: tuple[Tensor, Tensor, float],
) -> None:
    base, excess, radius = problem
    weights = chi_square_weights(base, excess, radius)
    assert (weights > 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert divergence(weights, base) <= radius * (1 + 1e-9)
    ratio = (weights / base)[torch.argsort(excess, stable=True)]
    assert (ratio.diff() >= -1e-12).all()
    assert (weights * excess).sum() >= (base * excess).sum() - 1e-9


@given(problems(), st.floats(0.1, 50), st.floats(-20, 20))
@settings(max_examples=60, deadline=None)
def test_shift_and_scale_of_the_losses_change_nothing(
    problem: tuple[Tensor, Tensor, float], scale: float, shift: float
) -> None:
    base, excess, radius = problem
    excess = excess.round(decimals=2)  # ties must stay ties
    moved = chi_square_weights(base, excess * scale + shift, radius)
    assert torch.allclose(moved, chi_square_weights(base, excess, radius), atol=2e-3)


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.6])
def test_without_a_floor_it_is_the_optimum_of_the_ball(radius: float) -> None:
    """Against sequential quadratic programming on the definition."""
    base, excess = vector((0.4, 0.3, 0.2, 0.1)), vector((0.3, 1.1, 0.2, 0.9))
    found = minimize(
        lambda q: -(q @ excess.numpy()),
        base.numpy(),
        bounds=[(0, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1},
            {"type": "ineq", "fun": lambda q: radius - divergence(torch.tensor(q), base)},
        ],
        options={"ftol": 1e-12},
    )
    weights = chi_square_weights(base, excess, radius, floor=0)
    assert weights.tolist() == pytest.approx(found.x.tolist(), abs=1e-3)


def test_two_domains_in_closed_form() -> None:
    """q = (½ - d, ½ + d) has D = 2d²."""
    weights = chi_square_weights(vector((0.5, 0.5)), vector((1, 2)), 0.1)
    assert float(weights[1]) == pytest.approx(0.5 + (0.1 / 2) ** 0.5, abs=1e-4)


def test_nothing_to_choose() -> None:
    base = vector(BASE)
    assert torch.equal(chi_square_weights(base, vector(EXCESS), 0), base)
    assert torch.equal(chi_square_weights(base, torch.full((7,), 0.3), 0.1), base)
    alone = torch.ones(1)
    assert torch.equal(chi_square_weights(alone, torch.ones(1), 0.1), alone.double())


def test_a_large_ball_leaves_all_but_the_worst_at_the_floor() -> None:
    weights = chi_square_weights(vector((0.5, 0.3, 0.2)), vector((1, 3, 2)), 100)
    raised = vector((0.5 * 0.2, 0.3 * 10 / 3, 0.2 * 0.2))
    assert torch.allclose(weights, raised / raised.sum(), atol=1e-9)


def test_noise_shrinks_the_ball() -> None:
    losses = vector((0.1, 0.2, 0.3))  # variance 0.01
    assert trusted_radius(0.1, losses, torch.zeros(3)) == pytest.approx(0.1)
    assert trusted_radius(0.1, losses, torch.full((3,), 0.05)) == pytest.approx(0.075)
    assert trusted_radius(0.1, losses, torch.full((3,), 0.2)) == 0
    assert trusted_radius(0.1, torch.ones(3), torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("base", "excess", "radius", "floor"),
    [
        ((0.5, 0.5), (1.0, 2.0, 3.0), 0.1, 0.2),
        ((0.5, 0.6), (1.0, 2.0), 0.1, 0.2),
        ((1.0, 0.0), (1.0, 2.0), 0.1, 0.2),
        ((0.5, 0.5), (1.0, float("nan")), 0.1, 0.2),
        ((0.5, 0.5), (1.0, 2.0), -0.1, 0.2),
        ((0.5, 0.5), (1.0, 2.0), 0.1, 1.0),
    ],
)
def test_refuses_what_is_no_problem(
    base: tuple[float, ...], excess: tuple[float, ...], radius: float, floor: float
) -> None:
    with pytest.raises(ValueError, match=r"weight|sum|losses|radius"):
        chi_square_weights(vector(base), vector(excess), radius, floor=floor)


def test_pure_noise_leaves_no_radius() -> None:
    """Placebo: domains drawn alike. One percent of measurements may tilt; 5 of 400 at most here."""
    generator = torch.Generator().manual_seed(3)
    tilted, before = 0, 0
    for _ in range(400):
        windows = list(torch.rand(6, 8, generator=generator).double().log().neg())
        tilted += guarded_radius(0.1, windows) > 0
        means = torch.stack([values.mean() for values in windows])
        errors = torch.stack([values.std() / 8**0.5 for values in windows])
        before += trusted_radius(0.1, means, errors) > 0
    assert tilted <= 8
    assert before > 100  # what the guard is for: noise alone tilted the simpler rule this often


def test_real_differences_keep_most_of_the_radius() -> None:
    generator = torch.Generator().manual_seed(4)
    windows = list(1 + 0.05 * torch.randn(6, 8, generator=generator).double())
    windows[2] += 1.0
    assert guarded_radius(0.1, windows) > 0.095
    assert guarded_radius(0.1, [values * 1e-6 + 7 for values in windows]) > 0.095
    assert guarded_radius(0.0, windows) == 0


def test_what_cannot_be_told_from_noise_is_not_trusted() -> None:
    one = [vector([0.1]), vector([0.9])]
    assert guarded_radius(0.1, one) == 0
    assert guarded_radius(0.1, [vector([0.1, 0.2])]) == 0
    same = [vector([0.5, 0.5]), vector([0.5, 0.5])]
    assert guarded_radius(0.1, same) == 0
    exact = [vector([0.5, 0.5]), vector([0.6, 0.6])]
    assert guarded_radius(0.1, exact) == 0.1


def test_the_base_drifts_within_half_and_twice_its_start() -> None:
    start, weights = vector([0.6, 0.3, 0.1]), vector([0.1, 0.1, 0.8])
    once = drifted(start, weights, start)
    assert once.tolist() == pytest.approx([0.55, 0.28, 0.17], abs=1e-9)
    base = start
    for _ in range(100):
        base = drifted(base, weights, start)
    assert float(base.sum()) == pytest.approx(1, abs=1e-12)
    assert float(base[2]) == pytest.approx(0.2, abs=1e-6)
    assert (base >= start / 2 - 1e-9).all()
    assert torch.allclose(drifted(start, start, start), start, atol=1e-9)
