"""What a draft is distilled on: text, partly the target's own, and what the target thinks of it.

Stored are token ids and hidden states in half precision, never logits: the head is applied again
when they are needed, on as many rows of the vocabulary as are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode
from compressor.decoding.prompts import as_prompt
from compressor.errors import TextError
from compressor.formats.atomic import replacing
from compressor.model.activations import ActivationStore
from compressor.model.architecture import Architecture
from compressor.numerics.speculative import Sampling
from compressor.progress import Observer
from compressor.types import TokenBatch


@dataclass(frozen=True)
class TextOptions:
    """How much text, and of which kind.

    Attributes:
        tokens: in all, as near as whole rows come.
        length: tokens of a row.
        generated: share of rows that the target continues itself.
        prompt: tokens of such a row that are given.
        temperatures: taken in turn, batch by batch.
        batch: rows that go through a model together.
        seed: of rows and sampling.
    """

    tokens: int
    length: int
    generated: float
    prompt: int
    temperatures: tuple[float, ...]
    batch: int
    seed: int


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
    count = max(1, round(options.tokens / options.length))
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    chosen = [rows[order[place % len(order)]] for place in range(count)]
    own = round(options.generated * count)
    written = _written(target, chosen[:own], tokenizer, options, folder, observer)
    # Text of the corpus comes from the other end, so that as little as possible appears twice.
    given = [rows[order[-1 - place % len(order)]] for place in range(count - own)]
    mixed = [*written, *given]
    places = torch.randperm(len(mixed), generator=generator).tolist()
    return tuple(_batched([mixed[place] for place in places], options.batch))


def _written(
    target: CachedModel,
    rows: Sequence[tuple[list[int], str]],
    tokenizer: Any,
    options: TextOptions,
    folder: Path,
    observer: Observer,
) -> list[tuple[list[int], str]]:
    """The beginnings of rows with the target's continuations."""
    kept = folder / "written.safetensors"
    end = tokenizer.eos_token_id
    stop: frozenset[int] = frozenset() if end is None else frozenset({end})
    if not kept.is_file():
        found: dict[str, Tensor] = {}
        starts = range(0, len(rows), options.batch)
        with observer.task("write text", len(starts)) as task:
            for number, start in enumerate(starts):
                prompts = [
                    as_prompt(tokenizer, row[: options.prompt])
                    for row, _ in rows[start : start + options.batch]
                ]
                temperature = options.temperatures[number % len(options.temperatures)]
                decoded = decode(
                    target,
                    prompts,
                    Limits(max(1, options.length - max(map(len, prompts))), stop),
                    sampling=Sampling(temperature),
                    seed=options.seed + number,
                )
                for place, tokens in enumerate(decoded.tokens):
                    whole = torch.tensor([*prompts[place], *tokens])
                    found[f"{start + place:06d}"] = whole
                task.advance()
        with replacing(kept) as temporary:
            save_file(found, temporary)
    texts = load_file(kept)
    names = sorted(texts)
    return [(texts[name].tolist(), row[1]) for name, row in zip(names, rows, strict=True)]


def _batched(rows: Sequence[tuple[list[int], str]], size: int) -> Iterator[TokenBatch]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = pad_sequence([torch.tensor(row) for row, _ in part], batch_first=True)
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
        weight: fp32 [rows, H].
        bias: fp32 [rows] or None.
        divisor: logits are divided by it.
        softcap: and squashed into ± this, if any.
    """

    weight: Tensor
    bias: Tensor | None
    divisor: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a model with all rows."""
        architecture = Architecture.from_config(model.config.get_text_config().to_dict())
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return cls(
            layer.weight.detach().float(),
            None if bias is None else bias.detach().float(),
            architecture.logits_divisor,
            architecture.logits_softcap,
        )

    def rows(self, ids: Tensor) -> Head:
        """On these tokens only."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of what the head reads, [..., H]."""
        logits = functional.linear(hidden, self.weight, self.bias) / self.divisor
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap
