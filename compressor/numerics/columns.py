"""A grid seen column by column, for solvers that visit inputs in an order of their own.

Everything is transposed, [in, out], so that one column of the matrix is one contiguous row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
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
        scale = self._scale[group].contiguous()
        if self._scheme.number == "float":
            return FloatLeaf(scale, self._scheme, self._dtype)
        zero = None if self._zero is None else self._zero[group].contiguous()
        return IntLeaf(scale, zero, self._scheme, self._dtype)


class Leaf(ABC):
    """A few columns of a grid with the buffers to round them one at a time.

    Args:
        scale: what numbers are multiplied with, fp32 [columns, out].
        dtype: of the dense weight.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        self._all_steps = torch.empty_like(scale)
        self._steps = self._all_steps.unbind()
        self._all_scale = scale
        self._scale = scale.unbind()
        self._point = torch.empty_like(scale[0])
        self._dtype = dtype
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

    def settle(
        self, columns: Tensor, pull: Tensor, *, aim: Tensor | None = None, old: Tensor | None = None
    ) -> Tensor:
        """Round all columns in turn, each after it has got its share of what came of those before.

        Column i becomes c_i + Σ_{k<i} pull_ik e_k and is rounded to q_i; e_i is a_i - q_i - o_i.

        Args:
            columns: c, fp32 [columns, out]; used up.
            pull: fp32 [columns, columns]; what is not below the diagonal does not matter.
            aim: a [columns, out]; by default what the column has become.
            old: o [columns, out]; by default 0.

        Returns:
            e [columns, out]; without an aim it is in the place of `columns`.
        """
        if columns.is_cuda and (found := self._settle_at_once(columns, pull, aim, old)) is not None:
            return found
        errors = columns if aim is None else torch.empty_like(columns)
        for i, (column, error) in enumerate(zip(columns, errors, strict=True)):
            if i:
                column.addmv_(errors[:i].T, pull[i, :i])
            torch.sub(column if aim is None else aim[i], self.nearest(i, column), out=error)
            if old is not None:
                error.sub_(old[i])
        return errors

    def _settle_at_once(
        self, columns: Tensor, pull: Tensor, aim: Tensor | None, old: Tensor | None
    ) -> Tensor | None:
        """`settle` in one kernel, where there is one: launches would take longer than the work."""
        del columns, pull, aim, old
        return None

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
        self._range = scheme.code_range
        self._bounds = _step_bounds(zero, scheme.code_range, len(scale))

    def _settle_at_once(
        self, columns: Tensor, pull: Tensor, aim: Tensor | None, old: Tensor | None
    ) -> Tensor | None:
        if not find_spec("triton"):  # comes with torch for CUDA, but not on every system
            return None
        from compressor.numerics.kernels import IntColumns, settle

        here = IntColumns(self._all_scale, self._zero, self._range, self._dtype, self._all_steps)
        return settle(columns, pull, here, aim=aim, old=old)

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
