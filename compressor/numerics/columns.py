"""A grid seen column by column, for solvers that visit inputs in an order of their own.

Everything is transposed, [in, *, out], so that one column of the matrix is one contiguous row; `*`
is the size of a batch of matrices, each with an order of its own, or nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from compressor.numerics.floats import LARGEST, float_codes, round_to_float_
from compressor.numerics.grid import Grid
from compressor.numerics.hessian import add_product_
from compressor.types import WeightScheme


def columns_first(matrix: Tensor) -> Tensor:
    """[*, out, in] as [in, *, out], a view."""
    return matrix.movedim(-1, 0)


def columns_last(matrix: Tensor) -> Tensor:
    """[in, *, out] as [*, out, in], contiguous."""
    return matrix.movedim(0, -1).contiguous()


def at(order: Tensor) -> tuple[Tensor, ...]:
    """The index that takes from columns [in, *, out] those in an order [*, n], as [n, *, out].

    What is taken lies in memory as its index does, hence the copy: kernels want it contiguous.
    """
    if order.ndim == 1:
        return (order,)
    return order.T.contiguous(), torch.arange(len(order), device=order.device)


def add_columns_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [n, *, out] += left [*, n, k] times right [k, *, out], in place."""
    add_product_(total.movedim(0, -2), left, right.movedim(0, -2))


def in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [*, in, in] in an order [*, in], a copy."""
    rows, columns = order.unsqueeze(-1), order.unsqueeze(-2)
    if order.ndim == 1:
        return matrix[rows, columns]
    return matrix[torch.arange(len(order), device=order.device).view(-1, 1, 1), rows, columns]


class GridColumns:
    """Scales and zero-points by visited column.

    Args:
        grid: [*, out, groups].
        scheme: its scheme.
        order: int64 [*, in]; entry i is the original column visited i-th. Columns keep the group
            they are stored in.
    """

    def __init__(self, grid: Grid, scheme: WeightScheme, order: Tensor) -> None:
        self._group = order // (order.shape[-1] // grid.scale.shape[-1])
        self._scale = columns_first(grid.steps(scheme))
        zero = grid.zero_point
        self._zero = None if zero is None else columns_first(zero.float())
        self._scheme = scheme
        self._dtype = grid.scale.dtype

    def leaf(self, start: int, stop: int) -> Leaf:
        """The columns visited from `start` up to `stop`."""
        group = at(self._group[..., start:stop])
        scale = self._scale[group].contiguous()
        if self._scheme.number == "float":
            return FloatLeaf(scale, self._scheme, self._dtype)
        zero = None if self._zero is None else self._zero[group].contiguous()
        return IntLeaf(scale, zero, self._scheme, self._dtype)


@dataclass(frozen=True)
class Points:
    """What may be stored in a few columns: scale × number.

    Attributes:
        scale: fp32 [columns, *, out].
        zero: zero-points, fp32 [columns, *, out], or None.
        span: smallest and largest code of integers, or number of floats.
        float_bits: width of floats; None for integers.
        stored: dtype that points are rounded to.
        steps: gets numbers, codes minus zero-points, fp32 [columns, *, out].
    """

    scale: Tensor
    zero: Tensor | None
    span: tuple[float, float]
    float_bits: int | None
    stored: torch.dtype
    steps: Tensor


class Leaf(ABC):
    """A few columns of a grid with the buffers to round them one at a time.

    Args:
        scale: what numbers are multiplied with, fp32 [columns, *, out].
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
        """The grid point nearest to `column` [*, out], as stored, in fp32, until the next call.

        Runs once per column, so every call into torch counts.
        """
        steps, point = self._steps[index], self._point
        torch.div(column, self._scale[index], out=steps)
        self._round(index, steps)
        torch.mul(steps, self._scale[index], out=point)
        return point if self._stored is None else point.copy_(self._stored.copy_(point))

    def settle(
        self,
        columns: Tensor,
        pull: Tensor,
        *,
        aim: Tensor | None = None,
        old: Tensor | None = None,
        drift: Tensor | None = None,
        met: Tensor | None = None,
    ) -> Tensor:
        """Round all columns in turn, each after it has got its share of what came of those before.

        Column i becomes m_i = c_i + Σ_{k<i} (pull_ik e_k + drift_ik m_k) and is rounded to q_i; e_i
        is a_i - q_i - o_i.

        All tensors are contiguous; kernels read them as if they were.

        Args:
            columns: c, fp32 [columns, *, out]; used up.
            pull: fp32 [*, columns, columns]; what is not below the diagonal does not matter.
            aim: a [columns, *, out]; by default m.
            old: o [columns, *, out]; by default 0.
            drift: like `pull`; by default 0.
            met: gets m [columns, *, out]; goes with `drift`.

        Returns:
            e [columns, *, out]; without an aim it is in the place of `columns`.
        """
        given = (columns, pull, aim, old, drift, met)
        assert all(tensor is None or tensor.is_contiguous() for tensor in given)
        # Launches would take longer than the work. Not every system with CUDA has Triton.
        if columns.is_cuda and find_spec("triton"):
            from compressor.numerics.kernels import settle

            return settle(columns, pull, self.points(), aim=aim, old=old, drift=drift, met=met)
        errors = columns if aim is None else torch.empty_like(columns)
        for i, (column, error) in enumerate(zip(columns, errors, strict=True)):
            if i:
                _add_shares_(column, errors[:i], pull[..., i, :i])
            if drift is not None and met is not None:
                if i:
                    _add_shares_(column, met[:i], drift[..., i, :i])
                met[i] = column
            torch.sub(column if aim is None else aim[i], self.nearest(i, column), out=error)
            if old is not None:
                error.sub_(old[i])
        return errors

    @abstractmethod
    def points(self) -> Points:
        """The grid, as kernels read it."""

    @abstractmethod
    def _round(self, index: int, steps: Tensor) -> None:
        """Make weights over their scale [*, out] numbers of the grid, in place."""

    @abstractmethod
    def codes(self) -> Tensor:
        """int8 [columns, *, out], once all of them have been rounded."""


