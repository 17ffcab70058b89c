"""`prune.width`: remove heads and channels by a score, as they are; the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.shape import Fault
from compressor.stages.base import Need, option
from compressor.stages.prune_base import WidthConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_BLIND = ("magnitude", "random")


class PruneWidth(WidthConfig):
    """Rank units by a score and drop the lowest; what stays is not changed.

    `prune.obs` removes as much at a fraction of the loss; this is what to compare it with, and
    what to use where training follows anyway.
    """

    source: ClassVar[str] = (
        "Wanda-sp and FLAP: An et al. 2023, arXiv:2312.11983; Taylor: Molchanov et al. 2016, "
        "arXiv:1611.06440, and LLM-Pruner, arXiv:2305.11627"
    )

    method: Literal["prune.width"] = "prune.width"
    score: Literal["wanda", "flap", "magnitude", "taylor", "random"] = option(
        "flap",
        "What a unit is worth: `wanda`, its weights times the size of its input; `flap`, its "
        "weights times the variance of its input; `magnitude`, the squared weights of all that "
        "belongs to it; `taylor`, weights times gradients; `random`, nothing.",
        effect="`flap` also adds to a bias, in families that have one there, what the removed "
        "units put out on average. `taylor` holds the whole model and its gradients in memory.",
    )
    seed: int = option(0, "Of `score: random`.", ge=0)

    @property
    def label(self) -> str:
        """Such as `Pruned by flap -20 %`."""
        return f"Pruned by {self.score}" + ("" if self.ratio is None else f" -{self.ratio:.0%}")

    def calibration_need(self) -> Need | None:
        """What inputs or gradients are like comes from text."""
        if self.score in _BLIND:
            return None
        return Need("score", f"the score {self.score} is measured on calibration text")

    def unsuited(self, architecture: Architecture) -> Iterator[Fault]:
        """Also: gradients of experts, which the library fuses."""
        yield from super().unsuited(architecture)
        if self.score == "taylor" and architecture.experts:
            message = f"gradients of the experts of {architecture.family} are not taken apart"
            yield Fault("", message, "take another score")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Score the units of every block on inputs that passed through the pruned ones before."""
        from compressor.model.architecture import Architecture
        from compressor.model.files import read_config
        from compressor.stages import unit_choice as by
        from compressor.stages.pruning import Job, prune_widths

        architecture = Architecture.from_config(read_config(checkpoint))
        batches = calibration.batches if calibration else ()
        inputs = batches if self.score in ("wanda", "flap") else ()
        flap = self.score == "flap"
        if self.score == "taylor":
            sums = by.sensitivities(checkpoint, architecture, batches, context)
            score = by.coupled(architecture, sums)
        else:
            magnitude = by.coupled(architecture, by.squares)
            known = {"wanda": by.wanda, "flap": by.flap, "magnitude": magnitude}
            score = known.get(self.score) or by.random(self.seed)
        choose = by.scored(score, bias=flap)
        job = Job(self.target(architecture), choose, inputs, refits_bias=flap)
        return prune_widths(job, checkpoint, context)
