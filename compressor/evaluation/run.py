"""Measure the base once, then any number of variants against it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.evaluation.measure import (
    BaseCache,
    Progress,
    TokenScores,
    fill,
    protocol_of,
    score_base,
    score_variant,
)
from compressor.evaluation.protocols import TokenizedText
from compressor.evaluation.results import Divergence, Evaluation
from compressor.evaluation.scoring import Scorer
from compressor.evaluation.summary import Summary


@dataclass(frozen=True)
class Settings:
    """What all variants of a run share.

    Attributes:
        text: the windows.
        tokenizer: gives the one that cut them, to decode the worst tokens.
        batch: windows per batch.
        resamples, seed: of the bootstrap.
        noise_floor: score the base against itself at another batch size.
        in_calibration: domain -> the calibration saw such text.
    """

    text: TokenizedText
    tokenizer: Callable[[], Any]
    batch: int = 8
    resamples: int = 2000
    seed: int = 0
    noise_floor: bool = True
    in_calibration: Mapping[str, bool] | None = None


def evaluate_base(
    scorer: Scorer,
    settings: Settings,
    cache_root: Path,
    model: str,
    *,
    variant: str = "base",
    save: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, BaseCache]:
    """Score the base and leave its hidden states in a cache.

    Args:
        scorer: the base.
        settings: text and statistics.
        cache_root: folder of caches; a cache of the same protocol and model is reused.
        model: hash of the base checkpoint.
        variant: its name in the results.
        save: where its token scores go (.npz).
        progress: called with (batches done, batches in all).
    """
    started = time.monotonic()
    protocol = protocol_of(settings.text, scorer, settings.batch)
    cache = BaseCache.at(cache_root, settings.text, protocol, model)
    fill(cache, scorer, settings.text, progress)
    scores = score_base(cache, scorer, settings.text, variant)
    floor = _noise_floor(scorer, settings, cache) if settings.noise_floor else None
    return _evaluation(scores, scorer, settings, started, save, floor), cache


def evaluate(
    scorer: Scorer,
    settings: Settings,
    cache: BaseCache,
    head: Scorer,
    *,
    variant: str,
    save: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a variant and its distance from the base.

    Args:
        scorer: the variant.
        settings: those of the base.
        cache: from `evaluate_base`.
        head: the base's head; only its `logits` is called.
        variant: its name in the results.
        save: where its token scores go (.npz), for later comparisons.

    Raises:
        UsageError: it cannot be paired with the base; names the fields that differ.
    """
    started = time.monotonic()
    scores = score_variant(scorer, settings.text, cache, head, variant, progress=progress)
    return _evaluation(scores, scorer, settings, started, save)


def _noise_floor(scorer: Scorer, settings: Settings, cache: BaseCache) -> Divergence:
    """What rounding alone does: the base against itself, with windows grouped otherwise."""
    other = settings.batch // 2 or 2
    scores = score_variant(scorer, settings.text, cache, scorer, "noise floor", batch=other)
    return Summary(scores, settings.resamples, settings.seed).divergence()


def _evaluation(
    scores: TokenScores,
    scorer: Scorer,
    settings: Settings,
    started: float,
    save: Path | None,
    noise_floor: Divergence | None = None,
) -> Evaluation:
    if save:
        scores.save(save)
    summary = Summary(scores, settings.resamples, settings.seed)
    return Evaluation(
        variant=scores.variant,
        protocol=scores.protocol,
        overall=summary.overall(settings.in_calibration),
        domains=summary.domains(settings.in_calibration),
        worst=summary.worst(),
        worst_tokens=summary.worst_tokens(settings.text, settings.tokenizer),
        kl_by_position=summary.kl_by_position(),
        seconds=time.monotonic() - started,
        peak_bytes=_peak_bytes(scorer.device),
        noise_floor=noise_floor,
    )


def _peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
