"""`prune.hidden`: remove channels of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.errors import ModelError
from compressor.model.shape import WHOLE_HEADS, Fault, FreeSize, Shape, fitted, shape_of
from compressor.stages.base import Need, option
from compressor.stages.prune_base import MultipleConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneHidden(MultipleConfig):
    """Drop the same channels of the residual stream everywhere: embedding, norms, matrices, head.

    Heads keep their size. The weights of norms are multiplied by what sets the mean over fewer
    channels right; everything else stays as it is. Nothing makes up for what is lost, so that
    `recover.distill` should follow.
    """

    source: ClassVar[str] = "Minitron: Muralidharan et al. 2024, arXiv:2407.14679"

    method: Literal["prune.hidden"] = "prune.hidden"
    hidden: int | None = option(
        None,
        "Channels of the residual stream that are left.",
        effect="By default decided by `ratio`, `parameters` or `bytes`. Makes every matrix and the "
        "embedding narrower.",
        ge=1,
    )
    score: Literal["activation", "random"] = option(
        "activation",
        "What a channel is worth: `activation`, how large norms put it out; `random`, nothing.",
        source="Minitron, section 2.2",
    )
    seed: int = option(0, "Of `score: random`.", ge=0)

    @property
    def label(self) -> str:
        """Such as `Hidden -20 %`."""
        return "Hidden" + ("" if self.ratio is None else f" -{self.ratio:.0%}")

    @property
    def sizes(self) -> dict[str, str]:
        """Channels of the stream."""
        return {"hidden": "hidden"}

    @property
    def free_size(self) -> FreeSize:
        """Channels of the stream."""
        return "hidden"

    def fixed(self, architecture: Architecture) -> Shape:
        """With the channels that `hidden` leaves."""
        now = shape_of(architecture)
        return replace(now, hidden=self.hidden or now.hidden)

    def target(self, architecture: Architecture) -> Shape:
        """As budgets are met; some families need a number of channels that their heads divide.

        Raises:
            ModelError: the budget cannot be met, or no width that works is nearer than the present.
        """
        shape, budget = self.fixed(architecture), self.budget(architecture)
        if budget is None:
            return shape
        multiple, at_most = self._step(architecture), self.ratio is None
        found = fitted(architecture, shape, "hidden", budget, multiple=multiple, at_most=at_most)
        if found.hidden == architecture.hidden and budget < architecture.parameters:
            raise ModelError(
                f"the width of the stream must be a multiple of {multiple}, for heads and for what "
                f"follows, so that none is nearer to {budget:,} parameters than {found.hidden}",
                "ask for more, or let rounders take smaller groups",
            )
        return found

    def unsuited(self, architecture: Architecture) -> Iterator[Fault]:
        """Channels that are no multiple."""
        step = self._step(architecture)
        yield from self.uneven("hidden", self.hidden, architecture.hidden, step)

    def _step(self, architecture: Architecture) -> int:
        """What widths that work are multiples of: of what heads and rounders after it ask for."""
        whole = architecture.model_type in WHOLE_HEADS
        return math.lcm(self.width_multiple, architecture.heads if whole else 1)

    def calibration_need(self) -> Need | None:
        """What norms put out, and what they divide by, comes from text."""
        return Need("method", "prune.hidden measures its norms on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Measure every norm, choose channels once for all of the model, and cut."""
        from compressor.stages.stream import narrow_stream

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return narrow_stream(self, checkpoint, calibration.batches, context)
