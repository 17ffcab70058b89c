"""A grid seen column by column, for solvers that visit inputs in an order of their own.

Everything is transposed, [in, out], so that one column of the matrix is one contiguous row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from compressor.numerics.floats import float_codes, round_to_float_
from compressor.numerics.grid import Grid
from compressor.types import WeightScheme


class GridColumns:
    """Scales and zero-points by visited column.

    Args:
        grid: [out, groups].
        scheme: its scheme.
        order: int64 [in]; entry i is the original column visited i-th. Columns keep the group
            they are stored in.
    """

    def __init__(self, grid: Grid, scheme: WeightScheme, order: Tensor) -> None:
        self._group = order // (len(order) // grid.scale.shape[1])
        self._scale = grid.steps(scheme).T
        self._zero = None if grid.zero_point is None else grid.zero_point.float().T
        self._scheme = scheme
        self._dtype = grid.scale.dtype

    def leaf(self, start: int, stop: int) -> Leaf:
        """The columns visited from `start` up to `stop`."""
        group = self._group[start:stop]
        if self._scheme.number == "float":
            return FloatLeaf(self._scale[group], self._scheme, self._dtype)
        zero = None if self._zero is None else self._zero[group]
        return IntLeaf(self._scale[group], zero, self._scheme, self._dtype)


class Leaf(ABC):
    """A few columns of a grid with the buffers to round them one at a time.

    Args:
        scale: what numbers are multiplied with, fp32 [columns, out].
        dtype: of the dense weight.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        self._all_steps = torch.empty_like(scale)
        self._steps = self._all_steps.unbind()
        self._scale = scale.unbind()
        self._point = torch.empty_like(scale[0])
        self._stored = None if dtype == torch.float32 else torch.empty_like(scale[0], dtype=dtype)

    def nearest(self, index: int, column: Tensor) -> Tensor:
        """The grid point nearest to `column` [out], as stored, in fp32; valid until the next call.

        Runs once per column, so every call into torch counts.
        """
        steps, point = self._steps[index], self._point
        torch.div(column, self._scale[index], out=steps)
        self._round(index, steps)
        torch.mul(steps, self._scale[index], out=point)
        return point if self._stored is None else point.copy_(self._stored.copy_(point))

    @abstractmethod
    def _round(self, index: int, steps: Tensor) -> None:
        """Make weights over their scale [out] numbers of the grid, in place."""

    @abstractmethod
    def codes(self) -> Tensor:
        """int8 [columns, out], once all of them have been rounded."""


class IntLeaf(Leaf):
    """Columns whose numbers are integers, shifted by a zero-point or not."""

    def __init__(
        self, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, dtype: torch.dtype
    ) -> None:
        super().__init__(scale, dtype)
        self._zero = zero
        self._bounds = _step_bounds(zero, scheme.code_range, len(scale))

    def _round(self, index: int, steps: Tensor) -> None:
        torch.clamp(steps.round_(), *self._bounds[index], out=steps)

    def codes(self) -> Tensor:
        """int8 [columns, out], once all of them have been rounded."""
        codes = self._all_steps if self._zero is None else self._all_steps + self._zero
        return codes.to(torch.int8)


class FloatLeaf(Leaf):
    """Columns whose numbers are small floats."""

    def __init__(self, scale: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> None:
        super().__init__(scale, dtype)
        self._bits = scheme.bits

    def _round(self, index: int, steps: Tensor) -> None:
        del index
        round_to_float_(steps, self._bits)

    def codes(self) -> Tensor:
        """int8 [columns, out], once all of them have been rounded."""
        return float_codes(self._all_steps, self._bits)


def _step_bounds(
    zero: Tensor | None, code_range: tuple[int, int], count: int
) -> list[tuple[Any, Any]]:
    """Smallest and largest code minus zero-point of each column: numbers, or tensors [out]."""
    if zero is None:
        return [code_range] * count
    lowest, highest = (bound - zero for bound in code_range)
    return list(zip(lowest.unbind(), highest.unbind(), strict=True))
