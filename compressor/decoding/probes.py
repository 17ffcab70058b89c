"""Acceptance while a draft is being trained, on a little text that stays the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from compressor.calibration import build_development
from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode
from compressor.decoding.prompts import as_prompt
from compressor.decoding.proposals import Chain, Draft
from compressor.decoding.results import CurvePoint, LearningCurve, LogFit
from compressor.formats.atomic import atomic_write_json

_PROMPT = 24  # tokens
_NEW = 32


def probe_steps(steps: int, probes: int) -> tuple[int, ...]:
    """When to probe: halving back from the last step, at most so many times.

    Args:
        steps: of training.
        probes: 0 for none.
    """
    found = {max(1, round(steps / 2**place)) for place in range(probes)} if steps else set()
    return tuple(sorted(found))


class Probes:
    """Probes of one training; kept on disk, so that an interrupted one has all of them.

    Args:
        target: returns the features that the draft reads.
        tokenizer: the target's.
        made: the draft as it is at the moment.
        drafted: γ.
        when: numbers of finished steps.
        path: where results are kept.
    """

    def __init__(
        self,
        target: CachedModel,
        tokenizer: Any,
        made: Callable[[], Draft],
        drafted: int,
        when: Sequence[int],
        path: Path,
    ) -> None:
        self.target, self.made, self.drafted, self.path = target, made, drafted, path
        self.when = frozenset(when)
        self.prompts: list[list[int]] = []
        if self.when:
            windows = build_development(tokenizer, longest=target.longest - 2 * _NEW)
            self.prompts = [
                as_prompt(tokenizer, batch.input_ids[0][:_PROMPT].tolist()) for batch in windows
            ]
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.lengths: dict[int, float] = {int(step): length for step, length in known.items()}

    def __call__(self, finished: int) -> None:
        """Probe if it is time; a probe that is on disk is not repeated."""
        if finished in self.when and finished not in self.lengths:
            self.lengths[finished] = self._length()
            atomic_write_json(self.path, self.lengths)

    def _length(self) -> float:
        """τ over all prompts; a row's last block may be cut short and does not count."""
        found = decode(
            self.target, self.prompts, Limits(_NEW), draft=self.made(), shape=Chain(self.drafted)
        )
        blocks = [block for row in found.blocks for block in row[:-1]]
        return 1 + sum(block.accepted for block in blocks) / max(1, len(blocks))

    def curve(self, tokens_per_step: float) -> LearningCurve | None:
        """What was found so far; None without a probe.

        Args:
            tokens_per_step: positions that a step looks at, on average.
        """
        points = tuple(
            CurvePoint(tokens=round(step * tokens_per_step), length=length)
            for step, length in sorted(self.lengths.items())
        )
        return LearningCurve(points=points, fit=log_fit(points)) if points else None


def log_fit(points: Sequence[CurvePoint]) -> LogFit | None:
    """τ = a + b ln(tokens); None with fewer than two places.

    The interval is Student's, which takes the residuals as independent and alike.
    """
    if len({point.tokens for point in points}) < 2:
        return None
    found = stats.linregress(
        [math.log(point.tokens) for point in points], [point.length for point in points]
    )
    half = None
    if len(points) > 2:
        half = float(stats.t.ppf(0.975, len(points) - 2) * found.stderr)
    slope = float(found.slope)
    return LogFit(
        intercept=float(found.intercept),
        slope=slope,
        low=None if half is None else slope - half,
        high=None if half is None else slope + half,
    )
