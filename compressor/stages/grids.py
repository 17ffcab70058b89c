"""How rounders choose the scales of integer and float grids: values of their option `grid`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from compressor.stages.base import Need, ReportProblem
from compressor.types import WeightScheme

GridSearch = Literal["minmax", "mse", "imatrix", "neuqi", "clip"]
CompensatedSearch = Literal["minmax", "mse", "imatrix", "obs", "neuqi", "clip"]

READ_TEXT = ("imatrix", "neuqi", "clip")
"""Searches that weigh errors by the inputs of calibration text."""


def grid_need(grid: str) -> Need | None:
    """The calibration text that a search reads to weigh errors, if it does."""
    if grid not in READ_TEXT:
        return None
    return Need("grid", f"the {grid} grid weights errors by the inputs of calibration text")


def check_grid(grid: str, schemes: Mapping[str, WeightScheme], problems: ReportProblem) -> None:
    """`neuqi` is refused where there is no zero-point to search."""
    if grid != "neuqi":
        return
    other = [name for name, scheme in schemes.items() if scheme.symmetry != "asymmetric"]
    if other:
        problems(
            "grid",
            f"neuqi searches scale and zero-point jointly, and {other[0]} has no zero-point",
            "write `symmetry: asymmetric`, or `grid: imatrix`",
        )
