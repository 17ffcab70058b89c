"""Measure a base and any number of variants of it, with everything on disk as soon as it is known.

A session owns one folder: `NAME.npz` (token scores) and `NAME.json` (results) for every variant.
The base's hidden states lie in a second, disposable folder and are computed again if it is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from pydantic import ValidationError

from compressor.errors import UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.measure import BaseCache, Progress, TokenScores, fill, protocol_of
from compressor.evaluation.protocols import batches, tokenize
from compressor.evaluation.results import Estimate, Evaluation
from compressor.evaluation.run import Settings, evaluate, evaluate_base
from compressor.evaluation.scoring import Scorer, StreamingScorer, TransformersScorer, can_stream
from compressor.evaluation.suites import EvaluationText, load_text
from compressor.evaluation.summary import compare
from compressor.formats.atomic import atomic_write_json
from compressor.model.load import load_tokenizer
from compressor.model.memory import return_memory
from compressor.progress import Observer, Task

BASE = "base"


@dataclass(frozen=True)
class Session:
    """One base, one text, one machine.

    Attributes:
        config: text, windows and statistics.
        base: checkpoint that all variants are compared with.
        base_sha256: hash of its weights; keys the cache of hidden states.
        context_length: of the base, tokens.
        seen: domains of the calibration text; None when nothing was calibrated.
        folder: results.
        cache: hidden states of the base.
        device, dtype: of every forward pass.
        activation_budget: bytes of activations kept in memory.
        observer: told of progress.
    """

    config: EvaluateConfig
    base: Path
    base_sha256: str
    context_length: int
    seen: frozenset[str] | None
    folder: Path
    cache: Path
    device: torch.device
    dtype: torch.dtype
    activation_budget: int
    observer: Observer

    def measure(self, name: str, checkpoint: Path) -> Evaluation:
        """Score `checkpoint` against the base and write the results.

        Args:
            name: `base` for the base itself, any other for a variant.
            checkpoint: directory that transformers loads.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._progress(f"evaluate {name}") as progress:
            evaluation = self._score(name, checkpoint, progress)
        return_memory()  # the heads
        atomic_write_json(self._path(name, "json"), evaluation.model_dump(mode="json"))
        return evaluation

    def load(self, name: str) -> Evaluation:
        """A result that `measure` wrote.

        Raises:
            FileNotFoundError: it wrote none.
            ValidationError: the file has been damaged since.
        """
        return Evaluation.model_validate_json(self._path(name, "json").read_bytes())

    def scores(self, name: str) -> TokenScores:
        """Every token's scores that `measure` wrote."""
        return TokenScores.load(self._path(name, "npz"))

    def delta(self, parent: str, child: str) -> Estimate:
        """Difference in bits per byte over all domains, child minus parent, paired."""
        return compare(
            self.scores(parent), self.scores(child), self.config.resamples, self.config.seed
        ).overall.delta_bits_per_byte

    @property
    def tokenizer(self) -> Any:
        """The base's, loaded anew: it takes more memory than all text that it cuts.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        return load_tokenizer(self.base)

    @cached_property
    def text(self) -> EvaluationText:
        """The documents, before any tokenizer."""
        return load_text(self.config)

    @cached_property
    def settings(self) -> Settings:
        """Windows and statistics that all variants share."""
        seen = self.seen
        return Settings(
            text=tokenize(self.text, self.tokenizer, max_length=self.context_length),
            tokenizer=lambda: self.tokenizer,
            batch=self.config.batch_size,
            resamples=self.config.resamples,
            seed=self.config.seed,
            noise_floor=self.config.noise_floor,
            in_calibration=None if seen is None else {n: n in seen for n in self.text.domains},
        )

    def holds(self, name: str) -> bool:
        """Whether the results of a variant are on disk, and whole."""
        try:
            self.load(name), self.scores(name)
        except (FileNotFoundError, ValidationError, UsageError):
            return False
        return True

    def _path(self, name: str, suffix: str) -> Path:
        """A file of a variant; its name may be a path as typed, and has then no separators."""
        return self.folder / f"{quote(name, safe='')}.{suffix}"

    def _score(self, name: str, checkpoint: Path, progress: Progress) -> Evaluation:
        scorer = self.scorer(checkpoint)
        scores = self._path(name, "npz")
        if name == BASE:
            return evaluate_base(
                scorer, self.settings, self.cache, self.base_sha256, save=scores, progress=progress
            )[0]
        return evaluate(
            scorer,
            self.settings,
            self._base_states(scorer),
            self._base_head(scorer),
            variant=name,
            save=scores,
            progress=progress,
        )

    def scorer(self, checkpoint: Path) -> Scorer:
        """Block by block where that is possible; whole for packed and unknown checkpoints."""
        if not can_stream(checkpoint):
            return TransformersScorer(checkpoint, self.device, self.dtype)
        return StreamingScorer(
            checkpoint,
            self.device,
            self.dtype,
            scratch=self.cache / "blocks",
            budget=self.activation_budget,
            observer=self.observer,
        )

    def _base_head(self, scorer: Scorer) -> Scorer:
        """What turns the base's states into logits: the variant itself where it has its head."""
        base = self.scorer(self.base)
        if isinstance(scorer, StreamingScorer) and isinstance(base, StreamingScorer):
            return scorer if scorer.has_head_of(base) else base
        return base

    def _base_states(self, scorer: Scorer) -> BaseCache:
        """The base's hidden states; what a crash or a clean-up took is computed again."""
        text = self.settings.text
        protocol = protocol_of(text, scorer, self.settings.batch)
        cache = BaseCache.at(self.cache, text, protocol, self.base_sha256)
        shards = range(len(batches(text, cache.batch)))
        if not all(cache.shard(number).is_file() for number in shards):
            fill(cache, self.scorer(self.base), text)
        return cache

    @contextmanager
    def _progress(self, label: str) -> Iterator[Progress]:
        """A callback (done, total) that feeds the observer."""
        with ExitStack() as stack:
            task: Task | None = None

            def progress(done: int, total: int) -> None:
                nonlocal task
                if task is None:
                    task = stack.enter_context(self.observer.task(label, total))
                task.advance()

            yield progress
