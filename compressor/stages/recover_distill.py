"""`recover.distill`: train a pruned model on the predictions of the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import option
from compressor.stages.train_base import TrainConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.base import ReportProblem
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class RecoverDistill(TrainConfig):
    """Knowledge distillation: the loss is the distance to the original model's predictions.

    The whole model, the original and the optimizer's moments are in memory, unlike in other
    stages. Training that is interrupted goes on from its last checkpoint to the same bytes.
    """

    source: ClassVar[str] = (
        "Hinton et al. 2015, arXiv:1503.02531; as recovery: Minitron, arXiv:2407.14679; `dro`: "
        "DRPruning, arXiv:2411.14055"
    )

    method: Literal["recover.distill"] = "recover.distill"

    adapters: int | None = option(
        None,
        "Rank of low-rank adapters that are trained in place of the weights, and merged.",
        effect="Gradients and moments shrink to the adapters'; so does what can be recovered. "
        "Wants some ten times the `learning_rate`.",
        source="LoRA, arXiv:2106.09685",
        ge=1,
    )

    @property
    def label(self) -> str:
        """Such as `Distilled 1.0M tokens`, or fewer where a time box may end it."""
        size = f"{self.tokens / 1e6:.1f}M" if self.tokens >= 10**5 else f"{self.tokens:,}"
        most = "" if self.minutes is None else "up to "
        return f"Distilled {most}{size} tokens" + (" (DRO)" if self.sampler == "dro" else "")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses what would fail after an hour."""
        self.check_training(architecture, problems)
        return architecture

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """Everything learns."""
        del before
        return after.matrices

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Train in fp32 master weights, and round once to the checkpoint's dtype."""
        from compressor.stages.distilling import distill

        return distill(self, checkpoint, calibration, context)
