"""What loss a domain will have when training is over, from what it had so far.

A scaling law in the tokens T of a domain and the share P of the model that is kept,

    l(T, P) = A·T^-α·P^-γ + E     with A, E, α, γ ≥ 0

(Deng et al. 2024, "DRPruning", arXiv:2411.14055, section 3.2). A and E enter linearly: for every
pair of exponents on a grid they are a weighted least-squares fit (separable least squares, Golub
and Pereyra 1973), repeated with Huber weights, so that a few odd measurements do not decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DELTA = 1e-3  # nats, where the loss of a residual turns from square to linear
_ROUNDS = 6
_POINTS = 64
_TINY = 1e-12


def forecast(tokens: Tensor, kept: Tensor, losses: Tensor, at: tuple[float, float]) -> float:
    """The loss that the fitted law gives, between 0 and the lowest one measured.

    Args:
        tokens: T of every measurement [measurements], positive.
        kept: P of every measurement, in (0, 1].
        losses: measured [measurements].
        at: T and P to predict for.

    Raises:
        ValueError: fewer than three measurements, or sizes that are not positive.
    """
    if len(losses) < 3:
        raise ValueError(f"{len(losses)} measurements do not determine a law of three numbers")
    if float(tokens.min()) <= 0 or float(kept.min()) <= 0 or min(at) <= 0:
        raise ValueError("tokens and kept shares must be positive")
    chosen = torch.linspace(0, len(losses) - 1, min(len(losses), _POINTS)).round().long()
    tokens, kept, losses = (values.double()[chosen] for values in (tokens, kept, losses))
    exponents = _exponents(varies=float(kept.max() - kept.min()) > 1e-6)
    # Relative to the point that is asked for: there the law is simply A + E.
    logs = torch.stack([(tokens / at[0]).log(), (kept / at[1]).log()])
    features = torch.exp(-exponents @ logs)
    amplitude, floor, misfit = _fits(features, losses)
    best = int(misfit.argmin())
    found = float(amplitude[best] + floor[best])
    return max(0.0, min(found, float(losses.min())))


def _exponents(*, varies: bool) -> Tensor:
    """Pairs (α, γ) [pairs, 2].

    Smaller α would be nearly logarithms, which promise a fall without end to any loss that wavers.
    """
    alpha = torch.linspace(0.25, 2, 36, dtype=torch.float64)
    gamma = torch.linspace(0, 4, 17 if varies else 1, dtype=torch.float64)
    return torch.cartesian_prod(alpha, gamma)


def _fits(features: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, E and the sum of Huber losses for every row of features [pairs, measurements]."""
    weights = torch.ones_like(features)
    amplitude = floor = torch.zeros(len(features), dtype=torch.float64)
    size = losses.expand_as(features)
    for _ in range(_ROUNDS):
        amplitude, floor = _linear(features, losses, weights)
        size = (losses - amplitude[:, None] * features - floor[:, None]).abs()
        weights = (_DELTA / size.clamp_min(_TINY)).clamp_max(1.0)
    huber = torch.where(size <= _DELTA, 0.5 * size.square(), _DELTA * (size - 0.5 * _DELTA))
    return amplitude, floor, huber.sum(1)


def _linear(features: Tensor, losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of A·f + E with both at least 0."""
    total = weights.sum(1)
    means = (weights * features).sum(1) / total, (weights * losses).sum(1) / total
    centred = features - means[0][:, None], losses - means[1][:, None]
    spread = (weights * centred[0].square()).sum(1).clamp_min(_TINY)
    amplitude = ((weights * centred[0] * centred[1]).sum(1) / spread).clamp_min(0)
    floor = means[1] - amplitude * means[0]
    steep = (weights * features * losses).sum(1) / (weights * features.square()).sum(1)
    return torch.where(floor < 0, steep.clamp_min(0), amplitude), floor.clamp_min(0)
