"""A grid seen column by column, for solvers that visit inputs in an order of their own.

Everything is transposed, [in, out], so that one column of the matrix is one contiguous row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        self._scale = grid.scale.float().T
        self._zero = None if grid.zero_point is None else grid.zero_point.float().T
        self._code_range = scheme.code_range
        self._dtype = grid.scale.dtype

    def leaf(self, start: int, stop: int) -> Leaf:
        """The columns visited from `start` up to `stop`."""
        group = self._group[start:stop]
        zero = None if self._zero is None else self._zero[group]
        return Leaf(self._scale[group], zero, self._code_range, self._dtype)


class Leaf:
    """A few columns of a grid with the buffers to round them one at a time."""

    def __init__(
        self, scale: Tensor, zero: Tensor | None, code_range: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._zero = zero
        self._all_steps = torch.empty_like(scale)
        self._steps = self._all_steps.unbind()
        self._scale = scale.unbind()
        self._bounds = _step_bounds(zero, code_range, len(scale))
        self._point = torch.empty_like(scale[0])
        self._stored = None if dtype == torch.float32 else torch.empty_like(scale[0], dtype=dtype)

    def nearest(self, index: int, column: Tensor) -> Tensor:
        """The grid point nearest to `column` [out], as stored, in fp32; valid until the next call.

        Runs once per column, so every call into torch counts.
        """
        steps, point = self._steps[index], self._point
        torch.div(column, self._scale[index], out=steps).round_()
        torch.clamp(steps, *self._bounds[index], out=steps)
        torch.mul(steps, self._scale[index], out=point)
        return point if self._stored is None else point.copy_(self._stored.copy_(point))

    def codes(self) -> Tensor:
        """int8 [columns, out], once all of them have been rounded."""
        codes = self._all_steps if self._zero is None else self._all_steps + self._zero
        return codes.to(torch.int8)


def _step_bounds(
    zero: Tensor | None, code_range: tuple[int, int], count: int
) -> list[tuple[Any, Any]]:
    """Smallest and largest code minus zero-point of each column: numbers, or tensors [out]."""
    if zero is None:
        return [code_range] * count
    lowest, highest = (bound - zero for bound in code_range)
    return list(zip(lowest.unbind(), highest.unbind(), strict=True))
