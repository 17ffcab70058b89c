"""`draft.eagle3`: one layer that guesses from the target's own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.stages.base import ReportProblem, option, redefault
from compressor.stages.draft_base import TrainedDraftConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_COPIED = {"q", "k", "v", "o", "gate", "up", "down"}
_COUNTED_ONCE = "vLLM counts equal features once, and then does not load the draft"
_FEWEST_LAYERS = 4  # for three features that are not behind the last block


class DraftEagle3(TrainedDraftConfig):
    """Train one decoder layer on the target's hidden states, with a trimmed vocabulary.

    The layer sees what the target knew at the last token, so one layer guesses as well as a small
    model of many; a vocabulary of the tokens that the target says most makes its head cheap.
    Written for SGLang, vLLM and llama.cpp (`config.json` beside it) and for the speculators library
    (folder `speculators`). transformers cannot run it.
    """

    source: ClassVar[str] = (
        "Li et al. 2025, EAGLE-3, arXiv:2503.01840; trees: EAGLE-2, arXiv:2406.16858"
    )

    method: Literal["draft.eagle3"] = "draft.eagle3"
    vocab: int | None = option(
        None,
        "Tokens that the draft can propose, those that the target says most; by default a sixth "
        "of the vocabulary, at least 1024.",
        effect="More cover more text and make every step of the draft slower.",
        source="FR-Spec; EAGLE-3 takes 32k of 128k",
        ge=16,
    )
    ttt_steps: int = option(
        3,
        "Steps that the draft takes on its own outputs in training (training-time test).",
        effect="About the number of tokens drafted; each costs a pass.",
        source="EAGLE-3 takes 7, speculators 3",
        ge=1,
        le=8,
    )
    decay: float = option(0.8, "Weight of each such step relative to the one before.", gt=0, le=1)
    start: Literal["target", "random"] = option(
        "target",
        "Start as the target's last block on the last feature, or at random.",
        effect="On little text a copy is far ahead.",
    )
    matrix_rate: float | None = redefault(
        TrainedDraftConfig.model_fields["matrix_rate"],
        5e-3,
        source="SmolLM2, 200 updates: 0.50 in place of 0.48 of the target's words are guessed; "
        "3e-3 to 1e-2 alike",
    )
    features: tuple[int, int, int] | None = option(
        None,
        "Which three of transformers' hidden_states are fused; by default 2, L // 2 and L - 3, "
        "which every engine reads without being told.",
    )

    @property
    def label(self) -> str:
        """`EAGLE-3`."""
        return "EAGLE-3"

    def layers(self, blocks: int) -> tuple[int, ...]:
        """The features of a target of so many blocks."""
        from compressor.formats.eagle3 import default_layers

        return self.features or default_layers(blocks)

    def draft_vocab(self, vocab: int) -> int:
        """Tokens that the draft can propose."""
        return self.vocab or min(vocab, max(1024, vocab // 6))

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses features and starts that it does not have."""
        count = architecture.layers
        if self.features is None and count < _FEWEST_LAYERS:
            message = f"{count} blocks are too few for features before the last one"
            problems("features", message, "use draft.standalone, or name the features")
        if self.features and not all(0 <= layer < count for layer in self.features):
            message = f"hidden_states {list(self.features)} are not all before the last block"
            problems("features", message, f"name three from 0 to {count - 1}")
        if self.vocab and self.vocab > architecture.vocab:
            message = f"the model knows {architecture.vocab} tokens, not {self.vocab}"
            problems("vocab", message, "lower `vocab`")
        roles = {matrix.role for matrix in architecture.block(count - 1)}
        if self.start == "target" and not (architecture.prenorm and roles >= _COPIED):
            message = f"the last block of {architecture.family} cannot be copied into a Llama layer"
            problems("start", message, "write `start: random`")
        if self.length <= self.ttt_steps + 1:
            problems("ttt_steps", f"rows of {self.length} are too short", "raise `length`")
        return super().plan(architecture, problems)

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """Where the default features are not low, middle and high."""
        layers = self.layers(before.layers)
        if sorted(set(layers)) == list(layers):
            return ()
        twice = len(set(layers)) < len(layers)
        if self.features:
            return (_COUNTED_ONCE,) if twice else ()
        return (
            *((_COUNTED_ONCE,) if twice else ()),
            f"on {before.layers} blocks the default features are hidden_states {list(layers)}, not "
            f"low, middle and high; `features: [1, {before.layers // 2}, {before.layers - 1}]` "
            "tells the draft more, and engines must then read the ids from its config.json",
        )

    def parameters(self, architecture: Architecture) -> int:
        """The layer, the fusion and the trimmed head."""
        hidden = architecture.hidden
        heads = 3 * architecture.heads + 4 * architecture.kv_heads  # q, k, v read 2·H
        attention = architecture.head_dim * hidden * heads
        mlp = 3 * hidden * architecture.intermediate
        return 3 * hidden**2 + attention + mlp + hidden * self.draft_vocab(architecture.vocab)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Write text, keep the target's hidden states on it, train, save in two dialects."""
        from compressor.stages.drafting_eagle3 import distil_eagle3

        assert calibration is not None
        return distil_eagle3(self, checkpoint, calibration, context)

    def untrained(self, target: Any, folder: Path) -> Any:
        """As it was before the first step, on the same vocabulary."""
        from compressor.stages.drafting_eagle3 import untrained_eagle3

        return untrained_eagle3(self, target, folder)
