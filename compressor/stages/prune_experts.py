"""`prune.experts`: remove whole experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.shape import Fault, FreeSize, Shape, shape_of
from compressor.stages.base import Need, option
from compressor.stages.prune_base import PruneConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneExperts(PruneConfig):
    """Drop the experts that the text asks least of, as many in every block.

    The router loses their rows and gives their tokens to those that stay, which are not changed.
    Memory shrinks; a token costs what it did. What was never chosen is missed only by a router
    whose weights do not sum to 1 (`norm_topk_prob: false`): there all others gain.
    """

    source: ClassVar[str] = (
        "REAP: Lasby et al. 2025, arXiv:2510.13999; counts: Lu et al. 2024, arXiv:2402.14800"
    )

    method: Literal["prune.experts"] = "prune.experts"
    experts: int | None = option(
        None,
        "Experts that are left in every block that has any.",
        effect="By default decided by `ratio`, `parameters` or `bytes`. Cannot be fewer than a "
        "token is given to.",
        ge=1,
    )
    score: Literal["output", "reap", "frequency", "random"] = option(
        "output",
        "What an expert is worth: `output`, what it adds to the stream over all text; `reap`, what "
        "it adds to a token that it is given; `frequency`, how many tokens it is given; `random`, "
        "nothing.",
        effect="`reap` keeps experts that are rare and loud, `frequency` those that are common.",
        source="REAP, equation 9",
    )
    seed: int = option(0, "Of `score: random`.", ge=0)

    @property
    def label(self) -> str:
        """Such as `Experts by output -20 %`."""
        return f"Experts by {self.score}" + ("" if self.ratio is None else f" -{self.ratio:.0%}")

    @property
    def sizes(self) -> dict[str, str]:
        """Experts."""
        return {"experts": "experts"}

    @property
    def free_size(self) -> FreeSize:
        """Experts."""
        return "experts"

    def fixed(self, architecture: Architecture) -> Shape:
        """With the experts that `experts` leaves."""
        now = shape_of(architecture)
        return replace(now, experts=self.experts or now.experts) if now.experts else now

    def unsuited(self, architecture: Architecture) -> Iterator[Fault]:
        """A model without experts."""
        if not architecture.experts:
            message = f"this {architecture.family} model has no experts"
            yield Fault("", message, "prune channels with prune.obs")

    def calibration_need(self) -> Need | None:
        """What the router chooses depends on the text."""
        if self.score == "random":
            return None
        return Need("score", f"the score {self.score} is measured on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Block by block, score the experts and write those that stay under their new numbers."""
        from compressor.stages.expert_choice import drop_experts

        batches = calibration.batches if calibration and self.score != "random" else ()
        return drop_experts(self, checkpoint, batches, context)
