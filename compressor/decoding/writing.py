"""The text that a draft is distilled on: partly the target's own.

What the target writes is kept batch by batch, with a hash of what it was made from: an interrupted
run goes on behind it, and another one takes of it only what is the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from compressor.decoding.binding import fingerprint
from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode
from compressor.decoding.prompts import as_prompt, asking
from compressor.errors import TextError
from compressor.formats.atomic import replacing
from compressor.numerics.speculative import Sampling
from compressor.progress import Observer
from compressor.team import ALONE, Team
from compressor.types import TokenBatch

OWN = "own requests"
"""Domain of text that the target began itself."""

Row = tuple[list[int], str]
"""Tokens of a row and their domain."""

_LENGTHS = 32  # rows are padded to a multiple of it
_TOGETHER = 64  # rows written at once: a pass reads all weights whether for one row or for many


@dataclass(frozen=True)
class TextOptions:
    """How much text, and of which kind.

    Attributes:
        rows: in all.
        length: tokens of a row.
        generated: share of rows that the target continues itself.
        prompt: tokens of such a row that are given.
        temperatures: taken in turn, batch by batch.
        batch: rows that go through a model together.
        seed: of rows and sampling.
        own_requests: let a model with a chat template write the requests, too, that it answers.
        seconds: end writing after the first batch that is over later; None never does.
    """

    rows: int
    length: int
    generated: float
    prompt: int
    temperatures: tuple[float, ...]
    batch: int
    seed: int
    own_requests: bool = False
    seconds: float | None = None


def cut_rows(batches: Sequence[TokenBatch], length: int) -> list[Row]:
    """Rows of exactly `length` tokens and their domains, in the order of the text."""
    rows = []
    for batch in batches:
        for ids, mask, domain in zip(batch.input_ids, batch.mask, batch.domains, strict=True):
            tokens = ids[mask].tolist()
            for start in range(0, len(tokens) - length + 1, length):
                rows.append((tokens[start : start + length], domain))
    return rows


def draft_text(
    target: CachedModel,
    batches: Sequence[TokenBatch],
    tokenizer: Any,
    options: TextOptions,
    folder: Path,
    observer: Observer,
    team: Team = ALONE,
) -> tuple[TokenBatch, ...]:
    """Text to distil on; of `folder` is taken what an interrupted run left there.

    Args:
        target: writes its share.
        batches: calibration text; a generated row begins with the beginning of one of its rows.
        tokenizer: the target's, for its chat template and the token that ends a row.
        options: how much.
        folder: keeps what was written.
        observer: progress.
        team: processes that write together; all get all of it.

    Raises:
        TextError: the calibration text is shorter than one row.
    """
    rows = cut_rows(batches, options.length)
    if not rows:
        raise TextError(
            f"no calibration window holds the {options.length} tokens of a row",
            "raise calibration.length or lower the stage's `length`",
        )
    count = options.rows
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    chosen = [rows[order[place % len(order)]] for place in range(count)]
    own = round(options.generated * count)
    writer = _Writer(target, tokenizer, options, folder, team)
    written = writer.run(chosen[:own], observer)
    # Where writing was cut short, so is the rest: the shares stay as they were asked for. Text of
    # the corpus comes from the other end, so that as little as possible appears twice.
    others = round((count - own) * (len(written) / own if own else 1))
    given = [rows[order[-1 - place % len(order)]] for place in range(others)]
    mixed = [*written, *given]
    places = torch.randperm(len(mixed), generator=generator).tolist()
    # Rows of like length together, for less padding; the longest first, so that what is needed for
    # shorter ones finds room where that of longer ones was.
    ordered = sorted((mixed[place] for place in places), key=lambda row: -len(row[0]))
    return tuple(_batched(ordered, options.batch))


class _Writer:
    """The target writes its share of the text; what is there is kept.

    Processes that write together take a batch each, so that what stands in one depends on nothing
    but the batch. Files and clock are those of the leader.
    """

    def __init__(
        self,
        target: CachedModel,
        tokenizer: Any,
        options: TextOptions,
        folder: Path,
        team: Team,
    ) -> None:
        self.target, self.tokenizer, self.options = target, tokenizer, options
        self.folder, self.team = folder / "written", team
        end = tokenizer.eos_token_id
        self.stop: frozenset[int] = frozenset() if end is None else frozenset({end})
        self.around = asking(tokenizer) if options.own_requests else None

    def run(self, rows: Sequence[Row], observer: Observer) -> list[Row]:
        """Continuations with what they continue, and the domains of what they began with."""
        found: list[Row] = []
        parts = [rows[start : start + _TOGETHER] for start in range(0, len(rows), _TOGETHER)]
        spent, limit = 0.0, self.options.seconds
        with observer.task("write text", len(parts)) as task:
            for number, part in enumerate(parts):
                texts, seconds = self._batch(number, parts)
                domains = [OWN if self.around else domain for _, domain in part]
                found += zip(texts, domains, strict=True)
                spent += seconds
                task.advance()
                if limit is not None and spent > limit:
                    break
        return found

    def _batch(self, number: int, parts: Sequence[Sequence[Row]]) -> tuple[list[list[int]], float]:
        """The texts of a batch and the seconds they took, on every process."""
        team = self.team
        missing = team.hear(self._missing(number, parts) if team.leads else None)
        if missing:
            self._write_together(missing, parts)
        texts, seconds = team.hear(self._kept(number) if team.leads else None)
        return texts, seconds

    def _missing(self, number: int, parts: Sequence[Sequence[Row]]) -> list[int]:
        """A batch that is not on disk, and later ones for other processes; none if it is there."""
        if self._is_kept(number, parts[number]):
            return []
        later = range(number + 1, len(parts))
        lacking = (other for other in later if not self._is_kept(other, parts[other]))
        return [number, *islice(lacking, self.team.size - 1)]

    def _write_together(self, numbers: Sequence[int], parts: Sequence[Sequence[Row]]) -> None:
        """Write a batch on each process, and keep them."""
        began, rank = time.monotonic(), self.team.rank
        own: list[list[int]] = []
        if rank < len(numbers):
            own = self._write(numbers[rank], [row for row, _ in parts[numbers[rank]]])
        written = self.team.gather(own)
        if not self.team.leads:
            return
        seconds = time.monotonic() - began
        for number, texts in zip(numbers, written[: len(numbers)], strict=True):
            # What they took together counts once, where all of them are used.
            took = seconds if number == numbers[-1] else 0.0
            facts = {"seconds": str(took), "origin": self._origin(number, parts[number])}
            tensors = {f"{place:06d}": torch.tensor(text) for place, text in enumerate(texts)}
            with replacing(self._path(number)) as temporary:
                save_file(tensors, temporary, facts)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _kept(self, number: int) -> tuple[list[list[int]], float]:
        with safe_open(self._path(number), "pt") as file:
            texts = [file.get_tensor(name).tolist() for name in sorted(file.keys())]
            return texts, float(file.metadata()["seconds"])

    def _is_kept(self, number: int, rows: Sequence[Row]) -> bool:
        """Whether a batch is on disk and was made from what it would be made from now."""
        if not self._path(number).is_file():
            return False
        with safe_open(self._path(number), "pt") as file:
            return bool(file.metadata().get("origin") == self._origin(number, rows))

    @cached_property
    def _target(self) -> str:
        return fingerprint(self.target.model)

    def _origin(self, number: int, rows: Sequence[Row]) -> str:
        """SHA-256 of what the text of a batch is made from."""
        options = self.options
        made_from = {
            "target": self._target,
            "template": getattr(self.tokenizer, "chat_template", None),
            "stop": sorted(self.stop),
            "asked": self.around or [row[: options.prompt] for row, _ in rows],
            "rows": len(rows),
            "length": options.length,
            "temperature": self._temperature(number),
            "seed": options.seed + number,
        }
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def _temperature(self, number: int) -> float:
        return self.options.temperatures[number % len(self.options.temperatures)]

    def _write(self, number: int, rows: Sequence[list[int]]) -> list[list[int]]:
        options = self.options
        prompts = self._requests(len(rows), number) or [
            as_prompt(self.tokenizer, row[: options.prompt]) for row in rows
        ]
        decoded = decode(
            self.target,
            prompts,
            Limits(max(1, options.length - max(map(len, prompts))), self.stop),
            sampling=Sampling(self._temperature(number)),
            seed=options.seed + number,
        )
        return [[*prompt, *tokens] for prompt, tokens in zip(prompts, decoded.tokens, strict=True)]

    def _requests(self, count: int, number: int) -> list[list[int]]:
        """What a user might ask, drawn from the model; nothing without a chat template."""
        if self.around is None:
            return []
        before, after = self.around
        limits = Limits(self.options.length // 4, self.stop | {after[0]})
        asked = decode(
            self.target, [before] * count, limits, sampling=Sampling(1.0),
            seed=self.options.seed + number,
        )  # fmt: skip
        return [
            [*before, *(token for token in tokens if token not in limits.stop), *after]
            for tokens in asked.tokens
        ]


def _batched(rows: Sequence[Row], size: int) -> Iterator[TokenBatch]:
    """Padded to few different lengths: libraries build a kernel for every new shape."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = pad_sequence([torch.tensor(row) for row, _ in part], batch_first=True)
        ids = functional.pad(ids, (0, -ids.shape[1] % _LENGTHS))
        lengths = torch.tensor([len(row) for row, _ in part])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        yield TokenBatch(ids, mask, tuple(domain for _, domain in part))