class IntLeaf(Leaf):
    """Columns whose numbers are integers, shifted by a zero-point or not."""

    def __init__(
        self, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, dtype: torch.dtype
    ) -> None:
        super().__init__(scale, dtype)
        self._zero = zero
        self._range = scheme.code_range
        self._bounds = _step_bounds(zero, scheme.code_range, len(scale))

    def points(self) -> Points:
        """The grid, as kernels read it."""
        return Points(self._all_scale, self._zero, self._range, None, self._dtype, self._all_steps)

    def _round(self, index: int, steps: Tensor) -> None:
        torch.clamp(steps.round_(), *self._bounds[index], out=steps)

    def codes(self) -> Tensor:
        """int8 [columns, *, out], once all of them have been rounded."""
        codes = self._all_steps if self._zero is None else self._all_steps + self._zero
        return codes.to(torch.int8)


class FloatLeaf(Leaf):
    """Columns whose numbers are small floats."""

    def __init__(self, scale: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> None:
        super().__init__(scale, dtype)
        self._bits = scheme.bits

    def points(self) -> Points:
        """The grid, as kernels read it."""
        largest = LARGEST[self._bits]
        span = (-largest, largest)
        return Points(self._all_scale, None, span, self._bits, self._dtype, self._all_steps)

    def _round(self, index: int, steps: Tensor) -> None:
        del index
        round_to_float_(steps, self._bits)

    def codes(self) -> Tensor:
        """int8 [columns, *, out], once all of them have been rounded."""
        return float_codes(self._all_steps, self._bits)


def _add_shares_(column: Tensor, before: Tensor, shares: Tensor) -> None:
    """column [*, out] += Σ_k shares_k before_k, of columns [k, *, out] and shares [*, k]."""
    if column.ndim == 1:
        column.addmv_(before.T, shares)
    else:
        add_columns_(column.unsqueeze(0), shares.unsqueeze(-2), before)


def _step_bounds(
    zero: Tensor | None, code_range: tuple[int, int], count: int
) -> list[tuple[Any, Any]]:
    """Smallest and largest code minus zero-point of each column: numbers, or tensors [*, out]."""
    if zero is None:
        return [code_range] * count
    lowest, highest = (bound - zero for bound in code_range)
    return list(zip(lowest.unbind(), highest.unbind(), strict=True))
