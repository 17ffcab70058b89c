"""`draft.early_exit`: the target drafts for itself with its first blocks; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.draft_base import DraftConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_ROW = 2048  # tokens of the longest usual row of calibration text


class DraftEarlyExit(DraftConfig):
    """Find the block after which the model can guess its own next tokens, and how many.

    The guess and the pass that verifies it share weights and cache, so there is no file to serve:
    the result is a generation_config.json with `assistant_early_exit`, which transformers reads.
    Models that were not trained to exit early guess badly from low blocks; the report says whether
    it pays. Our own decoding also chooses exit and length before every pass, by how often each
    exit was right lately.
    """

    source: ClassVar[str] = (
        "Entezari Zarch et al. 2025, DEL, arXiv:2504.05598; self-speculation: Elhoushi et al. "
        "2024, LayerSkip, arXiv:2404.16710"
    )

    method: Literal["draft.early_exit"] = "draft.early_exit"
    exits: tuple[int, ...] | None = option(
        None,
        "Blocks after which to try exiting, ascending; by default after a quarter, a half and "
        "three quarters of them.",
        effect="Later exits are right more often and cost more.",
        min_length=1,
    )
    tokens: int = option(
        4096,
        "Tokens of calibration text on which every exit is compared with the whole model; what "
        "decoding begins with before it has seen anything.",
        ge=16,
    )

    @property
    def label(self) -> str:
        """`Early exit`."""
        return "Early exit"

    def candidates(self, blocks: int) -> tuple[int, ...]:
        """The exits of a model of so many blocks."""
        quarters = (max(1, round(blocks * part / 4)) for part in (1, 2, 3))
        return self.exits or tuple(sorted(set(quarters)))

    def calibration_need(self) -> Need:
        """The text on which exits are compared."""
        return Need("tokens", f"{self.method} compares exits on text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses exits that it does not have."""
        exits = self.candidates(architecture.layers)
        within = all(0 < exit_ < architecture.layers for exit_ in exits)
        if not within or list(exits) != sorted(set(exits)):
            message = f"exits {list(exits)} are not ascending places between {architecture.layers} "
            message += "blocks"
            problems("exits", message, f"name some from 1 to {architecture.layers - 1}")
        return super().plan(architecture, problems)

    def flops(self, architecture: Architecture) -> float:
        """One pass over the text, and a head for every exit."""
        head = architecture.hidden * architecture.vocab
        exits = len(self.candidates(architecture.layers))
        return 2.0 * self.tokens * (architecture.parameters + exits * head)

    def memory(self, architecture: Architecture) -> int:
        """Bytes at the peak: the model in fp32, and the logits of one row."""
        longest = min(_ROW, architecture.max_positions)
        return 4 * (architecture.parameters + longest * architecture.vocab)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Compare the exits on text."""
        from compressor.stages.exiting import compare_exits

        assert calibration is not None
        return compare_exits(self, checkpoint, calibration, context)
