"""`recover.distill`: train a pruned model on the predictions of the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.calibration import CalibrationConfig, require_origin
from compressor.errors import UsageError
from compressor.stages.base import Need, ReportProblem, StageConfig, option

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture, Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class RecoverDistill(StageConfig):
    """Knowledge distillation: the loss is the distance to the original model's predictions.

    The whole model, the original and the optimizer's moments are in memory, unlike in other
    stages. Training that is interrupted goes on from its last checkpoint to the same bytes.
    """

    source: ClassVar[str] = (
        "Hinton et al. 2015, arXiv:1503.02531; as recovery: Minitron, arXiv:2407.14679; `dro`: "
        "DRPruning, arXiv:2411.14055"
    )

    method: Literal["recover.distill"] = "recover.distill"
    tokens: int = option(
        1_000_000,
        "Tokens to train on; text is seen again where there is less of it.",
        effect="More is better, slowly: published recoveries take 20 million and more. A CPU "
        "trains some hundred tokens a second of a model of 100 million parameters.",
        ge=1,
    )
    minutes: float | None = option(
        None,
        "Stop at the first checkpoint after so many minutes.",
        effect="The result then depends on the speed of the machine.",
        gt=0,
    )
    mix: str | None = option(
        None,
        "Shipped mix of text to train on; empty takes the recipe's calibration text.",
        effect="Training wants far more text than calibration.",
    )
    windows: int = option(2048, "With `mix`: windows of text to draw from.", ge=1)
    length: int = option(512, "With `mix`: tokens in each.", ge=8)
    batch: int = option(
        8,
        "Windows in one update.",
        effect="Larger is steadier; `learning_rate` may then be larger too.",
        ge=1,
    )
    accumulate: int = option(
        1,
        "Parts that an update's windows are run in, one after the other.",
        effect="Memory only: logits of one part are held at a time. Must divide `batch`.",
        ge=1,
    )
    learning_rate: float = option(
        1e-4,
        "Peak rate of AdamW: reached after a short rise, then a cosine down to a tenth.",
        effect="About a fifth of what the model was trained with.",
        source="ModelOpt's guide to recovery after pruning",
        gt=0,
    )
    weight_decay: float = option(0.0, "Of AdamW.", ge=0)
    top_k: int | None = option(
        None,
        "Compare the original's so many likeliest tokens one by one and all others as one; empty "
        "compares every token.",
        effect="Saves little here, where the original runs beside.",
        ge=1,
    )
    temperature: float = option(1.0, "What logits are divided by before they are compared.", gt=0)
    cross_entropy: float = option(
        0.0,
        "Weight of the loss on the text itself, added to the distance.",
        effect="0 recovers the original; more fits the text.",
        ge=0,
    )
    sampler: Literal["static", "dro"] = option(
        "static",
        "Shares of the domains: `static`, as in the text; `dro`, more of those that are "
        "farthest from the original, within a ball around that.",
        effect="`dro` protects the worst domain and measures the model on development text.",
        source="DRPruning, section 3",
    )
    radius: float = option(
        0.1,
        "With `dro`: how far shares may lean, ½ Σ p (q/p - 1)²; shrunk by what noise explains.",
        source="DRPruning",
        ge=0,
    )
    measure_every: int = option(
        50, "With `dro`: updates between two measurements of all domains.", ge=1
    )
    checkpointing: bool = option(
        False,
        "Compute activations of blocks again in the backward pass in place of keeping them.",
        effect="Far less memory for a third more time.",
    )
    seed: int = option(0, "Of the order of the text.", ge=0)

    @property
    def label(self) -> str:
        """Such as `Distilled 1.0M tokens`."""
        size = f"{self.tokens / 1e6:.1f}M" if self.tokens >= 10**5 else f"{self.tokens:,}"
        return f"Distilled {size} tokens" + (" (DRO)" if self.sampler == "dro" else "")

    def calibration_need(self) -> Need | None:
        """Text to train on, unless the stage names its own."""
        if self.mix is not None:
            return None
        return Need("mix", "recover.distill trains on the calibration text unless it has a `mix`")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses what would fail after an hour."""
        if architecture.experts:
            message = f"the experts of {architecture.family} are fused in training and are not "
            problems("method", message + "taken apart again", "leave the stage out")
        if self.batch % self.accumulate:
            message = f"{self.accumulate} parts do not divide a batch of {self.batch}"
            problems("accumulate", message, "write a divisor of `batch`")
        if self.top_k is not None and self.top_k >= architecture.vocab:
            message = f"{self.top_k} tokens are not fewer than the vocabulary, {architecture.vocab}"
            problems("top_k", message, "leave it out to compare every token")
        if self.mix is not None:
            self._check_text(architecture, problems)
        return architecture

    def _check_text(self, architecture: Architecture, problems: ReportProblem) -> None:
        try:
            require_origin(self.text())
        except UsageError as error:
            problems("mix", error.message, error.hint)
        if self.length > architecture.max_positions:
            message = f"windows of {self.length} tokens are longer than the model's context, "
            problems("length", f"{message}{architecture.max_positions}", "shorten them")

    def text(self) -> CalibrationConfig:
        """What `mix`, `windows` and `length` describe."""
        return CalibrationConfig(
            mix=self.mix or "default", samples=self.windows, length=self.length, seed=self.seed
        )

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """Everything learns."""
        del before
        return after.matrices

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What is in memory, which other stages avoid."""
        bytes_ = 4 * 4 * before.parameters
        return (
            f"holds the whole model with gradients and moments in memory, {bytes_ / 1e9:.1f} GB, "
            "beside the original and the logits of a batch",
        )

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Train in fp32 master weights, and round once to the checkpoint's dtype."""
        from compressor.stages.distilling import distill

        return distill(self, checkpoint, calibration, context)
