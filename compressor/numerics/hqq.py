"""Half-quadratic quantization: grids that fit most weights well and let outliers miss.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Minimise
Σ|w - ŵ|^p with p < 1 over the grid, by splitting the error off as e:

    e ← the proximal step: shrink(w - ŵ) = sign(x) · max(|x| - |x|^(p-1) / β, 0)
    grid ← least squares of scale · (codes - zero_point) to w - e, the codes held

The original holds the scale and solves for a zero-point that need not be whole. Formats for
engines store whole zero-points, and a whole one on the same scale only moves the ends of the range:
rounded, the original's solution is that of min-max, weight for weight (`LOG.md`). So here the grid
step solves for both, the zero-point rounded before the scale is fitted to it, and β rises as there.
Errors are measured in steps of the scale, so that β means the same for weights of any size. Of all
grids on the way, each group keeps the one of the least Σ|w - ŵ|^p, with scales and weights as they
are stored; the first is the grid it starts from, so that it never ends above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.numerics.grid import Grid, Search, fit_grid, round_to_grid
from compressor.types import QTensor, WeightScheme

# Weights solved at once: a few buffers of this size stay in a core's second-level cache.
_CHUNK_ELEMENTS = 1 << 17
_TINY = 1e-8  # of a step: below it, |x|^(p-1) / β is beyond x for any β, and must not overflow


@dataclass(frozen=True)
class HalfQuadratic:
    """How the alternation goes.

    Attributes:
        exponent: p, within (0, 1].
        beta: weight of the quadratic term in the first iteration.
        growth: factor of β from one iteration to the next.
        iterations: how many.
    """

    exponent: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20


def hqq(
    weight: Tensor,
    scheme: WeightScheme,
    options: HalfQuadratic,
    *,
    start: Search = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QTensor:
    """Every weight on the nearest point of a grid that half-quadratic splitting has fitted.

    Args:
        weight: [out, in], finite.
        scheme: an integer grid with dense scales; its group size divides `in`. Symmetric grids
            have no zero-point to solve for, only a scale.
        options: of the alternation.
        start: the grid to begin with, `minmax` or `mse`.
        scale_dtype: in which scales and weights are stored.

    Raises:
        NumericalError: the weight holds NaN or infinity.
        ValueError: a float grid, or shapes that do not fit together.
    """
    if scheme.number != "int":
        raise ValueError(f"half-quadratic splitting fits integer grids, unlike {scheme}")
    first = fit_grid(weight, scheme, search=start, scale_dtype=scale_dtype)
    shape = first.scale.shape
    groups = weight.float().reshape(first.scale.numel(), -1)
    scale = first.scale.float().reshape(-1, 1)
    zero = torch.zeros_like(scale)
    if first.zero_point is not None:
        zero = first.zero_point.float().reshape(-1, 1)
    rows = max(1, _CHUNK_ELEMENTS // groups.shape[1])
    parts = zip(*(torch.split(tensor, rows) for tensor in (groups, scale, zero)), strict=True)
    solver = _Solver(scheme, options, scale_dtype)
    solved = [solver.solve(*part) for part in parts]
    found = torch.cat([scale for scale, _ in solved]).reshape(shape).to(scale_dtype)
    whole = torch.cat([zero for _, zero in solved]).reshape(shape).to(torch.int8)
    grid = Grid(found, None if first.zero_point is None else whole)
    return round_to_grid(weight, grid, scheme)


@dataclass(frozen=True)
class _Solver:
    """Groups [groups, size] side by side; scales and zero-points are [groups, 1], in fp32."""

    scheme: WeightScheme
    options: HalfQuadratic
    dtype: torch.dtype

    def solve(self, weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale and zero-point that the alternation comes by."""
        kept, least = (scale, zero), self._objective(weight, scale, zero)
        beta = self.options.beta
        for _ in range(self.options.iterations):
            steps = self._steps(weight, scale, zero)
            error = self._shrink(weight / scale - steps, beta)
            scale, zero = self._fitted(weight - error * scale, steps + zero, scale, zero)
            reached = self._objective(weight, scale, zero)
            lower = reached < least
            least = torch.where(lower, reached, least)
            kept = torch.where(lower, scale, kept[0]), torch.where(lower, zero, kept[1])
            beta *= self.options.growth
        return kept

    def _steps(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes less zero-points of the nearest grid points."""
        lowest, highest = self.scheme.code_range
        return (weight / scale).round_().clamp_(lowest - zero, highest - zero)

    def _objective(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Σ|w - ŵ|^p of each group, ŵ as stored."""
        stored = (self._steps(weight, scale, zero) * scale).to(self.dtype).float()
        return (weight - stored).abs_().pow_(self.options.exponent).sum(-1, keepdim=True)

    def _shrink(self, error: Tensor, beta: float) -> Tensor:
        """The proximal step of |x|^p, in its generalised soft-threshold form."""
        magnitude = error.abs()
        threshold = magnitude.clamp_min(_TINY).pow_(self.options.exponent - 1).div_(beta)
        return error.sign() * (magnitude - threshold).clamp_min_(0)

    def _fitted(
        self, target: Tensor, codes: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Zero-point, then scale, of least squares to the target; those given where there is none.

        The original's zero-point, the mean of codes - target / scale, made whole.
        """
        if self.scheme.symmetry == "asymmetric":
            lowest, highest = self.scheme.code_range
            zero = (codes - target / scale).mean(-1, keepdim=True).round_().clamp_(lowest, highest)
        steps = codes - zero
        fitted = (steps * target).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
        fitted = fitted.to(self.dtype).float()
        usable = fitted.isfinite() & (fitted * scale > 0)  # no vanished scale, no turned sign
        return torch.where(usable, fitted, scale), zero
