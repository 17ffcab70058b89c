"""Removing units costs what the formula says, and the others make up for them as least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.pruning import (
    Level,
    best_columns,
    columns_of,
    flap_scores,
    obs_columns,
    refitted,
    ridged,
    shifted,
    unit_costs,
    wanda_scores,
)


def problem(out: int = 7, width: int = 12, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """W, X with correlated rows, and H."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = mixing @ torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return weight, inputs, (2 / tokens) * inputs @ inputs.T


def error(weight: Tensor, inputs: Tensor, kept: Tensor, values: Tensor) -> float:
    return float((weight @ inputs - values @ inputs[kept]).square().sum() / inputs.shape[1])


def without(*gone: int, width: int = 12) -> Tensor:
    return torch.tensor([column for column in range(width) if column not in gone])


def test_refitting_is_least_squares_on_the_data() -> None:
    weight, inputs, hessian = problem()
    kept = without(0, 3, 4, 11)
    solution = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs).T).solution.T
    torch.testing.assert_close(refitted(weight, hessian, kept), solution, rtol=1e-9, atol=1e-9)


def test_a_ridge_pulls_towards_the_old_weights() -> None:
    weight, inputs, hessian = problem()
    kept = without(2, 5)
    load = float(hessian.diagonal().mean()) * 0.3
    # min |W X - V X_K|² · 2/N + λ |V - W_K|², stacked as one least squares problem.
    scale = (2 / inputs.shape[1]) ** 0.5
    rows = torch.cat([inputs[kept].T * scale, load**0.5 * torch.eye(len(kept)).double()])
    values = torch.cat([(weight @ inputs).T * scale, load**0.5 * weight[:, kept].T])
    solution = torch.linalg.lstsq(rows, values).solution.T
    found = refitted(weight, ridged(hessian, 0.3), kept)
    torch.testing.assert_close(found, solution, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3])
def test_the_cost_of_a_unit_is_the_error_that_refitting_leaves(size: int) -> None:
    weight, inputs, hessian = problem()
    costs = unit_costs(weight, torch.linalg.inv(hessian), size)
    for unit, cost in enumerate(costs.tolist()):
        kept = without(*range(unit * size, (unit + 1) * size))
        left = error(weight, inputs, kept, refitted(weight, hessian, kept))
        assert cost == pytest.approx(left, rel=1e-8)


def test_the_first_removal_is_the_best_of_all() -> None:
    weight, inputs, hessian = problem()
    found = obs_columns(weight, hessian, [Level(3, 3)])
    errors = {
        unit: error(
            weight,
            inputs,
            kept := without(*range(3 * unit, 3 * unit + 3)),
            refitted(weight, hessian, kept),
        )
        for unit in range(4)
    }
    best = min(errors, key=errors.__getitem__)
    assert found.tolist() == without(*range(3 * best, 3 * best + 3)).tolist()


def test_greedy_removal_is_among_the_best_tenth_of_all_subsets() -> None:
    weight, inputs, hessian = problem()

    def left(kept: Tensor) -> float:
        return error(weight, inputs, kept, refitted(weight, hessian, kept))

    errors = sorted(left(without(*gone)) for gone in itertools.combinations(range(12), 4))
    found = left(obs_columns(weight, hessian, [Level(1, 8)]))
    assert found <= errors[len(errors) // 10]
    simple = left(best_columns(wanda_scores(weight, hessian.diagonal()), [Level(1, 8)]))
    assert found < simple


def test_the_order_of_columns_does_not_matter() -> None:
    weight, _, hessian = problem()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    kept = obs_columns(weight, hessian, [Level(1, 7)])
    mixed = obs_columns(weight[:, order], hessian[order][:, order], [Level(1, 7)])
    assert sorted(order[mixed].tolist()) == kept.tolist()


def test_dead_inputs_go_first_and_change_nothing() -> None:
    weight, inputs, _ = problem()
    inputs[4] = 0
    weight[:, 9] = 0
    hessian = ridged((2 / inputs.shape[1]) * inputs @ inputs.T, 0.01)
    kept = obs_columns(weight, hessian, [Level(1, 10)])
    assert kept.tolist() == without(4, 9).tolist()
    torch.testing.assert_close(refitted(weight, hessian, kept), weight[:, kept])


def test_every_pool_keeps_its_share() -> None:
    weight, _, hessian = problem()
    weight[:, :6] *= 100  # else all would go from the second pool
    kept = obs_columns(weight, hessian, [Level(2, 1, pools=2)])
    assert [column // 6 for column in kept.tolist()] == [0, 0, 1, 1]
    scores = torch.arange(12.0).flip(0)
    assert best_columns(scores, [Level(2, 1, pools=2)]).tolist() == [0, 1, 6, 7]


def test_levels_choose_among_what_is_left() -> None:
    weight, _, hessian = problem()
    kept = obs_columns(weight, hessian, [Level(6, 1), Level(2, 2, pools=1)])
    groups = obs_columns(weight, hessian, [Level(6, 1)])
    assert set(kept.tolist()) < set(groups.tolist())
    assert len(kept) == 4
    scores = torch.tensor([0.0, 0, 9, 9, 1, 1, 5, 5, 5, 5, 5, 4])
    assert best_columns(scores, [Level(6, 1), Level(2, 1)]).tolist() == [6, 7]


def test_signed_scores_of_a_unit_may_cancel() -> None:
    scores = torch.tensor([3.0, -3.0, 1.0, 1.0, -2.0, -2.0])
    assert best_columns(scores, [Level(2, 1)]).tolist() == [4, 5]


def test_a_shifted_target_cancels_an_error_of_the_outputs() -> None:
    weight, inputs, hessian = problem()
    generator = torch.Generator().manual_seed(5)
    drift = torch.randn(7, 200, generator=generator, dtype=torch.float64)
    target = shifted(weight, hessian, (2 / 200) * drift @ inputs.T)
    best = torch.linalg.lstsq(inputs.T, (weight @ inputs + drift).T).solution.T
    torch.testing.assert_close(target, best, rtol=1e-9, atol=1e-9)
    kept = without(1, 2)
    best = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs + drift).T).solution.T
    torch.testing.assert_close(refitted(target, hessian, kept), best, rtol=1e-9, atol=1e-9)


def test_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    second, mean = torch.tensor([4.0, 9.0]), torch.tensor([1.0, 3.0])
    assert wanda_scores(weight, second).tolist() == [4.0, 3.0]
    assert flap_scores(weight, second, mean).tolist() == [30.0, 0.0]


def test_units_are_runs_of_neighbours() -> None:
    assert columns_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_moments_that_are_no_numbers_are_refused() -> None:
    _, _, hessian = problem()
    with pytest.raises(NumericalError, match="NaN"):
        ridged(hessian * float("nan"), 0.01)
    with pytest.raises(NumericalError, match="singular"):
        refitted(torch.ones(2, 3).double(), torch.zeros(3, 3).double(), torch.tensor([0, 1]))
