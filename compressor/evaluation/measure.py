"""Run a model over the windows and keep what the statistics need, token by token.

The base leaves its final hidden states on disk (`BaseCache`); every variant is compared with
distributions recomputed from them, so no logits are ever stored and nothing is truncated.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import UsageError
from compressor.evaluation.divergence import (
    TokenDivergence,
    diverge,
    log_probabilities,
    negative_log_likelihood,
    rows_per_chunk,
)
from compressor.evaluation.protocols import TokenizedText, Window, batches
from compressor.evaluation.results import Protocol
from compressor.evaluation.scoring import Scorer
from compressor.formats.atomic import replacing
from compressor.types import TokenBatch

Progress = Callable[[int, int], None]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TokenScores:
    """One variant on every scored token, in the order of the text; arrays of one length n.

    Attributes:
        variant: its name.
        protocol: how it was measured.
        domains: names that `domain` indexes.
        domain: int16. cluster: int32, unit of resampling within the domain.
        position: int32, tokens of context before the scored one.
        sizes: int32, UTF-8 bytes the token stands for.
        nll, base_nll: float32, nats. top1, base_top1: int32, arg-max tokens.
        kl, reverse_kl: float32, nats, from and to the base; zero for the base itself.
        is_base: there was nothing to compare with; the base columns repeat the own ones.
    """

    variant: str
    protocol: Protocol
    domains: tuple[str, ...]
    is_base: bool
    domain: NDArray[np.int16]
    cluster: NDArray[np.int32]
    position: NDArray[np.int32]
    sizes: NDArray[np.int32]
    nll: NDArray[np.float32]
    top1: NDArray[np.int32]
    base_nll: NDArray[np.float32]
    base_top1: NDArray[np.int32]
    kl: NDArray[np.float32]
    reverse_kl: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write a compact .npz, in one step: a crash leaves the old file or the new one."""
        head = {
            "variant": self.variant,
            "protocol": self.protocol.model_dump(),
            "domains": self.domains,
            "is_base": self.is_base,
        }
        columns = {name: getattr(self, name) for name in _COLUMNS}
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, head=np.array(json.dumps(head)), **columns)

    @classmethod
    def load(cls, path: Path) -> TokenScores:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                columns = {name: file[name] for name in _COLUMNS}
        except (OSError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            raise UsageError(f"{path} holds no token scores: {error}") from error
        return cls(
            variant=head["variant"],
            protocol=Protocol.model_validate(head["protocol"]),
            domains=tuple(head["domains"]),
            is_base=head["is_base"],
            **columns,
        )


_COLUMNS = [
    field.name
    for field in fields(TokenScores)
    if field.name not in {"variant", "protocol", "domains", "is_base"}
]


def protocol_of(text: TokenizedText, scorer: Scorer, batch: int) -> Protocol:
    """Everything that must agree before a number of this scorer is paired with another."""
    return Protocol(
        id=text.id,
        length=text.length,
        stride=text.stride,
        bos=text.bos,
        suite=text.suite,
        text_sha256=text.text_sha256,
        tokenizer_sha256=text.tokenizer_sha256,
        dtype=scorer.dtype,
        backend=scorer.backend,
        batch=batch,
        documents_limit=text.documents_limit,
    )


def require_same(a: Protocol, b: Protocol) -> None:
    """Refuse to pair numbers that were not measured alike.

    Raises:
        UsageError: names every field that differs, with both values.
    """
    differing = [
        f"{name} ({getattr(a, name)!r} against {getattr(b, name)!r})"
        for name in Protocol.model_fields
        if getattr(a, name) != getattr(b, name)
    ]
    if differing:
        raise UsageError(
            f"the two measurements cannot be paired: they differ in {', '.join(differing)}",
            "measure both again with one suite, on one machine",
        )


class BaseCache:
    """The base's hidden states at every scored position, on disk.

    One safetensors file per batch, named only once it is whole; a run that was interrupted goes on
    with the first missing batch. The folder's name is a hash of protocol and model, so another
    text, batch size, precision or model never finds these states.

    Attributes:
        protocol: how the states were computed.
        batch: windows per batch.
    """

    def __init__(self, folder: Path, text: TokenizedText, protocol: Protocol) -> None:
        self.folder = folder
        self.protocol = protocol
        self.batch = protocol.batch
        self._rows: dict[int, tuple[Path, int, int]] = {}
        for number, indices in enumerate(batches(text, self.batch)):
            start = 0
            for index in indices:
                end = start + text.windows[index].scored
                self._rows[index] = (self.shard(number), start, end)
                start = end

    @classmethod
    def at(cls, root: Path, text: TokenizedText, protocol: Protocol, model: str) -> BaseCache:
        """The cache of this protocol and model under `root`; empty when new.

        Args:
            root: folder that holds caches.
            text: the windows.
            protocol: how they are scored.
            model: hash of the base checkpoint.
        """
        key = hashlib.sha256(f"{protocol.model_dump_json()}\0{model}".encode()).hexdigest()[:16]
        (root / key).mkdir(parents=True, exist_ok=True)
        return cls(root / key, text, protocol)

    def shard(self, number: int) -> Path:
        """File of one batch."""
        return self.folder / f"batch-{number:05d}.safetensors"

    def write(self, number: int, states: Tensor) -> None:
        """Store the states [n, H] of one batch."""
        with replacing(self.shard(number)) as part:
            save_file({"hidden": states.contiguous().cpu()}, part)

    def read(self, windows: list[int]) -> Tensor:
        """States [n, H] of some windows, one after the other."""
        pieces = []
        for index in windows:
            path, start, end = self._rows[index]
            with safe_open(path, framework="pt") as file:
                pieces.append(file.get_slice("hidden")[start:end])
        return torch.cat(pieces)


def fill(
    cache: BaseCache, scorer: Scorer, text: TokenizedText, progress: Progress | None = None
) -> None:
    """Compute the states that the cache still lacks."""
    groups = dict(enumerate(batches(text, cache.batch)))
    lacking = {n: group for n, group in groups.items() if not cache.shard(n).is_file()}
    states = scored_states(scorer, text, list(lacking.values()))
    for done, (number, own) in enumerate(zip(lacking, states, strict=True), start=1):
        cache.write(number, own)
        if progress:
            progress(done, len(lacking))


@torch.inference_mode()
def score_base(cache: BaseCache, head: Scorer, text: TokenizedText, variant: str) -> TokenScores:
    """Scores of the base itself, from its cached states."""
    out = _empty(text)
    for indices in batches(text, cache.batch):
        states = cache.read(indices).to(head.device)
        targets, slots = _targets(text, indices).to(head.device), _slots(text, indices)
        size = rows_per_chunk(head.vocab, head.device)
        for start in range(0, len(slots), size):
            part = slice(start, start + size)
            logits = head.logits(states[part])
            top1 = logits.max(-1).indices
            nll = negative_log_likelihood(log_probabilities(logits), targets[part])
            out["nll"][slots[part]] = out["base_nll"][slots[part]] = nll.cpu().numpy()
            out["top1"][slots[part]] = out["base_top1"][slots[part]] = top1.cpu().numpy()
    return TokenScores(variant, cache.protocol, text.domains, True, **_places(text), **out)


@torch.inference_mode()
def score_variant(
    scorer: Scorer,
    text: TokenizedText,
    cache: BaseCache,
    head: Scorer,
    variant: str,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Compare a model with the base on every scored token.

    Args:
        scorer: the variant.
        text: the windows the cache was filled with.
        cache: the base's states.
        head: the base's head (only `logits` is called).
        variant: name of the variant.
        batch: windows per batch; None is the batch of the cache. Another one is meant for the
            noise floor, the only case in which the protocols may differ.

    Raises:
        UsageError: the protocols or vocabularies differ.
    """
    protocol = protocol_of(text, scorer, batch or cache.batch)
    if batch is None:
        require_same(cache.protocol, protocol)
    if scorer.vocab != head.vocab:
        raise UsageError(
            f"{variant} has {scorer.vocab} logits and the base {head.vocab}: "
            "their distributions cannot be compared"
        )
    out = _empty(text)
    groups = batches(text, batch or cache.batch)
    states = scored_states(scorer, text, groups)
    for done, (indices, own) in enumerate(zip(groups, states, strict=True), start=1):
        _compare(scorer, own, text, cache, head, indices, out)
        if progress:
            progress(done, len(groups))
    return TokenScores(variant, protocol, text.domains, False, **_places(text), **out)


def scored_states(
    scorer: Scorer, text: TokenizedText, groups: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    """Per group of windows, the states [n, H] from which its scored tokens are predicted."""
    windows = [[text.windows[index] for index in group] for group in groups]
    hidden = scorer.states([token_batch(own) for own in windows])
    for own, states in zip(windows, hidden, strict=True):
        yield torch.cat([states[row, w.first - 1 : len(w.tokens) - 1] for row, w in enumerate(own)])


def token_batch(windows: list[Window]) -> TokenBatch:
    """Inputs of some windows, padded on the right; a last token that is only predicted is cut."""
    lengths = [len(window.tokens) - 1 for window in windows]
    ids = torch.zeros(len(windows), max(lengths), dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : lengths[row]] = torch.from_numpy(window.tokens[:-1])
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    return TokenBatch(ids, mask, tuple(window.domain for window in windows))


def _compare(
    scorer: Scorer,
    states: Tensor,
    text: TokenizedText,
    cache: BaseCache,
    head: Scorer,
    indices: list[int],
    out: Columns,
) -> None:
    """Fill the columns of one batch, some tokens at a time so that logits stay small."""
    base_states = cache.read(indices).to(head.device)
    targets, slots = _targets(text, indices).to(head.device), _slots(text, indices)
    size = rows_per_chunk(head.vocab, head.device)
    for start in range(0, len(slots), size):
        part = slice(start, start + size)
        logits = scorer.logits(states[part]).to(head.device)
        result = diverge(head.logits(base_states[part]), logits, targets[part])
        for field in fields(TokenDivergence):
            out[field.name][slots[part]] = getattr(result, field.name).cpu().numpy()


def _starts(text: TokenizedText) -> list[int]:
    counts = [window.scored for window in text.windows]
    return [0, *np.cumsum(counts).tolist()]


def _slots(text: TokenizedText, indices: list[int]) -> NDArray[np.int64]:
    """Where the scored tokens of these windows stand in the order of the text."""
    starts = _starts(text)
    return np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])


def _targets(text: TokenizedText, indices: list[int]) -> Tensor:
    windows = [text.windows[index] for index in indices]
    return torch.from_numpy(np.concatenate([w.tokens[w.first :] for w in windows]))


def _places(text: TokenizedText) -> Columns:
    """Domain, cluster, position and bytes of every scored token."""
    counts = [window.scored for window in text.windows]
    numbers = {name: number for number, name in enumerate(text.domains)}
    domain = np.repeat([numbers[window.domain] for window in text.windows], counts)
    cluster = np.repeat([window.cluster for window in text.windows], counts)
    position = np.concatenate([np.arange(w.first, len(w.tokens)) for w in text.windows])
    sizes = np.concatenate([window.sizes for window in text.windows])
    return {
        "domain": domain.astype(np.int16),
        "cluster": cluster.astype(np.int32),
        "position": position.astype(np.int32),
        "sizes": sizes.astype(np.int32),
    }


def _empty(text: TokenizedText) -> Columns:
    n = _starts(text)[-1]
    columns: Columns = {name: np.zeros(n, np.float32) for name in ("nll", "base_nll")}
    columns |= {name: np.zeros(n, np.float32) for name in ("kl", "reverse_kl")}
    return columns | {name: np.zeros(n, np.int32) for name in ("top1", "base_top1")}
