"""Grids for weight matrices: where the scales and zero-points come from.

A grid gives every group of `group_size` inputs of one output channel a scale (and a zero-point).
Weights are then `scale * (codes - zero_point)`, computed in the dtype of the dense weight
(`compressor.types.QTensor`). Scales are rounded to what the format stores before any error is
measured, so the error that the search minimises is the error of the file on disk.

Float grids (fp8, MXFP4, NVFP4) have floats in the place of integers, symmetric about zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.floats import LARGEST, float_codes, round_to_float_
from compressor.numerics.grid_search import (
    TRIES,
    Objective,
    OutputObjective,
    Stored,
    clip_search,
    full_range_of,
)
from compressor.numerics.neuqi import joint_search
from compressor.types import QTensor, WeightScheme, step_sizes

Search = Literal["minmax", "mse", "imatrix", "neuqi", "clip"]
"""How scales (and zero-points) are found.

`minmax` covers the whole range of a group, as compressed-tensors does: half a step of error at most
(one step for full_range, on the side opposite to the largest element). `mse` minimises Σ(ŵ-w)² of
each group over shrunken ranges and then refits the scale to the codes by least squares; `imatrix`
weighs each input with its importance, which makes it the layer's expected output error under
uncorrelated inputs. `clip` counts correlations within the group in: its error is d H d over the
group's block of H, as in AWQ's clip search (Lin et al., "AWQ", 2023). All three start from
`minmax`, so they never exceed its error under their own objective. `neuqi` is for asymmetric grids:
it starts from what `imatrix` finds and searches scale and zero-point jointly.
"""

# Elements searched at once: a few buffers of this size stay in a core's second-level cache; on an
# accelerator, operations on fewer would wait for each other's launch.
_CHUNK_ELEMENTS = 1 << 17
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Grid:
    """Scales and zero-points of one matrix, or of a batch of them; `*` is its size or nothing.

    Attributes:
        scale: [*, out / rows, groups] in the dtype of the dense weight; finite and never zero.
        zero_point: int8 [*, out, groups] within the scheme's code range; None unless asymmetric.
        divisor: fp32 [*, 1], by which every scale is divided; None unless scales are `e4m3`.
    """

    scale: Tensor
    zero_point: Tensor | None
    divisor: Tensor | None = None

    @classmethod
    def of(cls, quantized: QTensor) -> Grid:
        """The grid that a matrix was rounded to."""
        return cls(quantized.scale, quantized.zero_point, quantized.divisor)

    def tensor(self, codes: Tensor, scheme: WeightScheme) -> QTensor:
        """Codes [*, out, in] on this grid."""
        return QTensor(codes, self.scale, self.zero_point, scheme, self.divisor)

    def steps(self, scheme: WeightScheme) -> Tensor:
        """What numbers are multiplied with, fp32 [*, out, groups]."""
        return step_sizes(self.scale, self.divisor, scheme).float()


def fit_grid(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    search: Search = "mse",
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    tries: int = TRIES,
) -> Grid:
    """Scales (and zero-points) for a weight matrix, or for each of a batch.

    Matrices that an engine fuses and that share a divisor (NVFP4) are fitted together, stacked.

    Args:
        weight: [*, out, in], finite; `*` is a batch or nothing.
        scheme: the grid; its group size divides `in`.
        search: how they are found; see `Search`.
        importance: [*, in], non-negative: E[x²] or the diagonal of the Hessian, in any unit.
            Required by `imatrix` and `neuqi`, ignored otherwise. Inputs with zero importance do
            not count; a group of nothing but such inputs is treated as `mse`.
        hessian: H [*, in, in], in any unit; read by `clip` only, which requires it. Only the blocks
            about its diagonal count. Inputs without energy are treated as by `imatrix`.
        scale_dtype: the dtype scales are stored in: bfloat16, float16 or float32.
        tries: ranges that a search tries, evenly spaced; its time is proportional.

    Raises:
        NumericalError: the weight, the importance or the Hessian holds NaN or infinity.
        ValueError: shapes or options that do not fit together.
    """
    _check_fit(weight, scheme, search)
    grouped = _grouped(weight.float(), scheme)
    weighted = search in ("imatrix", "neuqi")
    emphasis = _emphasis(importance, grouped, scheme) if weighted else None
    moment = _moment(hessian, weight, scheme) if search == "clip" else None
    stored = Stored.of(weight, scheme, scale_dtype)
    found = (
        _fit_rows(rows, stored, search, emphasis, moment, tries) for rows in _row_chunks(grouped)
    )
    scale, zero = (torch.cat(parts, -3).squeeze(-1) for parts in zip(*found, strict=True))
    return _as_stored(scale, zero, stored)


def _as_stored(scale: Tensor, zero: Tensor, stored: Stored) -> Grid:
    """The grid of scales, as they are multiplied with, and zero-points, fp32 [*, rows, groups]."""
    if stored.divisor is not None:
        # Dividing may have cost a last bit.
        exact = round_to_float_(scale * stored.divisor.unsqueeze(-1), 8)
        return Grid(exact.to(stored.dtype), None, stored.divisor)
    if stored.scheme.symmetry != "asymmetric":
        return Grid(scale.to(stored.dtype), None)
    return Grid(scale.to(stored.dtype), zero.to(torch.int8))


def round_to_grid(weight: Tensor, grid: Grid, scheme: WeightScheme) -> QTensor:
    """The nearest code of every weight; ties go to the even multiple of the scale.

    Args:
        weight: [*, out, in], finite.
        grid: made for matrices of this shape and scheme.
        scheme: the grid's scheme.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    _check_finite(weight, "weight matrix")
    steps = grid.steps(scheme)
    grouped = weight.float().reshape(*steps.shape, -1) / steps.unsqueeze(-1)
    if scheme.number == "float":
        numbers = round_to_float_(grouped, scheme.bits).flatten(-2)
        return grid.tensor(float_codes(numbers, scheme.bits), scheme)
    zero = 0.0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
    lowest, highest = scheme.code_range
    codes = grouped.round_().add_(zero).clamp_(lowest, highest)
    return grid.tensor(codes.to(torch.int8).flatten(-2), scheme)


