"""Round to nearest: a grid and nothing else. Needs no data unless the grid does."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.numerics.absmax import round_to_absmax
from compressor.numerics.grid import Search, fit_grid, round_to_grid
from compressor.numerics.grid_search import TRIES
from compressor.types import QTensor, WeightScheme


def rtn(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    search: Search = "minmax",
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    tries: int = TRIES,
) -> QTensor:
    """Every weight [out, in] on the nearest point of its grid; arguments as in `fit_grid`.

    There is nothing to search where scales are the largest magnitudes of their groups.
    """
    if scheme.number in ("nf4", "absmax"):
        return round_to_absmax(weight, scheme, scale_dtype)
    grid = fit_grid(
        weight,
        scheme,
        search=search,
        importance=importance,
        hessian=hessian,
        scale_dtype=scale_dtype,
        tries=tries,
    )
    return round_to_grid(weight, grid, scheme)
