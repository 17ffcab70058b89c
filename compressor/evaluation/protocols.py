"""From text to windows of tokens with scored positions: three protocols, three numbers.

| id          | text                             | window                             | scored     |
|-------------|----------------------------------|------------------------------------|------------|
| `rolling`   | each document alone              | disjoint, the last one slides back | all, once  |
| `gptq`      | documents joined by a blank line | disjoint, the tail is dropped      | all but 1st|
| `llama.cpp` | documents joined by a blank line | disjoint, BOS over the first token | second half|

A perplexity of one protocol says nothing about one of another. Sources: `rolling` is
lm-evaluation-harness `get_rolling_token_windows(context_len=1)` with `make_disjoint_window`;
`gptq` is the loop of the GPTQ authors' `opt_eval`; `llama.cpp` is `perplexity.cpp`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import TextError, UsageError
from compressor.evaluation.config import ProtocolName
from compressor.evaluation.suites import EvaluationText
from compressor.text import Document

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """A tokenised text.

    Attributes:
        ids: int64 [n].
        sizes: int64 [n], the UTF-8 bytes each token stands for; they sum to those of the text.
    """

    ids: Ints
    sizes: Ints


@dataclass(frozen=True)
class Window:
    """Tokens that one forward pass sees, some of which are scored.

    Attributes:
        tokens: int64 [n]; tokens[first:] are scored, each from the state before it.
        first: index of the first scored token, at least 1.
        sizes: int64 [n - first], the UTF-8 bytes each scored token stands for.
        domain: domain of the text.
        document: id of the document, or of the window where documents are joined.
        cluster: unit the bootstrap resamples, numbered from 0 within the domain.
    """

    tokens: Ints
    first: int
    sizes: Ints
    domain: str
    document: str
    cluster: int

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class TokenizedText:
    """Everything a scorer needs, and what must be said beside the numbers.

    Attributes:
        windows: in the order of domains and text.
        domains: names, in order.
        id, length, stride, bos: the protocol; see `results.Protocol`.
    """

    windows: tuple[Window, ...]
    domains: tuple[str, ...]
    id: ProtocolName
    length: int
    stride: int
    bos: str
    suite: str
    text_sha256: str
    tokenizer_sha256: str
    documents_limit: int | None


def rolling(tokens: Ints, prefix: int, length: int) -> Iterator[tuple[Ints, int]]:
    """Windows of one document in which every token is scored exactly once.

    The first window starts with `prefix`; the others are disjoint, except that the last one
    reaches back so that it, too, holds `length` inputs and its tokens keep a long context.

    Yields:
        (tokens [at most length + 1], index of the first scored one). The last token is only
        predicted, so the model never sees more than `length`.
    """
    padded = np.concatenate([[prefix], tokens])
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        begin = max(0, end - length)
        yield padded[begin : end + 1], start - begin + 1


def gptq(tokens: Ints, length: int) -> Iterator[tuple[Ints, int]]:
    """Disjoint windows of `length`; the tail is dropped, the first token is not predicted."""
    for start in range(0, len(tokens) - length + 1, length):
        yield tokens[start : start + length], 1


def llama_cpp(tokens: Ints, bos: int | None, length: int) -> Iterator[tuple[Ints, int]]:
    """Disjoint windows of `length`, of which the tokens after the middle one are scored.

    `bos` overwrites the first token of a window where the tokenizer puts one before a text
    (None where it does not), as `perplexity.cpp` does with `add_bos`.
    """
    for window, _ in gptq(tokens, length):
        tokens_seen = window if bos is None else np.concatenate([[bos], window[1:]])
        yield tokens_seen, length // 2 + 1


def encode(tokenizer: Any, text: str, special: bool) -> Tokens:
    """Tokenise `text` and count the bytes behind every token.

    A token stands for what lies between the end of the one before and its own end; a character
    that several tokens share counts with the first of them, and what the tokenizer drops at the
    end counts with the last token, so the sizes sum to the bytes of the text exactly.

    Raises:
        UsageError: the tokenizer cannot say which characters a token came from.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            "evaluation needs a fast tokenizer (tokenizer.json): bytes per token are counted "
            "from its character offsets"
        )
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    if ends:
        ends[-1] = len(text)
    before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    at_end = before[np.asarray(ends, dtype=np.int64)]
    return Tokens(ids, np.diff(at_end, prepend=0).astype(np.int64))


