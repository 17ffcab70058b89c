"""Options that drafts share: the measurement, and text and training of those that learn."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.stages.base import (
    Need,
    ReportProblem,
    StageConfig,
    in_seconds,
    minutes_option,
    option,
    precision_option,
)

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture
    from compressor.training import Schedule


class DraftConfig(StageConfig):
    """A stage that leaves its target as it is and makes a draft model beside it."""

    beside: ClassVar[bool] = True

    drafted: int = option(
        5,
        "Most tokens to draft before each pass of the target; the best number up to it is measured "
        "and written into the draft's generation_config.json.",
        ge=1,
        le=16,
    )
    prompts: int = option(
        4, "Prompts of each evaluation domain on which the draft is measured.", ge=1
    )
    new_tokens: int = option(64, "Tokens that each of them is continued by.", ge=4)
    tree_nodes: int = option(
        0,
        "Also measure a tree of so many proposals for each pass; 0 measures chains only.",
        effect="A tree accepts more and costs more to verify: worth it where passes over many "
        "tokens are cheap. It is as deep as `drafted`. With 15 proposals, 3 deep and 6 wide, an "
        "EAGLE-3 head for SmolLM2-135M made 1.42 times plain decoding in bf16, as a chain 1.29.",
        source="EAGLE-2, arXiv:2406.16858, verifies 60",
        ge=0,
        le=64,
    )
    tree_width: int = option(
        4, "Nodes of that tree expanded at each level, and children of each.", ge=1, le=16
    )
    seed: int = option(0, "Of everything random.", ge=0)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture: the target stays as it is."""
        if any(matrix.role == "project_out" for matrix in architecture.matrices):
            message = f"{architecture.family} projects its states before the head; not supported"
            problems("method", message, "leave the stage out")
        return architecture

    def untrained(self, target: Any, folder: Path) -> Any:
        """The draft (`compressor.decoding.proposals.Draft`) before training; None without any.

        Args:
            target: loaded.
            folder: of the draft.
        """
        del target, folder


class TrainedDraftConfig(DraftConfig):
    """A draft that learns from text what its target says."""

    shared: ClassVar[bool] = True

    tokens: int = option(
        40_000,
        "Tokens of text to distil on.",
        effect="Acceptance grows about with the logarithm of the tokens; so does the time.",
        source="Scaling laws for speculative decoding, arXiv:2505.07858",
        ge=64,
    )
    length: int = option(
        128,
        "Tokens of a row of that text.",
        effect="Must fit into a calibration window; longer rows teach longer contexts.",
        ge=16,
    )
    generated: float = option(
        0.5,
        "Share of rows that the target continues itself; the rest is calibration text as it is.",
        effect="The target's own text is what the draft will meet; writing it takes time.",
        source="EAGLE-3 and DFlash train on text that the target wrote",
        ge=0,
        le=1,
    )
    prompt: int = option(16, "Tokens of a row that are given before the target continues it.", ge=1)
    temperatures: tuple[float, ...] = option(
        (0.0, 1.0),
        "Temperatures at which the target writes, in turn.",
        effect="0 is the text of greedy decoding; above it, text is more varied.",
        min_length=1,
    )
    requests: Literal["text", "own"] = option(
        "text",
        "What the target answers, where it has a chat template: `text`, beginnings of calibration "
        "text to be continued; `own`, requests that it writes itself.",
        effect="`own` is nearer to how a model is used in conversation.",
        source="Magpie, arXiv:2406.08464",
    )
    writing_minutes: float | None = option(
        None,
        "End writing after the first batch that is over later. What was left out is reported.",
        gt=0,
    )
    batch_size: int = option(8, "Rows that go through the models together.", ge=1)
    steps: int = option(
        300,
        "Updates of the draft, each on one batch.",
        effect="More than tokens / (length · batch_size) reads the text again.",
        ge=0,
    )
    minutes: float | None = minutes_option()
    probes: int = option(
        4,
        "Times that acceptance on development text is looked at during training: at the last "
        "step, at half of them, at a quarter, and so on; 0 for none.",
        effect="The report then has τ against training tokens, and what more text would bring.",
        source="Scaling laws for speculative decoding, arXiv:2505.07858",
        ge=0,
        le=12,
    )
    precision: Literal["auto", "fp32", "bf16"] = precision_option()
    learning_rate: float = option(1e-3, "At its peak; a linear rise, then a cosine.", gt=0)
    matrix_rate: float | None = option(
        None,
        "Train matrices by Muon at this rate, at its peak, and only embedding, head and vectors by "
        "AdamW at `learning_rate`; without it AdamW trains all.",
        effect="Steps as long in every direction of a matrix: more is learnt from little text by "
        "matrices that begin far from where they end, and good ones are spoiled.",
        source="Jordan et al. 2024, Muon; rates as in Liu et al. 2025, arXiv:2502.16982",
        gt=0,
    )
    loss: Literal["kl", "tv", "ce", "lk_hybrid"] = option(
        "lk_hybrid",
        "`kl`: forward KL; `tv`: one minus the probability of acceptance; `ce`: the target's most "
        "likely token; `lk_hybrid`: KL while the draft is poor, acceptance once it is good.",
        effect="`lk_hybrid` mostly helps sampled decoding; `ce` and `kl` suffice for greedy.",
        source="LK losses, as reported for MLP speculators, Medusa and EAGLE-3",
    )
    top_k: int | None = option(
        None,
        "Learn only the target's so many likeliest tokens at each place; all by default.",
        effect="The draft spends nothing on the tail, which greedy decoding never asks for.",
        source="HASS, arXiv:2408.15766, takes 10",
        ge=1,
    )

    @property
    def windows_at_once(self) -> int:
        """Rows of an update."""
        return self.batch_size

    @property
    def rows(self) -> int:
        """Rows of text to distil on."""
        return max(1, round(self.tokens / self.length))

    def calibration_need(self) -> Need:
        """The text to distil on."""
        return Need("tokens", f"{self.method} distils a draft on text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses rows that are too long or hold no more than a prompt."""
        if self.prompt >= self.length:
            message = f"a prompt of {self.prompt} tokens leaves nothing of rows of {self.length}"
            problems("prompt", message, "lower `prompt` or raise `length`")
        longest = architecture.max_positions
        if self.length > longest:
            problems("length", f"the model reads at most {longest} tokens", "lower `length`")
        return super().plan(architecture, problems)

    def flops(self, architecture: Architecture) -> float:
        """Operations of writing and reading the text and of training, estimated.

        Two for each parameter and token forward, four more backward; a token is written with a
        pass of its own.
        """
        text = 2 * architecture.parameters * self.tokens * (1 + self.generated)
        return text + 6 * self.parameters(architecture) * self.steps * self.batch_size * self.length

    def memory(self, architecture: Architecture) -> int:
        """Bytes at the peak: target and draft in fp32, its gradients and moments, one batch."""
        logits = 4 * self.batch_size * self.length * architecture.vocab
        return 4 * architecture.parameters + 16 * self.parameters(architecture) + 4 * logits

    @abstractmethod
    def parameters(self, architecture: Architecture) -> int:
        """Of the draft for a target."""

    def schedule(self) -> Schedule:
        """Length and rates of training."""
        from compressor.training import Schedule

        return Schedule(
            steps=self.steps,
            learning_rate=self.learning_rate,
            matrix_rate=self.matrix_rate,
            seconds=in_seconds(self.minutes),
        )
