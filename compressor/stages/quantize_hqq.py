"""`quantize.hqq`: half-quadratic quantization, which needs no calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import ReportProblem, option, redefault
from compressor.stages.overrides import GroupSize
from compressor.stages.quantize_base import RounderConfig
from compressor.types import Symmetry

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class QuantizeHqq(RounderConfig):
    """Grids of the least Σ|w - ŵ|^p, p < 1, with whole zero-points, as engines read them.

    What HQQ gains with zero-points that are not whole, these do not give: on SmolLM2-135M (W4 g64)
    it came no nearer to the original than `quantize.rtn` with the same grid (LOG.md).
    """

    source: ClassVar[str] = "Badri & Shaji 2023, mobiusml.github.io/hqq_blog"

    method: Literal["quantize.hqq"] = "quantize.hqq"
    group_size: GroupSize = redefault(
        RounderConfig.model_fields["group_size"],
        64,
        effect="Smaller groups are more accurate and cost 20/group_size bits per 4-bit weight. "
        "Whole channels lose: 46.1 on average where plain rounding keeps 55.5 (Llama-2-7B, W4).",
        source="HQQ's default",
    )
    symmetry: Symmetry = redefault(
        RounderConfig.model_fields["symmetry"],
        "asymmetric",
        effect="`asymmetric` is HQQ's own; without a zero-point only the scale is fitted.",
    )
    grid: Literal["minmax", "mse"] = option(
        "minmax",
        "The grid to begin with; the result never has a larger Σ|w - ŵ|^p.",
        effect="`mse` begins, and ends, with more of the largest weights clipped.",
    )
    exponent: float = option(
        0.7,
        "p of the error |w - ŵ|^p that is minimised.",
        effect="The smaller, the less outliers count; 2 would be least squares.",
        source="HQQ's default",
        gt=0,
        le=1,
    )
    beta: float = option(
        10.0,
        "Weight of the quadratic term in the first iteration, errors being in steps of the grid.",
        effect="The smaller, the more weights count as outliers, whose error does not matter.",
        source="HQQ's default",
        gt=0,
    )
    growth: float = option(
        1.01, "Factor of `beta` from one iteration to the next.", source="HQQ's default", ge=1, le=2
    )
    iterations: int = option(
        20,
        "Iterations of the solver.",
        effect="The time of the stage is proportional.",
        source="HQQ's default",
        ge=1,
        le=1000,
    )

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """Refuses float grids; 2 bits and scales per channel unless forced."""
        schemes = self.schemes(architecture)
        if any(scheme.number != "int" for scheme in schemes.values()):
            problems(
                "method",
                "scales and zero-points are fitted to integer codes, not to floats",
                "use quantize.gptq or quantize.rtn for this grid",
            )
        self.refuse_two_bits("rounding without compensation", architecture, problems)
        if self.group_size == "channel" and not self.force:
            problems(
                "group_size",
                "HQQ with one scale for a whole channel loses to plain rounding",
                "write a group size such as 64, or `force: true`",
            )
        return super().plan(architecture, problems)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Round every target; no text is read."""
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import half_quadratic

        del calibration
        return round_model(self, half_quadratic(self), checkpoint, (), context)
