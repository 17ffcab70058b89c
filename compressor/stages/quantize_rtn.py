"""`quantize.rtn`: round every weight to the nearest code of a searched grid. Needs no data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.grids import GridSearch, check_grid, grid_need
from compressor.stages.quantize_base import RounderConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class QuantizeRtn(RounderConfig):
    """Round to nearest. The simplest rounder and the baseline for all others."""

    source: ClassVar[str] = "Krishnamoorthi 2018, arXiv:1806.08342; grid search: arXiv:2210.17323"

    method: Literal["quantize.rtn"] = "quantize.rtn"
    grid: GridSearch = option(
        "mse",
        "How the scale of a group is chosen: `minmax` covers every weight, `mse` shrinks the range "
        "to the smallest rounding error, `imatrix` weights that error by the mean square of each "
        "input, `clip` takes the error of what the group adds to the output, correlations of "
        "inputs included, and `neuqi`, for asymmetric grids only, searches scale and zero-point "
        "jointly for the error of `imatrix`.",
        effect="The last three read calibration text, and where some inputs are far larger than "
        "others they gain much: SmolLM2-135M at 4 bits came half as far from the original as with "
        "`minmax`. `mse` was better than `minmax` on the built-in model and worse on that one, "
        "where it clips weights of the largest inputs.",
        source="clip search of GPTQ, AutoRound and AWQ (arXiv:2306.00978); NeUQI, "
        "arXiv:2505.17595; LOG.md, grids",
    )

    def calibration_need(self) -> Need | None:
        """Only grids that weigh errors look at activations."""
        return grid_need(self.grid)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """Bits per matrix after the stage; refuses 2 bits unless forced."""
        check_grid(self.grid, self.schemes(architecture), problems)
        self.refuse_two_bits("round-to-nearest without compensation", architecture, problems)
        return super().plan(architecture, problems)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Round every target; inputs are measured only if the grid weighs them."""
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import nearest

        batches = calibration.batches if calibration and self.calibration_need() else ()
        return round_model(self, nearest(self.grid), checkpoint, batches, context)
