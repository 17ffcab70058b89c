"""`prune.obs`: remove heads and channels, and let the others make up for them; no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.shape import Shape, shape_of
from compressor.stages.base import Need, option
from compressor.stages.prune_base import WidthConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.stages.context import StageContext
    from compressor.stages.mixing import Mix
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
    align: float = option(
        0.5,
        "Share by which the matrices that read the residual stream are fitted, by least squares, "
        "to compute from what pruning has left of it what they did from the parent's.",
        effect="Runs the parent beside, as `propagate` does. Matters most behind dropped blocks. "
        "1 is better with much text (16,000 tokens), worse with little. Experts are left alone.",
        source="LOG.md, pruning; as in Qronos, arXiv:2505.11695",
        ge=0,
        le=1,
    )

    robust: bool = option(
        False,
        "Weigh the domains of the calibration text so that the worst one loses least: a few rounds "
        "of pruning on some of the text, each measured on development text.",
        effect="Takes `rounds` trials more. The plain weights are kept where no others are better.",
        source="DRPruning, arXiv:2411.14055, section 3, without training",
    )
    rounds: int = option(3, "With `robust`: trials, the plain one included.", ge=1)
    radius: float = option(
        0.1,
        "With `robust`: how far weights may lean from the text's shares, ½ Σ p (q/p - 1)²; shrunk "
        "by what noise explains.",
        source="DRPruning",
        ge=0,
    )
    trial_tokens: int = option(
        4096, "With `robust`: tokens of calibration text of a trial, in whole rows.", ge=1
    )

    @property
    def label(self) -> str:
        """Such as `OBS -20 %`."""
        robust = " robust" if self.robust else ""
        return f"OBS{robust}" + ("" if self.ratio is None else f" -{self.ratio:.0%}")

    def mix(
        self, shape: Shape, layers: tuple[int, ...], weights: Mapping[str, float] | None
    ) -> Mix:
        """What stays, with the stage's own least squares."""
        from compressor.stages.mixing import Mix

        return Mix(shape, layers, self.damping, self.shrinkage, self.propagate, self.align, weights)

    def calibration_need(self) -> Need | None:
        """Compensation needs the second moments of the inputs, always."""
        return Need("method", "prune.obs measures its Hessians on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Prune every block on inputs that passed through the pruned ones before it."""
        from compressor.model.architecture import Architecture
        from compressor.model.files import read_config
        from compressor.stages.mixing import prune_mix, prune_robustly

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        architecture = Architecture.from_config(read_config(checkpoint))
        shape, batches = self.target(architecture), calibration.batches
        if self.robust and shape != shape_of(architecture):
            return prune_robustly(self, shape, checkpoint, batches, context)
        layers = tuple(range(architecture.layers))
        return prune_mix(self.mix(shape, layers, None), checkpoint, batches, context)
