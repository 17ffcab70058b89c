"""Gates in [0, 1] that training opens or closes: hard-concrete masks under a Lagrangian.

A gate with parameter a is z = clamp(1.2·sigmoid((logit u + a)/T) - 0.1, 0, 1) for uniform u:
exactly 0 or 1 with a probability of its own each, and differentiable in between (Louizos et al.
2018, arXiv:1712.01312). Constants as in LLM-Shearing (arXiv:2310.06694) and DRPruning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
BOUND = math.log(100)  # of a, either way
_LOW, _HIGH = -0.1, 1.1
_SHIFT = -TEMPERATURE * math.log(-_LOW / _HIGH)  # 1.599
_SHARPNESS = 0.8


def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """z for a draw.

    Args:
        logits: a, any shape.
        uniform: u in (0, 1), of the same shape.
    """
    open_ = torch.sigmoid((torch.logit(uniform) + logits) / TEMPERATURE)
    return (open_ * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def kept_probability(logits: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(a + 1.599)."""
    return torch.sigmoid(logits + _SHIFT)


def expected(logits: Tensor) -> Tensor:
    """The gates that measure a model in training, [..., units].

    sigmoid(0.8·a/T), with as many of the smallest zeroed as go on average.
    """
    soft = torch.sigmoid(_SHARPNESS * logits / TEMPERATURE)
    gone = (logits.shape[-1] - kept_probability(logits).sum(-1)).round().long()
    place = _ranks(soft)
    return soft.masked_fill(place < gone[..., None], 0.0)


def hard(logits: Tensor, keep: int) -> Tensor:
    """1 for the `keep` largest of the last dimension, 0 for the others; ties go to the first."""
    place = _ranks(-logits)
    return (place < keep).to(logits)


def _ranks(values: Tensor) -> Tensor:
    """Place of every entry among those of its last dimension, from the smallest; ties in order."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)


def lagrangian(logits: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """Mean over rows of λ₁(s - t) + λ₂(s - t)², s the expected share of gates that close.

    Training descends in a and ascends in λ, which start at 0, so that s comes to t.

    Args:
        logits: a [rows, units].
        target: t.
        multipliers: λ [2].
    """
    over = 1 - kept_probability(logits).mean(-1) - target
    return (multipliers[0] * over + multipliers[1] * over.square()).mean()
