"""The option `grid` of the rounders: what the plan refuses, and what a run does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError
from compressor.formats.codes import codes_name, read_codes
from compressor.stages.base import StageConfig
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import QTensor
from tests.runs import SMOL, plan, refusals
from tests.stages.test_rounding import QUERY, checkpoint, stage_run

TEXT = "calibration: {samples: 2, length: 64}\n"
ROUNDERS: list[type[Any]] = [QuantizeRtn, QuantizeGptq]


def recipe(method: str, *options: str) -> str:
    lines = [f"  - method: {method}", "    group_size: 64", *(f"    {line}" for line in options)]
    return "\n".join([TEXT + "stages:", *lines, ""])


def codes_of(stage: StageConfig, folder: Path) -> QTensor:
    """Of the first block's queries, after a run on a small random model."""
    parent = folder / "parent"
    if not parent.exists():
        checkpoint(parent)
    out = folder / f"{stage.method}-{len(list(folder.iterdir()))}"
    result, _ = stage_run(stage, parent, out)  # type: ignore[arg-type]
    assert not result.fallbacks
    return read_codes(out / codes_name(0))[QUERY]


@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.gptq"])
@pytest.mark.parametrize("symmetry", ["symmetric", "full_range"])
def test_neuqi_wants_a_zero_point(tmp_path: Path, method: str, symmetry: str) -> None:
    found = refusals(tmp_path, recipe(method, "grid: neuqi", f"symmetry: {symmetry}"))
    assert len(found) == 1
    assert "q_proj has no zero-point" in found[0].message
    assert "asymmetric" in found[0].hint
    assert found[0].line == 5


def test_neuqi_wants_a_zero_point_in_every_matrix(tmp_path: Path) -> None:
    mixed = "overrides: [{pattern: down, symmetry: full_range}]"
    lines = recipe("quantize.gptq", "grid: neuqi", "symmetry: asymmetric", mixed)
    assert "down_proj has no zero-point" in refusals(tmp_path, lines)[0].message
    whole = recipe("quantize.gptq", "grid: neuqi", "symmetry: asymmetric")
    assert plan(tmp_path, whole, SMOL).stages[0].matrices == 210


def test_float_formats_have_no_zero_points(tmp_path: Path) -> None:
    lines = TEXT + "stages:\n  - {method: quantize.rtn, weights: nvfp4, grid: neuqi}\n"
    assert "has no zero-point" in refusals(tmp_path, lines)[0].message


@pytest.mark.parametrize("rounder", ROUNDERS)
def test_the_search_reaches_the_codes(rounder: type[Any], tmp_path: Path) -> None:
    """And the same run again gives the same codes."""
    common = {"group_size": 16, "symmetry": "asymmetric", "bits": 3}
    imatrix = codes_of(rounder(grid="imatrix", **common), tmp_path)
    neuqi = codes_of(rounder(grid="neuqi", **common), tmp_path)
    again = codes_of(rounder(grid="neuqi", **common), tmp_path)
    assert neuqi.zero_point is not None
    assert again.zero_point is not None
    assert not torch.equal(neuqi.scale, imatrix.scale)
    for one, other in zip(
        (neuqi.codes, neuqi.scale, neuqi.zero_point),
        (again.codes, again.scale, again.zero_point),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rounder", ROUNDERS)
def test_an_output_search_reads_the_text(rounder: type[Any], tmp_path: Path) -> None:
    """It gives other scales than the search that ignores correlations, twice the same."""
    common = {"group_size": 16, "bits": 3}
    imatrix = codes_of(rounder(grid="imatrix", **common), tmp_path)
    clip = codes_of(rounder(grid="clip", **common), tmp_path)
    again = codes_of(rounder(grid="clip", **common), tmp_path)
    assert not torch.equal(clip.scale, imatrix.scale)
    assert torch.equal(clip.scale, again.scale)
    assert torch.equal(clip.codes, again.codes)


def test_an_output_search_lowers_the_loss_of_rounding(tmp_path: Path) -> None:
    """Of all matrices of a model together, on the text it read, rounded to nearest."""
    parent = checkpoint(tmp_path / "parent")
    losses = {}
    for grid in ("minmax", "imatrix", "clip"):
        stage = QuantizeRtn(bits=3, group_size=16, grid=grid)  # type: ignore[arg-type]
        result, _ = stage_run(stage, parent, tmp_path / grid)
        losses[grid] = sum(metric.loss for metric in result.metrics)
    assert losses["clip"] < losses["imatrix"] < losses["minmax"]


@pytest.mark.parametrize("grid", ["neuqi", "clip"])
def test_searches_that_read_text_need_some(tmp_path: Path, grid: str) -> None:
    lines = recipe("quantize.rtn", f"grid: {grid}", "symmetry: asymmetric").removeprefix(TEXT)
    with pytest.raises(RecipeError, match="no `calibration`"):
        plan(tmp_path, lines, SMOL)
