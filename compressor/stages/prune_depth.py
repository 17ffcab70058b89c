"""`prune.depth`: remove whole decoder blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.model.shape import FreeSize, Shape, shape_of
from compressor.stages.base import Need, option
from compressor.stages.prune_base import PruneConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneDepth(PruneConfig):
    """Drop the blocks that the model misses least; the others are not changed.

    Saves time at every batch size, and costs more accuracy than narrower blocks of as many
    parameters.
    """

    source: ClassVar[str] = (
        "block influence: ShortGPT, arXiv:2403.03853; greedy: SLEB, arXiv:2402.09025, and "
        "BlockPruner, arXiv:2406.10594"
    )

    method: Literal["prune.depth"] = "prune.depth"
    layers: int | None = option(
        None,
        "Decoder blocks that are left.",
        effect="By default decided by `ratio`, `parameters` or `bytes`.",
        ge=1,
    )
    score: Literal["greedy", "influence"] = option(
        "greedy",
        "`influence` drops at once the blocks whose outputs point where their inputs do; `greedy` "
        "drops one block after the other, each time the one without which the outputs stay nearest "
        "to the parent's (KL).",
        effect="`greedy` is far better from the second block on, and runs the model once for "
        "every block it tries.",
        source="SLEB, with the KL to the parent in place of perplexity, which needs fewer tokens",
    )
    candidates: int = option(
        6,
        "With `greedy`: how many blocks more than are to go are tried in every step, in order of "
        "their influence.",
        effect="More is slower; as many as the model has blocks tries all.",
        ge=1,
    )
    tokens: int = option(
        2048,
        "With `greedy`: tokens of calibration text that outputs are compared on, in whole rows "
        "spread evenly over the text.",
        effect="More is slower and steadier.",
        ge=1,
    )

    @property
    def label(self) -> str:
        """Such as `Depth greedy -20 %`."""
        return f"Depth {self.score}" + ("" if self.ratio is None else f" -{self.ratio:.0%}")

    @property
    def sizes(self) -> dict[str, str]:
        """Blocks."""
        return {"layers": "layers"}

    @property
    def free_size(self) -> FreeSize:
        """Blocks."""
        return "layers"

    def fixed(self, architecture: Architecture) -> Shape:
        """With the blocks that `layers` leaves."""
        now = shape_of(architecture)
        return replace(now, layers=self.layers or now.layers)

    def calibration_need(self) -> Need | None:
        """How much a block does depends on the text."""
        return Need("method", "prune.depth runs the model on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Rank the blocks, then write those that stay under their new numbers."""
        from compressor.stages.depth import prune_depth

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return prune_depth(self, checkpoint, calibration.batches, context)
