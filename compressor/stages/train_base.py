"""Options and checks of the stages that train a model on the original's predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.calibration import (
    USER_DOMAIN,
    CalibrationConfig,
    apportion,
    load_mix,
    require_origin,
)
from compressor.errors import UsageError
from compressor.stages.base import (
    Need,
    ReportProblem,
    StageConfig,
    minutes_option,
    option,
    precision_option,
)

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture

Shares = Literal["static", "dro"]
Counted = Literal["original", "forecast"]

_BYTES = 4  # fp32
_ROW = 512  # tokens of the usual row of calibration text


class TrainConfig(StageConfig):
    """Options common to the methods that train."""

    shared: ClassVar[bool] = True

    tokens: int = option(
        1_000_000,
        "Tokens to train on; text is seen again where there is less of it.",
        effect="More is better, slowly: published recoveries take 20 million and more. A CPU "
        "trains some hundred tokens a second of a model of 100 million parameters.",
        ge=1,
    )
    minutes: float | None = minutes_option()
    mix: str | None = option(
        None,
        "Shipped mix of text to train on; empty takes the recipe's calibration text.",
        effect="Training wants far more text than calibration.",
    )
    windows: int = option(2048, "With `mix`: windows of text to draw from.", ge=1)
    length: int = option(512, "With `mix`: tokens in each.", ge=8)
    repeats: float = option(
        16,
        "How often a window may be seen, in any domain; a stage that would exceed it is refused.",
        effect="About 4 passes are as good as new text; a teacher's predictions wear out later.",
        source="Muennighoff et al. 2023, arXiv:2305.16264",
        gt=0,
    )
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
    hidden_states: float = option(
        0.0,
        "Weight of the distance between the last hidden states, relative to their size.",
        effect="Helps where whole blocks went; predictions alone do as well elsewhere.",
        source="Minitron, arXiv:2407.14679",
        ge=0,
    )
    precision: Literal["auto", "fp32", "bf16"] = precision_option()
    sampler: Shares = option(
        "static",
        "Shares of the domains: `static`, as in the text; `dro`, more of those that are "
        "farthest from the original, within a ball around that.",
        effect="`dro` protects the worst domain and measures the model on development text.",
        source="DRPruning, section 3",
    )
    radius: float = option(
        0.1,
        "With `dro`: how far shares may lean, ½ Σ p (q/p - 1)²; shrunk by what noise may explain.",
        source="DRPruning",
        ge=0,
    )
    reference: Counted = option(
        "original",
        "With `dro`: what a domain's distance is counted from: `original`, 0; `forecast`, what a "
        "scaling law fitted to its distances so far gives for a training on it alone.",
        effect="`forecast` does not chase what a model of this size will never learn. It needs 40 "
        "measurements; with fewer, `original` is taken and the report says so.",
        source="DRPruning, section 3.2",
    )
    drift: bool = option(
        False,
        "With `dro`: let the centre of the ball follow, between half and twice every share.",
        source="DRPruning",
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

    def calibration_need(self) -> Need | None:
        """Text to train on, unless the stage names its own."""
        if self.mix is not None:
            return None
        reason = f"{self.method} trains on the calibration text unless it has a `mix`"
        return Need("mix", reason)

    @property
    def windows_at_once(self) -> int:
        """Those of one part of an update."""
        return self.batch // self.accumulate

    def updates(self, mean_length: float) -> int:
        """Updates in all, at least one."""
        return max(1, round(self.tokens / (self.batch * mean_length)))

    def check_training(self, architecture: Architecture, problems: ReportProblem) -> None:
        """Report what would fail after an hour."""
        if architecture.experts:
            message = f"the experts of {architecture.family} are fused in training and are not "
            problems("method", message + "taken apart again", "leave the stage out")
        if self.batch % self.accumulate:
            message = f"{self.accumulate} parts do not divide a batch of {self.batch}"
            problems("accumulate", message, "write a divisor of `batch`")
        if self.top_k is not None and self.top_k >= architecture.vocab:
            message = f"{self.top_k} tokens are not fewer than the vocabulary, {architecture.vocab}"
            problems("top_k", message, "leave it out to compare every token")
        if self.mix is not None and self.length > architecture.max_positions:
            message = f"windows of {self.length} tokens are longer than the model's context, "
            problems("length", f"{message}{architecture.max_positions}", "shorten them")

    def unread(self) -> Mapping[str, str]:
        """What `dro` alone reads."""
        names = () if self.sampler == "dro" else ("radius", "reference", "drift", "measure_every")
        return dict.fromkeys(names, "sampler: dro")

    def check_text(self, calibration: CalibrationConfig | None, problems: ReportProblem) -> None:
        """Report text that is missing, too rare, or would be seen too often."""
        config = self.text() if self.mix is not None else calibration
        if config is None:
            return  # `calibration_need` speaks of it
        try:
            require_origin(config)
        except UsageError as error:
            if self.mix is not None:  # else the plan reports it at `calibration`
                problems("mix", error.message, error.hint)
            return
        for place, message, hint in self._text_faults(config):
            problems(place, message, hint)

    def _text_faults(self, config: CalibrationConfig) -> Iterator[tuple[str, str, str]]:
        user = config.source is not None
        shares = {USER_DOMAIN: 1.0} if user else load_mix(config.mix).domains
        counts = apportion(shares, config.samples)
        place = "windows" if self.mix is not None else "mix"
        for name, count in counts.items():
            if not count:
                message = f"domain {name!r} gets none of {config.samples} windows of text"
                yield place, message, "take more windows, or a mix without it"
        if self.sampler == "dro" and len(counts) < 2:
            message = f"`dro` leans between domains, and the text has {', '.join(counts)} alone"
            yield "sampler", message, "name a `mix` of several domains, or take `static`"
        yield from self.repeat_faults(counts, self.updates(config.length))

    def repeat_faults(
        self, counts: Mapping[str, int], updates: int
    ) -> Iterator[tuple[str, str, str]]:
        """Domains whose windows could be seen more often than `repeats` allows.

        Args:
            counts: windows of every domain.
            updates: of the whole training.
        """
        total = sum(counts.values())
        for name, count in counts.items():
            share = count / total
            if self.sampler == "dro":
                share = largest_share(min(1.0, 2 * share) if self.drift else share, self.radius)
            often = updates * self.batch * share / max(1, count)
            if often > self.repeats:
                message = f"a window of domain {name!r} could be seen {often:.1f} times, and "
                yield (
                    "repeats",
                    f"{message}`repeats` allows {self.repeats:g}",
                    "train on fewer `tokens`, take more windows, or allow it",
                )

    def text(self) -> CalibrationConfig:
        """What `mix`, `windows` and `length` describe."""
        return CalibrationConfig(
            mix=self.mix or "default", samples=self.windows, length=self.length, seed=self.seed
        )

    def flops(self, architecture: Architecture) -> float:
        """Operations: a forward pass of the original for every token, forward and backward of the
        model, and blocks once more where activations are computed again.
        """
        inside = sum(
            matrix.parameters for matrix in architecture.matrices if matrix.block is not None
        )
        head = architecture.hidden * architecture.vocab
        again = inside if self.checkpointing else 0
        return 2.0 * self.tokens * (4 * (inside + head) + again)

    def memory(self, architecture: Architecture) -> int:
        """Bytes at the peak: what training holds, the original, and the logits of one part."""
        original = _BYTES * architecture.parameters
        rows = max(1, self.batch // self.accumulate)
        length = self.length if self.mix is not None else min(_ROW, architecture.max_positions)
        return (
            self.training_bytes(architecture)
            + original
            + 3 * _BYTES * rows * length * architecture.vocab
        )

    def training_bytes(self, architecture: Architecture) -> int:
        """Of weights, gradients and both moments."""
        return 4 * _BYTES * architecture.parameters

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What is in memory, which other stages avoid."""
        return (
            f"holds the whole model with gradients and moments in memory, "
            f"{self.training_bytes(before) / 1e9:.1f} GB, "
            "beside the original and the logits of a batch",
        )


def largest_share(share: float, radius: float) -> float:
    """The most that a domain can get in the ball of `numerics.robust`: p + √(2ρ·p·(1 - p)).

    Args:
        share: p in (0, 1].
        radius: ρ.
    """
    return min(1.0, share + math.sqrt(2 * radius * share * (1 - share)))
