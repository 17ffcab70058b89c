"""Learned rounding: an offset for every weight and a clip for every group, by signed gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(SignRound, 2023; AutoRound). A weight becomes

    ŵ = s (clip(⌊w/s + v⌉ + z) - z)    with v in [-½, ½],

so that v decides between the two nearest codes. The ends of a group's range are scaled by learned
factors. Rounding is flat, so that gradients pass through it as if it were the identity; only their
signs are used, with a rate that falls linearly to zero, which bounds how far anything can move:
200 steps of 1/200 sum to ½.

Learning may as well begin at codes that another method has found (`codes`). Those that are not the
nearest begin with the offset that they need, and from there may move by ½ as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.numerics.grid import Grid
from compressor.types import QTensor, WeightScheme

_OFFSET = 0.5
_INSIDE = 0.1  # from the edge, towards the weight, of what rounds to a code that is given
_CLIP = (0.5, 1.5)


class LearnedRounding:
    """One matrix with its offsets and clips.

    Args:
        weight: W [out, in].
        grid: where to begin; its group size divides `in`.
        scheme: the grid's scheme.
        codes: int8 [out, in] on that grid to begin at; the nearest by default.

    Attributes:
        offset: v, fp32 [out, in], requires gradients.
        low, high: factors on both ends of the range, fp32 [out, groups, 1], require gradients.
            Symmetric grids use `high` only.
    """

    def __init__(
        self, weight: Tensor, grid: Grid, scheme: WeightScheme, codes: Tensor | None = None
    ) -> None:
        out, width = weight.shape
        groups = grid.scale.shape[1]
        self.scheme, self._dtype = scheme, grid.scale.dtype
        self._weight = weight.float().reshape(out, groups, width // groups)
        self._scale = grid.scale.float().unsqueeze(-1)
        self._zero = None if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
        self._reach: tuple[Any, Any] = -_OFFSET, _OFFSET  # of offsets: numbers, or for each its own
        start = torch.zeros_like(self._weight)
        if codes is not None:
            start = self._offset_of(codes)
            ends = (start - _OFFSET).clamp_(max=-_OFFSET), (start + _OFFSET).clamp_(min=_OFFSET)
            self._reach = ends
        self.offset = start.requires_grad_()
        self.low = torch.ones_like(self._scale).requires_grad_()
        self.high = torch.ones_like(self._scale).requires_grad_()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is learned."""
        ends = (self.high,) if self._zero is None else (self.low, self.high)
        return (self.offset, *ends)

    def dense(self) -> Tensor:
        """Ŵ [out, in] in fp32, exactly as it would be stored, with straight-through gradients."""
        codes, scale, zero = self._rounded()
        stored = _through((codes - zero).mul(scale), self._dtype)
        return stored.reshape(stored.shape[0], -1)

    def quantized(self) -> QTensor:
        """The codes at present."""
        with torch.no_grad():
            codes, scale, zero = self._rounded()
        flat = codes.to(torch.int8).reshape(codes.shape[0], -1)
        point = None if self._zero is None else zero.squeeze(-1).to(torch.int8)
        return QTensor(flat, scale.squeeze(-1).to(self._dtype), point, self.scheme)

    def state(self) -> tuple[Tensor, ...]:
        """Copies of what is learned, for `restore`."""
        return tuple(parameter.detach().clone() for parameter in self.parameters)

    def restore(self, state: Sequence[Tensor]) -> None:
        """Go back to a state."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state, strict=True):
                parameter.copy_(value)

    def step(self, rate: float) -> None:
        """One step of signed gradient descent; gradients are used up."""
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=rate)
                    parameter.grad = None
            self.offset.clamp_(*self._reach)
            for end in (self.low, self.high):
                end.clamp_(*_CLIP)

    def _offset_of(self, codes: Tensor) -> Tensor:
        """What leads to these codes [out, groups, size]: 0 where they are the nearest."""
        lowest, highest = self.scheme.code_range
        zero = 0.0 if self._zero is None else self._zero
        steps = self._weight / self._scale
        wanted = codes.reshape(steps.shape).float() - zero
        nearest = (steps.round() + zero).clamp(lowest, highest) - zero
        there = wanted + (_OFFSET - _INSIDE) * (nearest - wanted).sign() - steps
        return torch.where(wanted == nearest, 0.0, there)

    def _rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, groups, size], scale and zero-point [out, groups, 1], in fp32."""
        lowest, highest = self.scheme.code_range
        scale, zero = self._range(lowest, highest)
        steps = _straight(self._weight / scale + self.offset) + zero
        return steps.clamp(lowest, highest), scale, zero

    def _range(self, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
        if self._zero is None:
            scale = _through(self._scale * self.high, self._dtype)
            return scale, torch.zeros_like(scale)
        bottom = self._scale * (lowest - self._zero) * self.low
        top = self._scale * (highest - self._zero) * self.high
        scale = _through((top - bottom) / (highest - lowest), self._dtype)
        # At the factors' start this is the zero-point of the grid itself.
        return scale, _straight(lowest - bottom / scale).clamp(lowest, highest)


def rate_at(step: int, steps: int, first: float) -> float:
    """Linear decay from `first` to 0 over `steps`."""
    return first * (1 - step / steps)


def _straight(value: Tensor) -> Tensor:
    """Rounded to integers; the gradient is that of the identity."""
    return value.detach().round() + (value - value.detach())


def _through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As stored in `dtype`, in fp32; the gradient is that of the identity."""
    return value.detach().to(dtype).float() + (value - value.detach())
