"""`transform.smoothquant`: move outliers of activations into weights, for 8-bit activations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.edges import NORM_EDGES, EdgeKind
from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.transform_base import ScalingConfig, require_edges

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class TransformSmoothquant(ScalingConfig):
    """SmoothQuant: the function stays the same, activations lose their outliers."""

    source: ClassVar[str] = "Xiao et al. 2022, SmoothQuant, arXiv:2211.10438"

    method: Literal["transform.smoothquant"] = "transform.smoothquant"
    alpha: float = option(
        0.5,
        "How much of the range moves: s = max|x|^α / max|W|^(1-α).",
        effect="1 makes all channels of the activations alike, 0 those of the weights; models with "
        "large outliers want 0.8.",
        source="SmoothQuant, equation 4 and section 5.1",
        ge=0,
        le=1,
    )
    tokens: int = option(
        1024,
        "Tokens of calibration text on which the report compares 8-bit outputs before and after, "
        "in whole rows; the scales themselves follow the peaks on all of the text.",
        effect="On the report only.",
        ge=1,
    )

    @property
    def label(self) -> str:
        """Such as `SmoothQuant 0.5`."""
        return f"SmoothQuant {self.alpha:g}"

    def edge_kinds(self, architecture: Architecture) -> tuple[EdgeKind, ...]:
        """Edges from a norm only: a matrix would pass the outliers on to what precedes it."""
        del architecture
        return NORM_EDGES

    def calibration_need(self) -> Need | None:
        """Scales follow the inputs, always."""
        return Need("method", "transform.smoothquant measures peaks on calibration text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses families without a norm in front of a matrix."""
        require_edges(architecture, self.edge_kinds(architecture), "method", "", problems)
        return architecture

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Fold the scales block by block, on the inputs of the model as it is."""
        from compressor.stages.scale_search import SmoothChooser
        from compressor.stages.scaling import scale_model

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return scale_model(self, SmoothChooser(self), checkpoint, calibration.batches, context)
