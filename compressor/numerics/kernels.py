"""Kernels for accelerators, where many small operations wait for each other's launch.

GPTQ and coordinate descent round one column after the other, with half a dozen operations each on
as many numbers as a matrix has rows. A leaf of them is one kernel here; rows do not interact, so
that every program takes some of them, of one matrix of the batch, through all columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.numerics.columns import Points

_ROWS = 64  # of the matrix, for one program: with 32 columns, 16 numbers a thread
_STORED: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Added to a number of less than 2²² and taken away again, it leaves the nearest integer, even at
# ties: fp32 has no bits for fractions there.
_INTEGERS: tl.constexpr = tl.constexpr(12582912.0)


def settle(
    columns: Tensor,
    pull: Tensor,
    points: Points,
    *,
    aim: Tensor | None,
    old: Tensor | None,
    drift: Tensor | None,
    met: Tensor | None,
) -> Tensor:
    """`columns.Leaf.settle` in one launch."""
    errors = columns if aim is None else torch.empty_like(columns)
    given = [columns, pull, points.scale, points.zero, aim, old, drift, met, errors, points.steps]
    assert all(tensor is None or tensor.is_contiguous() for tensor in given)
    count, width, members = len(columns), columns.shape[-1], columns[0].numel() // columns.shape[-1]
    _settle[(triton.cdiv(width, _ROWS), members)](
        *given,
        width,
        *map(float, points.span),
        COUNT=count,
        PADDED=triton.next_power_of_2(count),
        ROWS=_ROWS,
        FLOAT=points.float_bits,
        STORED=_STORED[points.stored],
    )
    return errors


@triton.jit  # type: ignore[untyped-decorator]
def _as_number(step, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest integer, or number of e2m1 or e4m3, even at ties, of what is in range already."""
    if FLOAT is None:
        return (step + _INTEGERS) - _INTEGERS
    power = (step.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Numbers from 2^e to 2^(e+1) are 2^e / 2^mantissa apart, those below the smallest e like there.
    apart = tl.maximum(power, 1.0) * 0.5 if FLOAT == 4 else tl.maximum(power, 2.0**-6) * 0.125
    return ((step / apart + _INTEGERS) - _INTEGERS) * apart


@triton.jit  # type: ignore[untyped-decorator]
def _as_stored(point, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 with the bits that a dtype keeps, to the nearest, ties to even."""
    if tl.bfloat16 == STORED:  # by hand: Triton's interpreter would cut off
        bits = point.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
    return point.to(STORED).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _settle(  # type: ignore[no-untyped-def]
    columns,
    pull,
    scale,
    zero,
    aim,
    old,
    drift,
    met,
    errors,
    steps,
    width,
    lowest,
    highest,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
    STORED: tl.constexpr,
):
    """Columns stay in registers; each one's error goes to those that are still open."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    member = tl.program_id(1)
    index = tl.arange(0, PADDED)
    here = row < width
    inside = (index[:, None] < COUNT) & here[None, :]
    apart = tl.num_programs(1) * width  # from a column to the next
    first = member * width + row
    still = tl.load(columns + index[:, None] * apart + first[None, :], mask=inside, other=0.0)
    shares = member * COUNT * COUNT + index * COUNT
    for i in range(COUNT):
        place = i * apart + first
        column = tl.sum(tl.where(index[:, None] == i, still, 0.0), 0)
        size = tl.load(scale + place, mask=here, other=1.0)
        low, high = lowest, highest
        if zero is not None:
            shift = tl.load(zero + place, mask=here, other=0.0)
            low, high = lowest - shift, highest - shift
        step = tl.minimum(tl.maximum(tl.div_rn(column, size), low), high)
        step = _as_number(step, FLOAT)
        wanted = column
        if aim is not None:
            wanted = tl.load(aim + place, mask=here, other=0.0)
        error = wanted - _as_stored(step * size, STORED)
        if old is not None:
            error -= tl.load(old + place, mask=here, other=0.0)
        tl.store(errors + place, error, mask=here)
        tl.store(steps + place, step, mask=here)
        later = (index > i) & (index < COUNT)
        share = tl.load(pull + shares + i, mask=later, other=0.0)
        still += share[:, None] * error[None, :]
        if drift is not None:
            tl.store(met + place, column, mask=here)
            share = tl.load(drift + shares + i, mask=later, other=0.0)
            still += share[:, None] * column[None, :]
