"""Which channels of the residual stream are worth most, and what norms become without the others.

RMSNorm divides by the root of the mean over all D channels: y = w x / √(m + ε), m = Σ x² / D. With
the D' channels of K alone the mean is m' = Σ_K x² / D', so that the same y asks for
w' = w √(m' / m). Where the channels that go are 0 for every token, Σ_K x² = Σ x² and
w' = w √(D / D') is exact up to ε: the weight is then that of √(m + ε D' / D). Else no number serves
every token, and the mean of m' / m over the text takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_TINY = 1e-300


class StreamSums:
    """What text says about one norm of the stream.

    Args:
        hidden: D, channels.

    Attributes:
        shares: Σ over tokens of x² / Σ_d x_d², fp64 [hidden].
        sizes: Σ over windows of (mean |y|)², fp64 [hidden].
        tokens: how many there were.
    """

    def __init__(self, hidden: int) -> None:
        self.shares = torch.zeros(hidden, dtype=torch.float64)
        self.sizes = torch.zeros(hidden, dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count one window.

        Args:
            inputs: x [tokens, hidden].
            outputs: y [tokens, hidden].
        """
        energy = inputs.double().square()
        shares = energy / energy.sum(1, keepdim=True).clamp_min(_TINY)
        self.shares += shares.sum(0).cpu()
        self.sizes += outputs.double().abs().mean(0).square().cpu()
        self.tokens += len(inputs)

    def factor(self, kept: Sequence[int]) -> float:
        """√E[m' / m] for these channels, what the norm's weight is multiplied by."""
        share = float(self.shares[list(kept)].sum()) / self.tokens
        return math.sqrt(share * len(self.shares) / len(kept))


def activation_worth(norms: Iterable[StreamSums]) -> Tensor:
    """Σ over norms of the L2 norm over windows of the mean |y| of a window, fp64 [hidden].

    Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2.
    """
    return torch.stack([sums.sizes.sqrt() for sums in norms]).sum(0)
