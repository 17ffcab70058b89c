"""Choice of exit and length, against the definition; rates that forget."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import NumericalError
from compressor.numerics.exits import KEPT, PRIOR, TrackedRates, best_exit, exit_cost


def test_cost_counts_the_head() -> None:
    assert exit_cost(1, 4, 10.0, 20.0) == pytest.approx(0.5)
    assert exit_cost(4, 4, 10.0, 20.0) == 1.0


def test_the_best_exit_is_the_largest_of_all() -> None:
    rates, costs, verify = [0.2, 0.7, 0.9], [0.1, 0.3, 0.8], [1.0, 1.1, 1.2]
    by_hand = {
        (place, drafted): sum(rates[place] ** j for j in range(drafted + 1))
        / (drafted * costs[place] + verify[drafted - 1])
        for place in range(3)
        for drafted in (1, 2, 3)
    }
    best = max(by_hand, key=lambda key: by_hand[key])
    found = best_exit(rates, costs, verify)
    assert (found.place, found.drafted) == best == (1, 1)
    assert found.predicted == pytest.approx(by_hand[best])


def test_nothing_is_drafted_where_nothing_is_gained() -> None:
    found = best_exit([0.1, 0.2], [0.5, 0.6], [1.0, 1.0])
    assert (found.drafted, found.predicted) == (0, 1.0)
    with pytest.raises(NumericalError, match="one cost"):
        best_exit([0.1], [], [1.0])


def test_rates_forget_and_rows_are_independent() -> None:
    tracked = TrackedRates((0.5, 0.25), 2)
    assert tracked.rates == [0.5, 0.25]
    tracked.see(0, torch.tensor([[True, False], [True, True]]))
    weight = KEPT * (KEPT * PRIOR + 1) + 1
    first = (KEPT * (KEPT * PRIOR * 0.5 + 1) + 1) / weight
    assert tracked.rates[0] == pytest.approx((first + 0.5) / 2)
    tracked.select([0])
    assert tracked.rates[0] == pytest.approx(first)
    for _ in range(200):
        tracked.see(0, torch.tensor([[False, True]]))
    assert tracked.rates == pytest.approx([0.0, 1.0], abs=1e-6)
