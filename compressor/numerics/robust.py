"""Weights of domains that lean towards the worst one, inside a ball around given weights.

Distributionally robust optimisation minimises the worst mean of losses over all mixtures q near a
base p (Namkoong & Duchi, "Stochastic Gradient Methods for Distributionally Robust Optimization
with f-divergences", 2016):

    max Σ qᵢ eᵢ   over q in the simplex with D(q, p) = ½ Σ pᵢ (qᵢ/pᵢ - 1)² ≤ ρ.

Its solution is q = p·r with r proportional to the excess e over a threshold η, where positive.
Domains below the threshold keep a floor (Deng et al., "DRPruning", 2024, whose rule this is).
The solution does not change when all e are shifted or scaled together, so that noise would be
followed as far as a real difference: `trusted_radius` shrinks the ball by what noise explains on
average, `guarded_radius` by the most that it explains in 99 of 100 draws.

Everything is fp64 and one-dimensional, one entry a domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = 50
_TOLERANCE = 1e-4  # of the radius
_RESAMPLES = 1000


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


def guarded_radius(radius: float, windows: Sequence[Tensor], *, level: float = 0.99) -> float:
    """ρ·max(0, 1 - c·noise / variance): the share of the spread that noise cannot explain.

    The variance of the means over their mean squared standard error is 1 on average where domains
    do not differ, and often two or three with few domains, so that `trusted_radius` lets noise
    tilt in every second measurement. Here c is the quantile of that ratio under no difference:
    windows are resampled around the mean of their own domain (a bootstrap of the null hypothesis).

    Args:
        radius: ρ.
        windows: what every domain's windows lose over its reference; domains of one window tell
            nothing of noise, so that nothing is trusted then.
        level: share of draws of pure noise that leave no radius at all.
    """
    if len(windows) < 2 or min(len(values) for values in windows) < 2:
        return 0.0
    means = torch.stack([values.double().mean() for values in windows])
    squares = torch.stack([values.double().var() / len(values) for values in windows])
    spread, noise = float(means.var()), float(squares.mean())
    if spread == 0 or noise == 0:
        return radius if spread else 0.0
    bound = float(_null_ratios(windows).quantile(level))
    return radius * max(0.0, 1 - bound * noise / spread)


def _null_ratios(windows: Sequence[Tensor]) -> Tensor:
    """Variance of means over their mean squared error where no domain differs, [resamples]."""
    generator = torch.Generator().manual_seed(0)
    means, squares = [], []
    for values in windows:
        count = len(values)
        residuals = (values.double() - values.double().mean()) * (count / (count - 1)) ** 0.5
        drawn = residuals[torch.randint(count, (_RESAMPLES, count), generator=generator)]
        means.append(drawn.mean(1))
        squares.append(drawn.var(1) / count)
    noise = torch.stack(squares).mean(0).clamp_min(torch.finfo(torch.float64).tiny)
    ratios: Tensor = torch.stack(means).var(0) / noise
    return ratios


def drifted(base: Tensor, weights: Tensor, start: Tensor, *, rate: float = 0.1) -> Tensor:
    """The base moved a little towards the weights, no domain beyond half or twice its start.

    Clipping (1 - rate)·p + rate·q to [start/2, 2·start] can move the sum off 1; all are scaled by
    one factor before they are clipped so that it does not.

    Args:
        base: p [domains].
        weights: q [domains].
        start: p at the beginning.
        rate: 0.1 in DRPruning.
    """
    if torch.equal(base, weights):
        return base
    moved = (1 - rate) * base.double() + rate * weights.double()
    low, high = start.double() / 2, 2 * start.double()
    factors = [0.25, 4.0]
    for _ in range(_STEPS):
        middle = sum(factors) / 2
        over = float((middle * moved).clamp(low, high).sum()) > 1
        factors[over] = middle
    found = (factors[0] * moved).clamp(low, high)
    return found / found.sum()


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
