"""What the experts of a mixture are worth, from what the router gives them and what they answer.

An expert adds g f(x) to the stream, f(x) its output and g the router's weight. Without it the
router gives its tokens to others.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ExpertScore = Literal["output", "reap", "frequency"]


class ExpertSums:
    """Sums over the tokens that each expert of one block was given.

    Args:
        experts: how many there are.

    Attributes:
        tokens: given to each, int64 [experts].
        size: Σ g ‖f(x)‖ of each, fp64 [experts].
    """

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.size = torch.zeros(experts, dtype=torch.float64)

    def add(self, expert: int, outputs: Tensor, gates: Tensor) -> None:
        """Count tokens of one expert.

        Args:
            expert: its number.
            outputs: f(x) [tokens, hidden].
            gates: g [tokens].
        """
        norms = outputs.double().norm(dim=1)
        self.tokens[expert] += len(gates)
        self.size[expert] += float((norms * gates.double()).sum())

    def worth(self, score: ExpertScore) -> Tensor:
        """fp64 [experts]; 0 for an expert that no token was given to.

        `frequency`, the tokens; `output`, Σ g ‖f(x)‖; `reap`, the mean of g ‖f(x)‖ over the tokens
        that were given to it (Lasby et al. 2025, "REAP the Experts", arXiv:2510.13999).
        """
        if score == "frequency":
            return self.tokens.double()
        return self.size if score == "output" else self.size / self.tokens.clamp_min(1)


def worthiest(worth: Tensor, count: int) -> list[int]:
    """Numbers of the units worth most, ascending; of equals the first.

    Raises:
        ValueError: there are fewer.
    """
    if not 1 <= count <= len(worth):
        raise ValueError(f"{count} of {len(worth)} cannot be kept")
    order = torch.sort(worth, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
