"""The search for a group's scale: what is tried, what it costs, and what the format stores of it.

`compressor.numerics.grid` is the way in. Everything here works on groups side by side,
[*, rows, groups, size], with one scale and zero-point each, [*, rows, groups, 1], in fp32; `*` is a
batch of matrices or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.numerics.floats import LARGEST, round_to_float_
from compressor.numerics.hessian import full_precision
from compressor.types import WeightScheme

# Smallest share of the min-max scale that is tried, by width: the fewer codes, the further in the
# best clip lies. On SmolLM2-135M, 24 tries and 3 refits come within 1% of the held-out output
# error of 96 tries from 0.1 at every width.
_SMALLEST_SHRINK = {2: 0.2, 3: 0.25, 4: 0.3, 5: 0.5, 6: 0.6, 7: 0.8, 8: 0.8}
_FLOAT_FACTORS = {4: (1.6, 0.6), 8: (1.2, 0.8)}
_POWERS = (-126, 127)  # of two, in e8m0, without the one that bf16 holds only as a subnormal
TRIES = 24
"""Multiples of the min-max scale that a search tries unless told otherwise."""
_REFITS = 3

Best = tuple[Tensor, Tensor, Tensor]
"""Error, scale and zero-point of every group so far."""


@dataclass(frozen=True)
class Stored:
    """What a format makes of a scale, and of a weight that is computed with it.

    Attributes:
        scheme: the grid.
        dtype: of the dense weight.
        divisor: fp32 [*, 1]; None unless scales are `e4m3`.
    """

    scheme: WeightScheme
    dtype: torch.dtype
    divisor: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Stored:
        """For matrices whose largest element decides the divisor: its scale is the largest e4m3.

        The divisor is what compressed-tensors takes: 448 · 6 / max|W|.
        """
        if scheme.scales != "e4m3":
            return cls(scheme, dtype, None)
        peak = weight.float().abs().amax((-2, -1)).clamp_min(torch.finfo(torch.float32).tiny)
        divisor = (LARGEST[8] * LARGEST[scheme.bits] / peak).nan_to_num(posinf=1.0)
        return cls(scheme, dtype, divisor.unsqueeze(-1))

    def scale(self, wanted: Tensor) -> Tensor:
        """The nearest scale that can be stored, as it will be multiplied with, fp32.

        A scale that vanishes becomes 1: such a group is zero at this precision, and code 0 says
        so exactly. One that would overflow is held where every grid point stays finite.
        """
        if self.divisor is not None:
            divisor = self.divisor[..., None, None]
            stored = round_to_float_(wanted * divisor, 8)
            return torch.where(stored == 0, 1.0, stored) / divisor
        limit = torch.finfo(self.dtype).max / (1 << self.scheme.bits)
        stored = wanted.clamp(-limit, limit)
        if self.scheme.scales == "e8m0":
            power = stored.clamp_min(0).log2().round_().clamp_(*_POWERS).exp2_()
            stored = torch.where(stored == 0, 0.0, power)
        stored = stored.to(self.dtype).float()
        return torch.where(stored == 0, 1.0, stored)

    def numbers_(self, steps: Tensor, zero: Tensor) -> Tensor:
        """What a weight over its scale becomes: the nearest number there is, in place."""
        if self.scheme.number == "float":
            return round_to_float_(steps, self.scheme.bits)
        lowest, highest = self.scheme.code_range
        if self.scheme.symmetry != "asymmetric":  # bounds that are numbers are several times faster
            return steps.round_().clamp_(lowest, highest)
        return steps.round_().clamp_(lowest - zero, highest - zero)

    def weight(self, product: Tensor) -> Tensor:
        """A number times its scale, in fp32, as it will be read."""
        return product if self.dtype == torch.float32 else product.to(self.dtype).float()


@dataclass(frozen=True)
class Objective:
    """Weighted squared error of the groups [*, rows, groups, size], as stored.

    `emphasis` carries 1/max|w| of the group, so that squares neither overflow nor vanish.
    """

    weight: Tensor
    emphasis: Tensor
    stored: Stored

    def steps(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The numbers of the nearest grid points: codes minus zero-point, or floats."""
        return self.stored.numbers_(self.weight / scale, zero)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """What the nearest grid points cost, by group."""
        stored = self.stored.weight(self.steps(scale, zero).mul_(scale))
        return stored.sub_(self.weight).mul_(self.emphasis).square_().sum(-1, keepdim=True)

    def least_squares(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The scale that fits the present codes best; the present one where all are zero."""
        steps = self.steps(scale, zero).mul_(self.emphasis)
        energy = steps.square().sum(-1, keepdim=True)
        fitted = (steps.mul_(self.weight).mul_(self.emphasis)).sum(-1, keepdim=True) / energy
        return torch.where(energy > 0, fitted, scale)


@dataclass(frozen=True)
class OutputObjective(Objective):
    """Squared error of what the groups add to the layer's output: d H d over each group's block.

    Attributes:
        moment: H of the inputs of every group, fp32 [*, groups, inputs, inputs]; a group of
            several output channels has as many stretches of that many inputs.
    """

    moment: Tensor

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """What the nearest grid points cost, by group."""
        stored = self.stored.weight(self.steps(scale, zero).mul_(scale))
        difference = stored.sub_(self.weight).mul_(self.emphasis)
        return self._through(difference).mul_(difference).sum(-1, keepdim=True)

    def least_squares(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The scale that fits the present codes best; the present one where nothing comes out."""
        steps = self.steps(scale, zero).mul_(self.emphasis)
        through = self._through(steps)
        energy = steps.mul_(through).sum(-1, keepdim=True)
        fitted = through.mul_(self.weight).mul_(self.emphasis).sum(-1, keepdim=True) / energy
        return torch.where(energy > 0, fitted, scale)

    def _through(self, values: Tensor) -> Tensor:
        """H times every group [*, rows, groups, size], a new tensor."""
        stretches = values.reshape(*values.shape[:-1], -1, self.moment.shape[-1])
        by_group = stretches.transpose(-4, -3)
        with full_precision():
            product = by_group.flatten(-3, -2) @ self.moment
        return product.view(by_group.shape).transpose(-4, -3).flatten(-2)


def clip_search(objective: Objective, widest: Tensor, zero: Tensor, tries: int = TRIES) -> Best:
    """The least error over shrunken ranges and their neighbours, then over refitted scales.

    Args:
        objective: what is minimised.
        widest: the unrounded min-max scale, where the search starts and which it never exceeds.
        zero: the min-max zero-point.
        tries: shrunken ranges.
    """
    stored = objective.stored
    scale = stored.scale(widest)
    best = (objective.error(scale, zero), scale, zero)
    for factor in factors(stored.scheme, tries):
        for sign, shift in _variants(stored.scheme):
            candidate = stored.scale(widest * (factor * sign))
            best = better(objective, best, candidate, _shifted(zero, shift, stored.scheme))
    return refitted(objective, best)


def refitted(objective: Objective, best: Best) -> Best:
    """Turn by turn, the scale that fits the codes and the codes that fit the scale."""
    for _ in range(_REFITS):
        fitted = objective.least_squares(best[1], best[2])
        best = better(objective, best, objective.stored.scale(fitted), best[2])
    return best


def full_range_of(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Unrounded min-max scale and zero-point, [*, rows, groups, 1]."""
    lowest, _ = scheme.code_range
    intervals = (1 << scheme.bits) - 1
    low = weight.amin(-1, keepdim=True).clamp_max(0)
    high = weight.amax(-1, keepdim=True).clamp_min(0)
    if scheme.number == "float":
        return _float_range(torch.maximum(high, -low), scheme), torch.zeros_like(low)
    if scheme.symmetry == "asymmetric":
        scale = high / intervals - low / intervals
        ratio = torch.where(scale > 0, low / scale, 0.0)
        return scale, (lowest - ratio.round()).clamp(*scheme.code_range)
    if scheme.symmetry == "full_range":
        return torch.where(high > -low, high, low) / lowest, torch.zeros_like(low)
    return torch.maximum(high, -low) / (intervals / 2), torch.zeros_like(low)


def _float_range(peak: Tensor, scheme: WeightScheme) -> Tensor:
    """The scale that takes a group's largest magnitude to the largest number.

    A power of two cannot: compressed-tensors takes the one that leaves the peak below 7, half way
    between 6 and the 8 that would come next, so that it is rounded to 6 at worst.
    """
    if scheme.scales != "e8m0":
        return peak / LARGEST[scheme.bits]
    mantissa, exponent = torch.frexp(peak)  # peak = mantissa · 2^exponent, mantissa in [0.5, 1)
    power = torch.ldexp(torch.ones_like(peak), exponent - 3 + (mantissa >= 0.875).int())
    return torch.where(peak > 0, power, 0.0)


def factors(scheme: WeightScheme, tries: int = TRIES) -> list[float]:
    """`tries` multiples of the min-max scale; two powers of two where only those can be stored.

    The largest one lets the short side of a signed range reach the largest element too. Floats
    are finest near zero and gain little by clipping, but 6 and 4 are far apart: a larger scale
    that takes the peak to 4 may serve the rest better (Cook et al., "Four Over Six", 2025).
    """
    if scheme.scales == "e8m0":
        return [0.5, 2.0]
    if scheme.number == "float":
        return torch.linspace(*_FLOAT_FACTORS[scheme.bits], tries).tolist()
    lowest, highest = scheme.code_range
    reach = {"symmetric": (highest - lowest) / 2, "full_range": -lowest, "asymmetric": highest}
    largest = reach[scheme.symmetry] / highest
    return torch.linspace(largest, _SMALLEST_SHRINK[scheme.bits], tries).tolist()


def _variants(scheme: WeightScheme) -> list[tuple[float, int]]:
    """What is tried beside shrinking: (sign of the scale, shift of the zero-point)."""
    if scheme.symmetry == "full_range":
        return [(1.0, 0), (-1.0, 0)]
    if scheme.symmetry == "asymmetric":
        return [(1.0, 0), (1.0, -1), (1.0, 1)]
    return [(1.0, 0)]


def _shifted(zero: Tensor, shift: int, scheme: WeightScheme) -> Tensor:
    return (zero + shift).clamp_(*scheme.code_range) if shift else zero


def better(objective: Objective, best: Best, scale: Tensor, zero: Tensor) -> Best:
    """Group by group, the candidate where its error is lower and the best so far elsewhere."""
    error = objective.error(scale, zero)
    lower = error < best[0]
    return (
        torch.where(lower, error, best[0]),
        torch.where(lower, scale, best[1]),
        torch.where(lower, zero, best[2]),
    )
