"""`draft.standalone`: a small model of the target's class that any engine loads as a draft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.stages.base import ReportProblem, option
from compressor.stages.draft_base import TrainedDraftConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class DraftStandalone(TrainedDraftConfig):
    """Copy some blocks of the target into a small model and distil it on the target's text.

    The result is a plain checkpoint with the target's tokenizer: transformers takes it as
    `assistant_model`, vLLM, SGLang and llama.cpp as a draft model. It computes the whole
    vocabulary for every drafted token, which on small targets leaves little to gain.
    """

    source: ClassVar[str] = (
        "Leviathan et al. 2022, arXiv:2211.17192; distillation: Zhou et al. 2023, DistillSpec, "
        "arXiv:2310.08461"
    )

    method: Literal["draft.standalone"] = "draft.standalone"
    layers: int = option(
        1,
        "Blocks of the draft.",
        effect="More guess better and take longer; latency goes with depth.",
        source="Decoding speculative decoding, arXiv:2402.01528",
        ge=1,
    )
    blocks: Literal["ends", "first", "even"] = option(
        "first",
        "Which blocks of the target it starts from: the first ones and the last, the first ones, "
        "or evenly spread.",
    )
    intermediate: int | None = option(
        None,
        "Feed-forward channels of each of its blocks; all by default. Those that matter least on "
        "calibration text go, as `prune.width` finds them.",
        effect="Narrower blocks are faster and guess worse; the head stays as large as it is.",
        ge=1,
    )
    on_policy: float = option(
        0.0,
        "Share of the steps, at the end, that train on what the draft itself writes after the "
        "beginnings of rows, judged by the target.",
        effect="Teaches the draft what to do after its own mistakes; each such step writes text.",
        source="DistillSpec, arXiv:2310.08461, gains by it; arXiv:2503.07807 found that fixed text "
        "is better, so it is short or nothing",
        ge=0,
        le=1,
    )
    continued: int = option(32, "Tokens that the draft writes in such a step.", ge=1)
    train_embeddings: bool = option(
        False,
        "Also train the embedding and the head.",
        effect="Many more parameters on little text; slower steps.",
    )

    @property
    def label(self) -> str:
        """Such as `Draft, 1 block`."""
        return f"Draft, {self.layers} block{'s' if self.layers > 1 else ''}"

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses a draft as deep as its target."""
        if self.layers >= architecture.layers:
            message = f"a draft of {self.layers} blocks is no faster than its target of "
            message += f"{architecture.layers}"
            problems("layers", message, f"at most {architecture.layers - 1}")
        if self.intermediate and self.intermediate > architecture.intermediate:
            message = f"the model has {architecture.intermediate} channels, not {self.intermediate}"
            problems("intermediate", message, "lower `intermediate`")
        if self.intermediate and architecture.experts:
            problems(
                "intermediate", "experts are not made narrower here", "leave `intermediate` out"
            )
        longest = architecture.max_positions
        if self.on_policy and self.prompt + self.continued > longest:
            problems("continued", f"the model reads at most {longest} tokens", "lower `continued`")
        return super().plan(architecture, problems)

    def parameters(self, architecture: Architecture) -> int:
        """Everything but the blocks that are left out."""
        block = sum(matrix.parameters for matrix in architecture.block(0))
        return architecture.parameters - block * (architecture.layers - self.layers)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Write text, read it with the target, train, save."""
        from compressor.stages.drafting import distil_standalone

        assert calibration is not None
        return distil_standalone(self, checkpoint, calibration, context)

    def untrained(self, target: Any, folder: Path) -> Any:
        """The copied blocks as they are in the target; None where they were made narrower."""
        from compressor.decoding.cached import CachedModel
        from compressor.decoding.proposals import ModelDraft
        from compressor.decoding.standalone import chosen_blocks, standalone

        del folder
        if self.intermediate is not None:
            return None
        blocks = chosen_blocks(self.blocks, self.layers, target.config.num_hidden_layers)
        return ModelDraft(CachedModel(standalone(target, blocks)))