def _check_fit(weight: Tensor, scheme: WeightScheme, search: Search) -> None:
    out, in_features = weight.shape[-2:]
    if not 2 <= scheme.bits <= 8:
        raise ValueError(f"codes are 2 to 8 bits wide, not {scheme.bits}")
    if scheme.group_size is not None and in_features % scheme.group_size:
        raise ValueError(f"group size {scheme.group_size} does not divide {in_features} inputs")
    _check_finite(weight, "weight matrix")
    if scheme.number == "float" and (scheme.bits not in LARGEST or scheme.symmetry != "symmetric"):
        raise ValueError(f"floats have 4 or 8 bits and no zero-point, unlike {scheme}")
    if out % scheme.rows:
        raise ValueError(f"{scheme.rows} channels that share a scale do not divide {out} outputs")
    if search == "neuqi" and scheme.symmetry != "asymmetric":
        raise ValueError(f"search 'neuqi' looks for zero-points, which {scheme} has not")


def _grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Everything that shares a scale side by side: [*, out / rows, groups, rows · group size]."""
    *batch, out, in_features = weight.shape
    groups = scheme.groups(in_features)
    if scheme.rows == 1:
        return weight.reshape(*batch, out, groups, -1)
    blocks = weight.reshape(*batch, out // scheme.rows, scheme.rows, groups, -1)
    return blocks.transpose(-3, -2).flatten(-2)


def _check_finite(tensor: Tensor, what: str) -> None:
    if not all(torch.isfinite(bound) for bound in tensor.aminmax()):  # one pass, no copy
        raise NumericalError(f"the {what} holds NaN or infinity")


def _emphasis(importance: Tensor | None, grouped: Tensor, scheme: WeightScheme) -> Tensor:
    """Square roots of the importance [*, 1, groups, size], the largest of each group being 1."""
    if importance is None:
        raise ValueError("a search that weighs errors needs the importance of every input")
    _check_finite(importance, "importance of the inputs")
    *batch, _, groups, size = grouped.shape
    if importance.shape != (*batch, groups * size // scheme.rows) or (importance < 0).any():
        raise ValueError("importance is one non-negative number for every input")
    by_group = importance.to(grouped).reshape(*batch, groups, -1)
    by_group = torch.cat([by_group] * scheme.rows, -1).unsqueeze(-3)
    largest = by_group.amax(-1, keepdim=True)
    return torch.where(largest > 0, by_group / largest, 1.0).sqrt()


def _moment(hessian: Tensor | None, weight: Tensor, scheme: WeightScheme) -> Tensor:
    """The blocks of H about its diagonal, [*, groups, size, size], fp32, the largest variance 1."""
    *batch, _, width = weight.shape
    if hessian is None or hessian.shape != (*batch, width, width):
        raise ValueError("search 'clip' needs the Hessian of all inputs")
    groups = scheme.groups(width)
    size = width // groups
    squares = hessian.reshape(*batch, groups, size, groups, size)
    blocks = squares.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).float().contiguous()
    _check_finite(blocks, "Hessian of the inputs")
    largest = blocks.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    unit = torch.eye(size, device=hessian.device)
    return torch.where(largest > 0, blocks / largest, unit)


def _row_chunks(grouped: Tensor) -> Iterator[Tensor]:
    """The same rows of all matrices at a time."""
    most = _CHUNK_ELEMENTS if grouped.device.type == "cpu" else _CHUNK_ELEMENTS_ELSEWHERE
    rows = max(1, most * grouped.shape[-3] // grouped.numel())
    yield from torch.split(grouped, rows, -3)


def _fit_rows(
    weight: Tensor,
    stored: Stored,
    search: Search,
    emphasis: Tensor | None,
    moment: Tensor | None,
    tries: int,
) -> tuple[Tensor, Tensor]:
    """Scale, as it is multiplied with, and zero-point in fp32, both [*, rows, groups, 1]."""
    widest, zero = full_range_of(weight, stored.scheme)
    if search == "minmax":
        return stored.scale(widest), zero
    peak = weight.abs().amax(-1, keepdim=True)
    normal = torch.where(peak > 0, 1 / peak.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    emphasis = normal if emphasis is None else normal * emphasis
    objective = Objective(weight, emphasis, stored)
    if moment is not None:
        objective = OutputObjective(weight, emphasis, stored, moment)
    best = clip_search(objective, widest, zero, tries)
    if search == "neuqi":
        best = joint_search(objective, best, widest)
    return best[1], best[2]
