"""Where a model that speculates for itself should exit, and for how many tokens.

The acceptance of every candidate exit is tracked while decoding: the hidden states of the tokens
that the target has just read tell what each exit would have guessed there, used or not. The exit
and the length with the best expected speed-up are taken next (Entezari Zarch et al. 2025, DEL,
arXiv:2504.05598, whose measure counts layers; here costs are given, so that a large head counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.speculative import expected_length, speedup

KEPT = 0.9  # of a count after each token: about the last ten decide
PRIOR = 4.0  # tokens that the acceptance known before weighs


@dataclass(frozen=True)
class ExitChoice:
    """What to do before the next pass.

    Attributes:
        place: index of the exit among the candidates.
        drafted: γ; 0 where plain decoding is expected to be the fastest.
        predicted: speed-up over plain decoding.
    """

    place: int
    drafted: int
    predicted: float


def exit_cost(exit_: int, blocks: int, block: float, head: float) -> float:
    """c of a step that ends after `exit_` blocks, in plain steps, by the weights that are read.

    Args:
        exit_: blocks computed.
        blocks: of the whole model.
        block: parameters of one.
        head: parameters of the head.
    """
    return (exit_ * block + head) / (blocks * block + head)


def best_exit(
    rates: Sequence[float], costs: Sequence[float], verify_costs: Sequence[float]
) -> ExitChoice:
    """The exit and γ of the largest τ / (γ c + v), with τ of independent tokens.

    Args:
        rates: α of every candidate.
        costs: c of every candidate.
        verify_costs: v for γ = 1 … n; γ = 0 costs and gains nothing.

    Raises:
        NumericalError: there is no candidate, or not one cost for each rate.
    """
    if not rates or len(rates) != len(costs):
        raise NumericalError("one cost belongs to every rate, and at least one")
    best = ExitChoice(0, 0, 1.0)
    for place, (rate, cost) in enumerate(zip(rates, costs, strict=True)):
        for drafted, verify in enumerate(verify_costs, 1):
            found = speedup(expected_length(rate, drafted), drafted, cost, verify)
            if found > best.predicted:
                best = ExitChoice(place, drafted, found)
    return best


class TrackedRates:
    """α of every exit in every row, forgetting exponentially.

    Args:
        known: α of every exit before anything was seen.
        rows: of the batch.
    """

    def __init__(self, known: Sequence[float], rows: int) -> None:
        prior = torch.tensor(list(known), dtype=torch.float64)
        self._right = (PRIOR * prior).expand(rows, -1).clone()
        self._weight = torch.full((rows,), PRIOR, dtype=torch.float64)

    def see(self, row: int, right: Tensor) -> None:
        """Whether each exit would have guessed each of the next tokens.

        Args:
            row: of the batch.
            right: bool [tokens, exits], in the order of the text.
        """
        for token in right.to(torch.float64):
            self._right[row] = KEPT * self._right[row] + token
            self._weight[row] = KEPT * self._weight[row] + 1

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._right, self._weight = self._right[list(rows)], self._weight[list(rows)]

    @property
    def rates(self) -> list[float]:
        """Of every exit, over the rows."""
        mean: list[float] = (self._right / self._weight[:, None]).mean(0).tolist()
        return mean
