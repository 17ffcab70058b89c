"""What the benchmarks of drafts share: a stage run by itself, prompts, tokens a pass."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.calibration import CalibrationSet
from compressor.decoding.binding import FILE
from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode
from compressor.decoding.prompts import as_prompt
from compressor.decoding.proposals import Chain, Draft
from compressor.machine import activation_budget
from compressor.numerics.speculative import Sampling
from compressor.progress import Observer
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext


def finished(
    stage: StageConfig,
    target: Path,
    calibration: CalibrationSet,
    folder: Path,
    observer: Observer,
) -> Path:
    """The folder of a stage that ran on a target, now or in an earlier attempt.

    An attempt that was killed goes on from its checkpoint in `folder.work`.
    """
    done = FILE if stage.beside else "config.json"
    if not (folder / done).is_file():
        work = folder.with_name(folder.name + ".work")
        made = work / "made"
        stage.run(
            target,
            calibration,
            StageContext(
                folder=made,
                scratch=work / "scratch",
                device=torch.device("cpu"),
                dtype=torch.float32,
                activation_budget=activation_budget(),
                finished=(),
                block_done=lambda _: None,
                observer=observer,
                original=target,
            ),
        )
        made.rename(folder)
        shutil.rmtree(work)
    return folder


def beginnings(tokenizer: Any, texts: Sequence[str], tokens: int = 32) -> list[list[int]]:
    """Prompts that ask for the continuation of texts."""
    return [
        as_prompt(tokenizer, tokenizer(text, truncation=True, max_length=tokens)["input_ids"])
        for text in texts
    ]


def lengths(
    model: Any, draft: Draft, prompts: Sequence[Sequence[int]], drafted: int, new: int, heat: float
) -> list[list[int]]:
    """Tokens of every pass of the target, by prompt, without the last one, which is cut short."""
    found = decode(
        CachedModel(model, draft.layers), prompts, Limits(new), draft=draft, shape=Chain(drafted),
        sampling=Sampling(heat), seed=0,
    )  # fmt: skip
    return [[1 + block.accepted for block in row[:-1]] for row in found.blocks]


def per_pass(rows: Sequence[Sequence[int]]) -> float:
    """τ over all passes."""
    return sum(map(sum, rows)) / max(1, sum(map(len, rows)))


def difference(
    one: Sequence[Sequence[int]], other: Sequence[Sequence[int]], resamples: int = 2000
) -> tuple[float, float, float]:
    """τ of one minus that of the other, with its 95 % interval from resampled prompts.

    Both have the same prompts, which are drawn together.
    """
    sums = np.array([[sum(row) for row in rows] for rows in (one, other)], float)
    passes = np.array([[len(row) for row in rows] for rows in (one, other)], float)
    chosen = np.random.default_rng(0).integers(0, sums.shape[1], (resamples, sums.shape[1]))
    ratios = sums[:, chosen].sum(-1) / passes[:, chosen].sum(-1)
    low, high = np.quantile(ratios[0] - ratios[1], (0.025, 0.975))
    return per_pass(one) - per_pass(other), float(low), float(high)
