"""`prune.obs`: remove heads and channels, and let the others make up for them; no training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, option
from compressor.stages.prune_base import WidthConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneObs(WidthConfig):
    """Optimal Brain Surgeon over heads and channels: the least loss that no training reaches.

    Block by block, attention before the feed-forward half, on inputs that passed through what is
    pruned already: the unit whose loss the others can make up for best goes, they make up for it
    by least squares, and so on.
    """

    source: ClassVar[str] = (
        "Hassibi & Stork 1993; ZipLM, arXiv:2302.04089; SlimGPT, arXiv:2412.18110; OSSCAR, "
        "arXiv:2403.12983"
    )

    method: Literal["prune.obs"] = "prune.obs"
    damping: float = option(
        0.5,
        "Ridge of the least squares, as a share of the mean of the Hessian's diagonal.",
        effect="Larger trusts the calibration text less and compensates less. Calibrated on prose "
        "alone, 0.05 cost code three times what 0.5 did, and on all kinds of text it was no "
        "better; published pruners take 0.01.",
        source="OSSCAR; LOG.md, pruning",
        gt=0,
        le=100,
    )
    shrinkage: float = option(
        0.0,
        "Share by which correlations between inputs are scaled down: 0 trusts the calibration "
        "text, 1 keeps its variances only, which ranks like `wanda` and compensates nothing.",
        effect="A guard for kinds of text that the calibration lacks.",
        source="Ledoit & Wolf 2004, with the diagonal as the target",
        ge=0,
        le=1,
    )
    propagate: float = option(
        0.5,
        "Share by which every reader also aims to undo what pruning has done to the residual "
        "stream before it: 0 aims at its own former outputs, 1 at the parent's residual stream.",
        effect="Runs the parent beside: twice the forward passes and activations. Readers that "
        "lose nothing are refitted too. Needs pre-norm blocks; experts aim at their own outputs.",
        source="as in Qronos, arXiv:2505.11695, with the stream in place of the layer; LOG.md",
        ge=0,
        le=1,
    )

    @property
    def label(self) -> str:
        """Such as `OBS -20 %`."""
        return "OBS" if self.ratio is None else f"OBS -{self.ratio:.0%}"

    def calibration_need(self) -> Need | None:
        """Compensation needs the second moments of the inputs, always."""
        return Need("method", "prune.obs measures its Hessians on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Prune every block on inputs that passed through the pruned ones before it."""
        from compressor.model.architecture import Architecture
        from compressor.model.files import read_config
        from compressor.stages.pruning import Job, prune_widths
        from compressor.stages.unit_choice import compensated

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        architecture = Architecture.from_config(read_config(checkpoint))
        job = Job(
            self.target(architecture),
            compensated(self.damping, self.shrinkage, self.propagate),
            calibration.batches,
            refits=True,
            parent=checkpoint if self.propagate > 0 and architecture.prenorm else None,
        )
        return prune_widths(job, checkpoint, context)
