"""What a draft is distilled on: text, partly the target's own, and what the target thinks of it.

Stored are token ids and hidden states in half precision, never logits: the head is applied again
when they are needed, on as many rows of the vocabulary as are needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode
from compressor.decoding.prompts import as_prompt, asking
from compressor.errors import TextError
from compressor.formats.atomic import replacing
from compressor.model.activations import ActivationStore
from compressor.model.architecture import Architecture
from compressor.numerics.speculative import Sampling
from compressor.progress import Observer
from compressor.types import TokenBatch

OWN = "own requests"
"""Domain of text that the target began itself."""

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


def cut_rows(batches: Sequence[TokenBatch], length: int) -> list[tuple[list[int], str]]:
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
) -> tuple[TokenBatch, ...]:
    """Text to distil on; taken from `folder` when an interrupted run left it there.

    Args:
        target: writes its share.
        batches: calibration text; a generated row begins with the beginning of one of its rows.
        tokenizer: the target's, for its chat template and the token that ends a row.
        options: how much.
        folder: keeps the result.
        observer: progress.

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
    writer = _Writer(target, tokenizer, options, folder)
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
    """The target writes its share of the text; every batch is kept as soon as it is there."""

    def __init__(
        self, target: CachedModel, tokenizer: Any, options: TextOptions, folder: Path
    ) -> None:
        self.target, self.tokenizer, self.options = target, tokenizer, options
        self.folder = folder / "written"
        end = tokenizer.eos_token_id
        self.stop: frozenset[int] = frozenset() if end is None else frozenset({end})
        self.around = asking(tokenizer) if options.own_requests else None

    def run(
        self, rows: Sequence[tuple[list[int], str]], observer: Observer
    ) -> list[tuple[list[int], str]]:
        """Continuations with what they continue, and the domains of what they began with."""
        found: list[tuple[list[int], str]] = []
        spent, starts = 0.0, range(0, len(rows), _TOGETHER)
        with observer.task("write text", len(starts)) as task:
            for number, start in enumerate(starts):
                part = rows[start : start + _TOGETHER]
                texts, seconds = self._batch(number, [row for row, _ in part])
                domains = [OWN if self.around else domain for _, domain in part]
                found += zip(texts, domains, strict=True)
                spent += seconds
                task.advance()
                if self.options.seconds is not None and spent > self.options.seconds:
                    break
        return found

    def _batch(self, number: int, rows: Sequence[list[int]]) -> tuple[list[list[int]], float]:
        """The texts of a batch and the seconds they took, from disk if they are there."""
        path = self.folder / f"{number:06d}.safetensors"
        if not path.is_file():
            began = time.monotonic()
            temperatures = self.options.temperatures
            texts = self._write(rows, temperatures[number % len(temperatures)], number)
            tensors = {f"{place:06d}": torch.tensor(text) for place, text in enumerate(texts)}
            with replacing(path) as temporary:
                save_file(tensors, temporary, {"seconds": str(time.monotonic() - began)})
        with safe_open(path, "pt") as file:
            kept = [file.get_tensor(name).tolist() for name in sorted(file.keys())]
            return kept, float(file.metadata()["seconds"])

    def _write(self, rows: Sequence[list[int]], temperature: float, number: int) -> list[list[int]]:
        options = self.options
        prompts = self._requests(len(rows), number) or [
            as_prompt(self.tokenizer, row[: options.prompt]) for row in rows
        ]
        decoded = decode(
            self.target,
            prompts,
            Limits(max(1, options.length - max(map(len, prompts))), self.stop),
            sampling=Sampling(temperature),
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


def _batched(rows: Sequence[tuple[list[int], str]], size: int) -> Iterator[TokenBatch]:
    """Padded to few different lengths: libraries build a kernel for every new shape."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = pad_sequence([torch.tensor(row) for row, _ in part], batch_first=True)
        ids = functional.pad(ids, (0, -ids.shape[1] % _LENGTHS))
        lengths = torch.tensor([len(row) for row, _ in part])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        yield TokenBatch(ids, mask, tuple(domain for _, domain in part))


class Corpus:
    """Batches of tokens with the target's hidden states at each of them.

    Args:
        target: a model in evaluation mode.
        batches: right-padded; causal attention keeps padding out of what is before it.
        layers: entries of transformers' `hidden_states` to keep as features.
        folder: for what exceeds the memory budget.
        budget: bytes held in memory.
        observer: progress.
    """

    def __init__(
        self,
        target: Any,
        batches: Sequence[TokenBatch],
        layers: Sequence[int],
        folder: Path,
        budget: int,
        observer: Observer,
    ) -> None:
        self.batches = tuple(batches)
        self._features = ActivationStore(folder / "features", budget // 2)
        self._hidden = ActivationStore(folder / "hidden", budget // 2)
        self.device: torch.device = next(target.parameters()).device
        with observer.task("read text", len(self.batches)) as task, torch.inference_mode():
            for batch in self.batches:
                states = self._states(target, batch)
                self._hidden.append(_half(states[-1]))
                if layers:
                    self._features.append(_half(torch.cat([states[i] for i in layers], -1)))
                task.advance()

    def _states(self, target: Any, batch: TokenBatch) -> tuple[Tensor, ...]:
        """The last entry is behind the final norm: it is what the head reads."""
        output = target(
            batch.input_ids.to(self.device), output_hidden_states=True, use_cache=False,
            logits_to_keep=1,
        )  # fmt: skip
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(int(batch.mask.sum()) for batch in self.batches)

    def at(self, step: int, seed: int) -> int:
        """The batch of a training step: every one once, in a new order each time round."""
        round_, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(seed + round_)
        return int(torch.randperm(len(self.batches), generator=generator)[place])

    def ids(self, number: int) -> Tensor:
        """Token ids int64 [B, T]."""
        return self.batches[number].input_ids.to(self.device)

    def mask(self, number: int) -> Tensor:
        """False on padding, bool [B, T]."""
        return self.batches[number].mask.to(self.device)

    def hidden(self, number: int) -> Tensor:
        """What the target's head read, fp32 [B, T, H]."""
        return self._hidden[number].to(self.device, torch.float32)

    def features(self, number: int) -> Tensor:
        """Hidden states of the layers side by side, fp32 [B, T, k·H]."""
        return self._features[number].to(self.device, torch.float32)

    def delete(self) -> None:
        """Free memory and files."""
        self._features.delete()
        self._hidden.delete()


def _half(states: Tensor) -> Tensor:
    """In half the bytes: fp16 has three more bits of mantissa than bf16, where its range does."""
    fits = bool(states.abs().max() < torch.finfo(torch.float16).max)
    return states.to(torch.float16 if fits else torch.bfloat16)


@dataclass(frozen=True)
class Head:
    """The target's last step, on all of its vocabulary or on some rows.

    Attributes:
        weight: [rows, H], in the precision of the product.
        bias: [rows] in the same, or None.
        divisor: logits are divided by it.
        softcap: and squashed into ± this, if any.
    """

    weight: Tensor
    bias: Tensor | None
    divisor: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype = torch.float32) -> Head:
        """The head of a model with all rows, in a precision of its own."""
        architecture = Architecture.from_config(model.config.get_text_config().to_dict())
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return cls(
            layer.weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            architecture.logits_divisor,
            architecture.logits_softcap,
        )

    def rows(self, ids: Tensor) -> Head:
        """On these tokens only."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of what the head reads, [..., H]."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits / self.divisor
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap
