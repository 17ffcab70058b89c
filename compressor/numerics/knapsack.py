"""Choose one option per item at the least total loss within a budget of bytes.

The multiple-choice knapsack problem, solved by dynamic programming over the bytes that are spent
beyond the cheapest choice (Kellerer, Pferschy & Pisinger, "Knapsack Problems", 2004, section 11.5).
Matrices of one shape cost multiples of one number of bytes, so that a real model needs few states
and the solution is exact; where it needs more than the limit, costs are rounded up to a coarser
unit, which never exceeds the budget and gives up no more than one unit per item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATES = 1 << 17


@dataclass(frozen=True)
class Option:
    """One way to treat an item: its place in the caller's list, cost in bytes, loss."""

    index: int
    cost: int
    loss: float


def choose(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    states: int = STATES,
) -> tuple[int, ...]:
    """The option of every item that minimises the sum of losses with costs within the budget.

    Deterministic: of equally good choices the cheaper one, then the one listed first.

    Args:
        costs: bytes of each option of each item, non-negative.
        losses: of the same shape; finite.
        budget: most bytes that the choices may cost together.
        states: most distinct amounts of bytes to tell apart; more is exact for more models.

    Returns:
        The index of the option chosen for each item.

    Raises:
        ValueError: the cheapest options cost more than the budget, or numbers do not fit.
    """
    _check(costs, losses)
    items = [_useful(*pair) for pair in zip(costs, losses, strict=True)]
    spare = budget - sum(options[0].cost for options in items)
    if spare < 0:
        raise ValueError(f"the cheapest options exceed the budget by {-spare} bytes")
    extras = [[option.cost - options[0].cost for option in options] for options in items]
    unit = math.gcd(*(extra for item in extras for extra in item)) or 1
    unit = max(unit, -(-spare // max(states - 1, 1)))
    steps = [[-(-extra // unit) for extra in item] for item in extras]
    chosen = _solve(items, steps, spare // unit)
    _spend_rest(items, chosen, budget)
    return tuple(options[k].index for options, k in zip(items, chosen, strict=True))


def _check(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
    if [len(row) for row in costs] != [len(row) for row in losses] or not all(costs):
        raise ValueError("every item needs options, each with a cost and a loss")
    if not all(math.isfinite(loss) for row in losses for loss in row):
        raise ValueError("losses must be finite")


def _useful(costs: Sequence[int], losses: Sequence[float]) -> list[Option]:
    """Options by rising cost, without those that cost as much as another and lose as much."""
    ordered = sorted(map(Option, range(len(costs)), costs, losses), key=lambda o: (o.cost, o.loss))
    kept = ordered[:1]
    for option in ordered[1:]:
        if option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _solve(
    items: Sequence[Sequence[Option]], steps: Sequence[Sequence[int]], capacity: int
) -> list[int]:
    """Places of the chosen options; `least[s]` is the least loss for at most s units."""
    least = torch.zeros(capacity + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for options, needs in zip(items, steps, strict=True):
        best = least + options[0].loss
        choice = torch.zeros(capacity + 1, dtype=torch.int16)
        for place, need in enumerate(needs[1:], start=1):
            if need > capacity:
                break
            candidate = least[: capacity + 1 - need] + options[place].loss
            better = candidate < best[need:]
            best[need:] = torch.where(better, candidate, best[need:])
            choice[need:][better] = place
        least = best
        choices.append(choice)
    return _trace_back(choices, steps, capacity)


def _trace_back(
    choices: Sequence[Tensor], steps: Sequence[Sequence[int]], capacity: int
) -> list[int]:
    chosen = []
    for choice, needs in zip(reversed(choices), reversed(steps), strict=True):
        place = int(choice[capacity])
        chosen.append(place)
        capacity -= needs[place]
    return chosen[::-1]


def _spend_rest(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> None:
    """Spend what rounding up left over: again and again the single change that gains most."""
    while True:
        spent = sum(options[k].cost for options, k in zip(items, chosen, strict=True))
        gains = [
            (options[k].loss - other.loss, -item, place)
            for item, (options, k) in enumerate(zip(items, chosen, strict=True))
            for place, other in enumerate(options)
            if other.loss < options[k].loss and spent - options[k].cost + other.cost <= budget
        ]
        if not gains:
            return
        _, item, place = max(gains)
        chosen[-item] = place
