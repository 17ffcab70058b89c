"""Choosing options within a budget: optimal, never over, the same every time."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from compressor.numerics.knapsack import choose

ITEM = st.lists(
    st.tuples(st.integers(0, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4
)


def total(table: list[list[float]], chosen: tuple[int, ...]) -> float:
    return sum(row[k] for row, k in zip(table, chosen, strict=True))


def brute_force(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    every = itertools.product(*(range(len(row)) for row in costs))
    return min(total(losses, c) for c in every if total(costs, c) <= budget)


@settings(max_examples=200, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 120), st.sampled_from([8, 1 << 17]))
def test_optimal_within_the_budget(
    items: list[list[tuple[int, float]]], spare: int, states: int
) -> None:
    costs = [[cost for cost, _ in item] for item in items]
    losses = [[loss for _, loss in item] for item in items]
    budget = sum(min(row) for row in costs) + spare
    chosen = choose(costs, losses, budget, states=states)
    assert total(costs, chosen) <= budget
    best = brute_force(costs, losses, budget)
    if states > 120:
        assert total(losses, chosen) == pytest.approx(best, abs=1e-9)
    else:  # a unit of spare/7 is rounded up: with one unit less per item, it is as good
        unit = -(-spare // (states - 1))
        less = max(budget - unit * len(items), budget - spare)
        assert total(losses, chosen) <= brute_force(costs, losses, less) + 1e-9


def model(layers: int) -> tuple[list[list[int]], list[list[float]]]:
    """Matrices of two shapes with losses that fall by four with every bit."""
    draw = random.Random(0)
    costs, losses = [], []
    for layer in range(layers):
        size = 331_776 if layer % 2 else 884_736
        weight = draw.lognormvariate(0, 1.5)
        grids = [(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
        costs.append([size * b // 8 + 2 * size // g + 16 for b, g in grids])
        losses.append([weight * size * 4.0**-b * (1 + g / 512) for b, g in grids])
    return costs, losses


def test_as_good_as_an_integer_programme() -> None:
    costs, losses = model(40)
    budget = int(sum(row[0] for row in costs) * 1.5)
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    flat = np.concatenate([np.array(row) for row in losses])
    one_each = np.zeros((len(costs), len(flat)))
    for item in range(len(costs)):
        one_each[item, item * 18 : (item + 1) * 18] = 1
    found = milp(
        flat,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.concatenate([np.array(r) for r in costs])[None], 0, budget),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(flat)),
        options={"mip_rel_gap": 1e-9},
    )
    assert total(losses, chosen) == pytest.approx(found.fun, rel=1e-7)
    for states, worse in ((256, 1.15), (4096, 1.01)):
        coarse = choose(costs, losses, budget, states=states)
        assert total(costs, coarse) <= budget
        assert total(losses, coarse) < worse * found.fun


def test_more_budget_is_never_worse_and_the_answer_is_the_same_twice() -> None:
    costs, losses = model(12)
    least = sum(min(row) for row in costs)
    found = [total(losses, choose(costs, losses, int(least * (1 + i / 8)))) for i in range(9)]
    assert found == sorted(found, reverse=True)
    assert choose(costs, losses, least * 2) == choose(costs, losses, least * 2)


def test_a_free_lunch_is_taken_and_the_cheaper_of_equals_wins() -> None:
    assert choose([[5, 3, 3]], [[1.0, 1.0, 1.0]], 10) == (1,)
    assert choose([[5, 4]], [[2.0, 1.0]], 4) == (1,)


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "words"),
    [
        ([[5], [6]], [[1.0], [1.0]], 10, "exceed the budget by 1 bytes"),
        ([[5]], [[1.0, 2.0]], 10, "every item needs options"),
        ([[]], [[]], 10, "every item needs options"),
        ([[5]], [[float("nan")]], 10, "finite"),
    ],
)
def test_senseless_input(
    costs: list[list[int]], losses: list[list[float]], budget: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        choose(costs, losses, budget)
