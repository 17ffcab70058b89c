"""`prune.dro`: learn which units go while the model trains on what the worst domain needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.shape import shape_of
from compressor.stages.base import ReportProblem, option, redefault
from compressor.stages.prune_base import WidthConfig
from compressor.stages.train_base import Counted, Shares, TrainConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.model.shape import Shape
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneDro(TrainConfig, WidthConfig):
    """Gates on blocks, heads and channels are learned with the weights, then fixed and cut out.

    A Lagrangian brings every kind of gate to its share; what the model computes with the gates
    fixed is what the smaller model computes. The loss is the distance to the original, and text
    comes from a mixture that leans towards the domains that lose most (distributionally robust
    optimisation). Training that is interrupted goes on to the same bytes. For budgets of text;
    without any, `prune.obs`.
    """

    source: ClassVar[str] = (
        "DRPruning: Deng et al. 2024, arXiv:2411.14055; masks: LLM-Shearing, arXiv:2310.06694, and "
        "Louizos et al. 2018, arXiv:1712.01312"
    )

    method: Literal["prune.dro"] = "prune.dro"
    layers: int | None = option(None, "Blocks that are left. Default: all.", ge=1)
    start: Literal["fisher", "open"] = option(
        "fisher",
        "Where gates begin: `fisher`, the nearer to closing the less the loss of a few windows "
        "would feel it; `open`, all alike.",
        effect="Open gates tell a short training nothing, so that noise decides which ones close.",
        source="Kwon et al. 2022, arXiv:2204.09656",
    )
    mask_rate: float = option(
        0.3,
        "Learning rate of the gates; a tenth of it is that of their multipliers.",
        effect="A gate crosses from open to closed in some ten units. LLM-Shearing has 1 for 3,200 "
        "updates; faster gates decide earlier, on less.",
        gt=0,
    )
    ramp: float = option(
        0.5,
        "Share of the updates with learned gates in which the target rises to its full size.",
        effect="LLM-Shearing has 0.2, of far more updates.",
        ge=0,
        le=1,
    )
    settle: float = option(
        0.3,
        "Share of all updates, the last ones, in which gates are fixed and weights go on.",
        effect="The model recovers from the decision; `recover.distill` can go on from there.",
        gt=0,
        lt=1,
    )
    sampler: Shares = redefault(
        TrainConfig.model_fields["sampler"],
        "dro",
        effect="`static` leaves plain learned masks, as LLM-Shearing without its loading.",
    )
    reference: Counted = redefault(TrainConfig.model_fields["reference"], "forecast")
    drift: bool = redefault(TrainConfig.model_fields["drift"], True)

    @property
    def label(self) -> str:
        """Such as `DRO -20 %`."""
        return "DRO" if self.ratio is None else f"DRO -{self.ratio:.0%}"

    @property
    def sizes(self) -> dict[str, str]:
        """Blocks as well."""
        return {**super().sizes, "layers": "layers"}

    def fixed(self, architecture: Architecture) -> Shape:
        """With the blocks, heads and channels that options name."""
        return replace(super().fixed(architecture), layers=self.layers or architecture.layers)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The smaller architecture; refuses what would fail after an hour."""
        self.check_training(architecture, problems)
        after = WidthConfig.plan(self, architecture, problems)
        if after == architecture and not list(self._faults(architecture)):
            message = "nothing goes at this size, so there is nothing to learn"
            problems("method", message, "ask for less, or take `recover.distill`")
        return after

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """Everything learns."""
        del before
        return after.matrices

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What goes, and what is in memory."""
        return (*WidthConfig.remarks(self, before), *TrainConfig.remarks(self, before))

    def kinds(self, architecture: Architecture) -> Iterator[str]:
        """Sizes of `Shape` that become smaller, each with gates of its own.

        Raises:
            ModelError: the budget cannot be met.
        """
        now, target = shape_of(architecture), self.target(architecture)
        each = (now.heads // now.kv_heads, target.heads // target.kv_heads)
        smaller = {
            "layers": target.layers < now.layers,
            "kv_heads": target.kv_heads < now.kv_heads,
            "heads": each[1] < each[0],
            "channels": target.channels < now.channels,
        }
        yield from (kind for kind, less in smaller.items() if less)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Train gates and weights in fp32, fix the gates, cut, and round once."""
        from compressor.stages.masking import prune_with_masks

        return prune_with_masks(self, checkpoint, calibration, context)