def tokenize(
    text: EvaluationText, tokenizer: Any, *, max_length: int | None = None
) -> TokenizedText:
    """Cut the text into windows.

    Args:
        text: what to score.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: context of the model, in tokens. A longer window of a suite shrinks to it; one
            that the user asked for is refused.

    Raises:
        UsageError: the window exceeds the context, or the tokenizer lacks what we need.
        TextError: a domain is shorter than one window.
    """
    length = _fit(text, max_length)
    bos = _bos_before_text(tokenizer)
    windows = tuple(
        window
        for domain, documents in text.domains.items()
        for window in _windows(text.protocol, domain, documents, tokenizer, length, bos)
    )
    return TokenizedText(
        windows=windows,
        domains=tuple(text.domains),
        id=text.protocol,
        length=length,
        stride=length,
        bos=_bos_policy(text.protocol, bos is not None),
        suite=text.suite,
        text_sha256=text.sha256,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        documents_limit=text.documents_limit,
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that decides the ids; padding and truncation do not."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fit(text: EvaluationText, max_length: int | None) -> int:
    if max_length is None or text.length <= max_length:
        return text.length
    if text.length_is_fixed:
        raise UsageError(
            f"evaluate.length is {text.length}, but the model's context holds {max_length} tokens",
            f"length: {max_length}",
        )
    return max_length


def _bos_before_text(tokenizer: Any) -> int | None:
    """The BOS id, if the tokenizer puts it before a text by itself."""
    bos: int | None = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def _bos_policy(protocol: ProtocolName, added: bool) -> str:
    if protocol == "rolling":
        return "prefix"
    if protocol == "llama.cpp" and added:
        return "replace-first"
    return "once" if added else "none"


def _prefix(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError(
        "the rolling protocol needs a BOS or EOS token to predict the first token from; "
        "this tokenizer has neither",
        "protocol: gptq",
    )


def _windows(
    protocol: ProtocolName,
    domain: str,
    documents: Sequence[Document],
    tokenizer: Any,
    length: int,
    bos: int | None,
) -> list[Window]:
    if protocol == "rolling":
        return _rolling_windows(domain, documents, tokenizer, length)
    tokens = encode(tokenizer, "\n\n".join(document.text for document in documents), special=True)
    parts = list(
        gptq(tokens.ids, length) if protocol == "gptq" else llama_cpp(tokens.ids, bos, length)
    )
    if not parts:
        raise TextError(
            f"domain {domain!r} has {len(tokens.ids)} tokens, fewer than one window of {length}",
            "take more documents, or a shorter evaluate.length",
        )
    return [
        Window(ids, first, tokens.sizes[index * length + first : (index + 1) * length],
               domain, f"window {index}", index)
        for index, (ids, first) in enumerate(parts)
    ]  # fmt: skip


def _rolling_windows(
    domain: str, documents: Sequence[Document], tokenizer: Any, length: int
) -> list[Window]:
    """Documents are the clusters; where there is one document only, its windows are."""
    prefix = _prefix(tokenizer)
    windows: list[Window] = []
    for index, document in enumerate(documents):
        tokens = encode(tokenizer, document.text, special=False)
        done = 0
        for ids, first in rolling(tokens.ids, prefix, length):
            scored = len(ids) - first
            cluster = index if len(documents) > 1 else len(windows)
            sizes = tokens.sizes[done : done + scored]
            windows.append(Window(ids, first, sizes, domain, document.id, cluster))
            done += scored
    if not windows:
        raise TextError(f"domain {domain!r} has no token to score")
    return windows


def batches(text: TokenizedText, size: int) -> list[list[int]]:
    """Indices of windows that go through the model together, longest first.

    Sorting by length keeps padding low; the order depends on the text and `size` only.
    """
    order = sorted(
        range(len(text.windows)), key=lambda index: (-len(text.windows[index].tokens), index)
    )
    return [order[start : start + size] for start in range(0, len(order), size)]
