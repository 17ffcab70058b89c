"""Weights of domains that lean towards the worst one, inside a ball around given weights.

Distributionally robust optimisation minimises the worst mean of losses over all mixtures q near a
base p (Namkoong & Duchi, "Stochastic Gradient Methods for Distributionally Robust Optimization
with f-divergences", 2016):

    max Σ qᵢ eᵢ   over q in the simplex with D(q, p) = ½ Σ pᵢ (qᵢ/pᵢ - 1)² ≤ ρ.

Its solution is q = p·r with r proportional to the excess e over a threshold η, where positive.
Domains below the threshold keep a floor (Deng et al., "DRPruning", 2024, whose rule this is).
The solution does not change when all e are shifted or scaled together, so that noise would be
followed as far as a real difference: `trusted_radius` shrinks the ball by what noise explains.

Everything is fp64 and one-dimensional, one entry a domain.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 50
_TOLERANCE = 1e-4  # of the radius


def chi_square_weights(
    base: Tensor, excess: Tensor, radius: float, *, floor: float = 0.2
) -> Tensor:
    """The weights in the ball that make Σ q·e largest, domains below the threshold kept at a floor.

    Args:
        base: p [domains], positive, summing to 1.
        excess: e [domains], loss over a reference, in any unit.
        radius: ρ, the largest χ² divergence; 0 returns the base.
        floor: smallest ratio q/p before q is normalised, in [0, 1).

    Returns:
        q, fp64 [domains]: positive (for a positive floor), summing to 1, ordered as e is in q/p,
        with a divergence of at most ρ, reached up to 0.1 % unless the floor forbids it. The base
        itself where all e are equal.

    Raises:
        ValueError: shapes that differ, a base that is no distribution, an e that is not finite, a
            negative radius or a floor outside [0, 1).
    """
    base, excess = base.double(), excess.double()
    _check(base, excess, radius, floor)
    spread = float(excess.max() - excess.min())
    if radius == 0 or spread == 0:
        return base
    scaled = (excess - excess.min()) / spread
    # The divergence grows with the threshold, from 0 far below all e to its largest at the worst
    # one; 2 - 1/u runs through all of that as u goes from 0 to 1.
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = divergence(_tilted(base, scaled, 2 - 1 / middle, floor), base)
        low, high = (middle, high) if found <= radius else (low, middle)
        if (1 - _TOLERANCE) * radius <= found <= radius:
            break
    return _tilted(base, scaled, 2 - 1 / low, floor) if low else base


def divergence(weights: Tensor, base: Tensor) -> float:
    """D(q, p) = ½ Σ pᵢ (qᵢ/pᵢ - 1)²."""
    ratio = weights.double() / base.double()
    return 0.5 * float((base.double() * (ratio - 1).square()).sum())


def trusted_radius(radius: float, losses: Tensor, errors: Tensor) -> float:
    """ρ·max(0, 1 - noise / variance): the share of the spread that sampling does not explain.

    Args:
        radius: ρ.
        losses: [domains].
        errors: standard errors of the losses [domains].
    """
    spread = float(losses.double().var(unbiased=True)) if len(losses) > 1 else 0.0
    if spread == 0:
        return 0.0
    noise = float(errors.double().square().mean())
    return radius * max(0.0, 1 - noise / spread)


def _tilted(base: Tensor, excess: Tensor, threshold: float, floor: float) -> Tensor:
    above = (excess - threshold).clamp_min(0)
    raised = base * (above / (base * above).sum()).clamp_min(floor)
    return raised / raised.sum()


def _check(base: Tensor, excess: Tensor, radius: float, floor: float) -> None:
    if base.ndim != 1 or base.shape != excess.shape:
        raise ValueError(
            f"one weight and one loss a domain, not {list(base.shape)} and {list(excess.shape)}"
        )
    if not bool((base > 0).all()) or abs(float(base.sum()) - 1) > 1e-6:
        raise ValueError("the base weights must be positive and sum to 1")
    if not bool(torch.isfinite(excess).all()):
        raise ValueError("losses must be finite")
    if radius < 0 or not 0 <= floor < 1:
        raise ValueError(f"radius {radius} must be at least 0 and floor {floor} in [0, 1)")
