"""Coordinate descent on codes: revisit every column, given all the others.

GPTQ fixes a column once, with only the columns after it to make up for the error. Going over the
columns again with the final values of all others known lowers d H dᵀ further and can never raise
it, because each step is the exact minimiser over one code (Behdin et al., "QuantEase", 2023,
eq. 9). It works after any rounder.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compressor.numerics.columns import (
    GridColumns,
    add_columns_,
    at,
    columns_first,
    columns_last,
    in_order,
)
from compressor.numerics.grid import Grid
from compressor.numerics.hessian import full_precision
from compressor.types import QTensor


def coordinate_descent(
    weight: Tensor,
    quantized: QTensor,
    hessian: Tensor,
    *,
    order: Tensor,
    sweeps: int,
    block_size: int = 64,
) -> QTensor:
    """Better codes on the same grid.

    Args:
        weight: the target [*, out, in]; `*` is a batch or nothing.
        quantized: where to start.
        hessian: fp32 [*, in, in], damped: symmetric with a positive diagonal.
        order: int64 [*, in], the order in which columns are visited.
        sweeps: times that every column is revisited; each costs 2·out·in² operations.
        block_size: columns between two matrix products. Changes speed only.
    """
    pull = in_order(hessian, order)
    diagonal = pull.diagonal(dim1=-2, dim2=-1)
    pull.div_(diagonal.clone().unsqueeze(-1))
    diagonal.zero_()
    target = columns_first(weight.float()).contiguous()[at(order)]
    error = target - columns_first(quantized.dequantize().float()).contiguous()[at(order)]
    columns = GridColumns(Grid.of(quantized), quantized.scheme, order)
    codes = columns_first(quantized.codes).contiguous()
    with full_precision():
        for _ in range(sweeps):
            for start in range(0, len(codes), block_size):
                stop = min(start + block_size, len(codes))
                found = _revisit(target, error, pull, columns, start, stop)
                codes[at(order[..., start:stop])] = found
    return replace(quantized, codes=columns_last(codes))


def _revisit(
    target: Tensor, error: Tensor, pull: Tensor, columns: GridColumns, start: int, stop: int
) -> Tensor:
    """Codes of one leaf; its rows of `error` (w - ŵ) are brought up to date.

    The best real value of column j is w_j + Σ_{k≠j} H_jk/H_jj (w_k - ŵ_k). One product gives that
    for the whole leaf; changes within the leaf are added as they happen.
    """
    wanted = target[start:stop].clone()
    add_columns_(wanted, pull[..., start:stop, :], error)
    within = pull[..., start:stop, start:stop].contiguous()
    leaf = columns.leaf(start, stop)
    changes = leaf.settle(wanted, within, aim=target[start:stop], old=error[start:stop])
    error[start:stop] += changes
    return leaf.codes()
