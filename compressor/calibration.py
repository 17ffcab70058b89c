"""From a recipe's `calibration` section to token batches.

Text comes from a mix of the shipped domains or from one source of the user's: a file, a folder,
a saved dataset or a dataset of the Hub. Documents are put in an order fixed by the seed,
tokenized, and packed into windows (or padded, one document a row). The number of rows is exactly
`samples`; domains get theirs by largest remainder. The same config and tokenizer give the same
bytes, and `CalibrationSet.sha256` says so in the lock file.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from compressor import resources, text
from compressor.diagnose import read_model
from compressor.errors import RecipeError, TextError, guess
from compressor.section import Section
from compressor.text import Document
from compressor.text_sources import (
    SUFFIXES,
    Amount,
    has_text,
    local_files,
    most_in,
    numbered_rows,
)
from compressor.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER_DOMAIN = "user"  # the domain of text that the user brings
DEVELOPMENT_WINDOWS, DEVELOPMENT_LENGTH = 8, 256  # of every domain; tokens a window
_SHARE_TOLERANCE = 1e-6
_OF_SOURCE = ("split", "column", "subset", "revision", "streaming", "chat_template")
_COLUMNS = ("column", "chat_template")
_READ = {".txt": (), ".md": (), ".jsonl": _COLUMNS, ".parquet": _COLUMNS}


class CalibrationConfig(Section):
    """Which text the stages may look at, and how much of it.

    Either `mix` (a shipped name, or the path of a YAML file like those in calibration/mixes) or
    `source` (a .txt, .md, .jsonl or .parquet file, a folder of such, a dataset saved by
    `datasets`, or a Hub id). `samples` windows of `length` tokens are drawn.
    """

    mix: str = Field(
        default="default",
        description="A shipped mix of domains (`compress ls mixes`), or the path of a YAML file of "
        "the same form.",
    )
    source: str | None = Field(
        default=None,
        description="Your own text in place of a mix: a .txt, .md, .jsonl or .parquet file, a "
        "folder of such, a dataset saved by `datasets`, or the id of a dataset on the Hub.",
    )
    split: str = Field(default="train", description="Split of a dataset.")
    column: str | None = Field(
        default=None,
        description="Column that holds the text; `text` by default, `messages` with "
        "`chat_template`.",
    )
    subset: str | None = Field(default=None, description="Configuration of a dataset on the Hub.")
    revision: str | None = Field(
        default=None, description="Commit, branch or tag of a dataset on the Hub."
    )
    streaming: bool = Field(
        default=False,
        description="Read a dataset of the Hub row by row, in its own order, only as far as "
        "needed.",
    )
    chat_template: bool = Field(
        default=False,
        description="The column holds conversations; the tokenizer's chat template writes them "
        "out.",
    )
    pack: bool = Field(
        default=True,
        description="Cut windows from a stream of documents; otherwise a window is the head of "
        "one document, padded at its end. Padding never enters statistics.",
    )
    samples: int = Field(default=128, gt=0, description="Windows, over all domains.")
    length: int = Field(default=512, ge=8, description="Tokens a window.")
    batch_size: int = Field(
        default=8, gt=0, description="Windows that go through the model together."
    )
    seed: int = Field(default=0, ge=0, description="Of the order of documents and windows.")

    @model_validator(mode="after")
    def _one_origin(self) -> CalibrationConfig:
        """A default spelled out says nothing, so that lock files, which hold them all, load."""
        if self.source is not None and self.mix != self._default("mix"):
            raise ValueError("`mix` and `source` exclude each other: name one of them")
        stray = [name for name in _OF_SOURCE if getattr(self, name) != self._default(name)]
        if self.source is None and stray:
            raise ValueError(f"`{stray[0]}` describes a `source`, and none is named")
        suffix = Path(self.source or "").suffix
        read = _READ.get(suffix, _OF_SOURCE)
        if idle := [f"`{name}`" for name in stray if name not in read]:
            raise ValueError(f"{', '.join(idle)} has no effect on a {suffix} file: leave it out")
        return self

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].default


class Mix(Section):
    """Shares of the shipped domains, as calibration/mixes/*.yaml hold them."""

    name: str
    description: str
    domains: dict[str, float]

    @field_validator("domains")
    @classmethod
    def _shares(cls, domains: dict[str, float]) -> dict[str, float]:
        for name, share in domains.items():
            if not share > 0:
                raise ValueError(f"the share of {name!r} is {share}; shares must be positive")
        total = sum(domains.values())
        if not abs(total - 1) <= _SHARE_TOLERANCE:
            raise ValueError(f"the shares sum to {total:g}; they must sum to 1")
        return domains


@dataclass(frozen=True)
class CalibrationSet:
    """What the stages see.

    Attributes:
        batches: rows of all domains, shuffled by the seed; the last batch may be smaller.
        documents: every document that gave at least one token, for contamination checks.
        tokens: unpadded tokens by domain.
        sha256: of all token ids, row lengths and row domains, in order.
    """

    batches: tuple[TokenBatch, ...]
    documents: tuple[Document, ...]
    tokens: dict[str, int]
    sha256: str


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    domain: str


def mixes() -> tuple[str, ...]:
    """Names of the shipped mixes, sorted."""
    return tuple(sorted(path.stem for path in _mix_folder().glob("*.yaml")))


def load_mix(mix: str) -> Mix:
    """A shipped mix by name, or one of the user's by path.

    Raises:
        TextError: no such mix.
        RecipeError: a broken file, shares that do not sum to 1, unknown domains; all of them.
    """
    loaded, source = read_model(_mix_path(mix), Mix, "the mix")
    valid = text.domains(resources.calibration(), "calibration")
    if unknown := [domain for domain in loaded.domains if domain not in valid]:
        raise RecipeError(
            source.problem(
                ("domains", domain),
                f"there is no domain {domain!r} with calibration text",
                f"{guess(domain, valid)}domains: {', '.join(valid)}",
                at_key=True,
            )
            for domain in unknown
        )
    return loaded


def _mix_folder() -> Path:
    return resources.calibration() / "mixes"


def _mix_path(mix: str) -> Path:
    if mix in mixes():
        return _mix_folder() / f"{mix}.yaml"
    path = Path(mix).expanduser()
    if path.is_file():
        return path
    hint = f"{guess(mix, mixes())}shipped: {', '.join(mixes())}; or give the path of a YAML file"
    raise TextError(f"there is no calibration mix {mix!r}", hint)


# Documents


def require_origin(config: CalibrationConfig) -> None:
    """Check that the mix exists, or that a source on this machine holds text.

    Raises:
        TextError: it does not, or what it holds cannot be read.
    """
    if config.source is None:
        load_mix(config.mix)
        return
    path = Path(config.source).expanduser()
    local = path.suffix in SUFFIXES or config.source.startswith((".", "/", "~"))
    if local and not path.exists():
        raise TextError(f"calibration source {config.source} does not exist")
    written = [has_text(file) for file in local_files(config.source)]
    if written and not any(written):
        raise TextError(f"{config.source} holds no text")


def require_enough(config: CalibrationConfig) -> None:
    """Refuse more windows than the text can fill; no tokenizer makes more of it.

    Raises:
        TextError: a domain cannot fill its share.
    """
    held = _most(config)
    shares = {USER_DOMAIN: 1.0} if config.source else load_mix(config.mix).domains
    for domain, count in apportion(shares, config.samples).items():
        if domain not in held:
            continue
        most = held[domain]
        # A window may begin with a token of its own.
        if config.pack and count * (config.length - 1) > most.tokens:
            have, need = f"at most {most.tokens:,} tokens", f"{count * config.length:,}"
            raise _too_little(domain, have, need, config)
        if not config.pack and count > most.documents:
            raise _too_little(domain, f"at most {most.documents:,} documents", f"{count:,}", config)


def _most(config: CalibrationConfig) -> dict[str, Amount]:
    """By domain, as far as it is known without reading the text."""
    if config.source is None:
        return _most_shipped()
    files = local_files(config.source)
    most = sum(map(most_in, files), Amount(sys.maxsize if config.chat_template else 0, 0))
    return {USER_DOMAIN: most} if files else {}


def _most_shipped() -> dict[str, Amount]:
    """By domain: a token a byte, and two around every document."""
    held: dict[str, Amount] = {}
    for shard in text.shards(resources.calibration()):
        if shard.split == "calibration":
            most = Amount(shard.bytes + 2 * shard.documents, shard.documents)
            held[shard.domain] = held.get(shard.domain, Amount(0, 0)) + most
    return held


def load_documents(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Document]:
    """Every document the config names, domain by domain, in the order fixed by the seed.

    A streamed source is read to its end; `build_batches` reads only what it needs. The tokenizer
    is needed for `chat_template` only.

    Raises:
        TextError: the text is missing, empty, or not of the kind the config says.
        ResourceError: the Hub cannot be reached.
        AccessError: the Hub wants credentials.
    """
    found = _origins(config, tokenizer)
    return [document for _, documents in found.values() for document in documents]


def _origins(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, tuple[float, Iterator[Document]]]:
    """Share and documents by domain."""
    if config.source is not None:
        return {USER_DOMAIN: (1.0, _user_documents(config, config.source, tokenizer))}
    shares = load_mix(config.mix).domains
    return {name: (share, _domain_documents(config, name)) for name, share in shares.items()}


def _domain_documents(config: CalibrationConfig, domain: str) -> Iterator[Document]:
    documents = text.calibration_documents(domain)
    random.Random(f"{config.seed}/{domain}").shuffle(documents)
    yield from documents


def _user_documents(
    config: CalibrationConfig, source: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Document]:
    """Non-empty documents of the user's source.

    Raises:
        TextError: there is none.
    """
    column = config.column or ("messages" if config.chat_template else "text")
    if config.chat_template and not getattr(tokenizer, "chat_template", None):
        hint = "set `chat_template: false`, or use a model whose tokenizer has one"
        raise TextError("`chat_template` is set but the tokenizer has no chat template", hint)
    require_origin(config)
    empty = True
    for number, row in numbered_rows(config, source):
        content = _cell(row, column, source)
        written = _as_text(content, column, source, config, tokenizer)
        if written.strip():
            empty = False
            yield Document(f"row {number}", USER_DOMAIN, written, source=source)
    if empty:
        raise TextError(f"column {column!r} of {source} holds no text")


def _cell(row: Mapping[str, Any], column: str, source: str) -> Any:
    if column not in row:
        hint = f"{guess(column, row)}columns: {', '.join(row)}; set `column`"
        raise TextError(f"{source} has no column {column!r}", hint)
    return row[column]


def _as_text(
    content: Any,
    column: str,
    source: str,
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    if content is None:
        return ""
    if config.chat_template and tokenizer is not None and isinstance(content, list):
        return str(tokenizer.apply_chat_template(content, tokenize=False))
    if config.chat_template or not isinstance(content, str):
        wanted = "a list of messages" if config.chat_template else "text"
        hint = "set `chat_template: true` for conversations and `false` for text"
        kind = type(content).__name__
        raise TextError(f"column {column!r} of {source} holds {kind}, not {wanted}", hint)
    return content


# Tokens


def build_batches(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    """Tokenize and pack: exactly `samples` rows of `length` tokens.

    Packed rows are windows of a stream in which the end-of-text token follows every document; a
    domain has its own stream. Unpacked rows are the head of one document each. When the
    tokenizer begins its texts with a begin-of-text token, so does every row, because models
    trained that way put their attention sink there.

    Raises:
        TextError: less text than asked for, and everything `load_documents` raises.
    """
    rows: list[_Row] = []
    used: list[Document] = []
    origins = _origins(config, tokenizer)
    counts = apportion({name: share for name, (share, _) in origins.items()}, config.samples)
    for domain, (_, documents) in origins.items():
        take = _pack if config.pack else _head_rows
        rows += take(config, tokenizer, domain, counts[domain], _recorded(documents, used))
    random.Random(config.seed).shuffle(rows)
    return _assemble(config, tokenizer, rows, tuple(used))


def build_development(
    tokenizer: PreTrainedTokenizerBase, *, longest: int
) -> tuple[TokenBatch, ...]:
    """The first windows of every shipped domain's development text, a batch a domain.

    For choices that a stage makes by itself: the text is held out from calibration, and
    evaluation never sees it. The same tokenizer gives the same tokens.

    Args:
        longest: window that the model accepts, in tokens.
    """
    windows, length = DEVELOPMENT_WINDOWS, min(DEVELOPMENT_LENGTH, longest)
    config = CalibrationConfig(samples=windows, length=length, batch_size=windows)
    rows: list[_Row] = []
    for domain in text.domains(resources.calibration(), "development"):
        documents = iter(text.calibration_documents(domain, "development"))
        rows += _pack(config, tokenizer, domain, windows, documents)
    return _assemble(config, tokenizer, rows, ()).batches


def development_tokens() -> int:
    """How many tokens `build_development` gives for a model with room for its windows."""
    count = len(text.domains(resources.calibration(), "development"))
    return count * DEVELOPMENT_WINDOWS * DEVELOPMENT_LENGTH


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Integer parts of `total` by largest remainder (Hamilton's method); ties go by name."""
    exact = {name: share * total for name, share in shares.items()}
    parts = {name: int(value + _SHARE_TOLERANCE) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (parts[name] - exact[name], name))
    for name in order[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _recorded(documents: Iterator[Document], used: list[Document]) -> Iterator[Document]:
    for document in documents:
        used.append(document)
        yield document


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token, when the tokenizer puts it before a text."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _ids(tokenizer: PreTrainedTokenizerBase, written: str, prefix: list[int]) -> list[int]:
    """Token ids without the begin-of-text token, which `prefix` adds to the row."""
    ids: list[int] = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:] if prefix and ids[:1] == prefix else ids


def _pack(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    domain: str,
    count: int,
    documents: Iterator[Document],
) -> list[_Row]:
    prefix = _prefix(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = config.length - len(prefix)
    stream: list[int] = []
    while len(stream) < count * body:
        document = next(documents, None)
        if document is None:
            raise _too_little(domain, f"{len(stream):,} tokens", f"{count * body:,}", config)
        stream += _ids(tokenizer, document.text, prefix) + end
    return [_Row(prefix + stream[i * body : (i + 1) * body], domain) for i in range(count)]


def _head_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    domain: str,
    count: int,
    documents: Iterator[Document],
) -> list[_Row]:
    prefix = _prefix(tokenizer)
    rows: list[_Row] = []
    while len(rows) < count:
        document = next(documents, None)
        if document is None:
            raise _too_little(domain, f"{len(rows):,} documents", f"{count:,}", config)
        ids = prefix + _ids(tokenizer, document.text, prefix)
        rows.append(_Row(ids[: config.length], domain))
    return rows


def _too_little(domain: str, have: str, need: str, config: CalibrationConfig) -> TextError:
    place = config.source if domain == USER_DOMAIN and config.source else f"domain {domain!r}"
    asked = f"{config.samples} samples of {config.length} tokens need {need} of it"
    return TextError(
        f"{place} has {have} of calibration text, and {asked}",
        "lower `samples` or `length`, or bring more text",
    )


def _assemble(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[_Row],
    documents: tuple[Document, ...],
) -> CalibrationSet:
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id or 0  # masked, so any id will do
    tokens: dict[str, int] = {}
    for row in rows:
        tokens[row.domain] = tokens.get(row.domain, 0) + len(row.ids)
    size = config.batch_size
    chunks = (rows[i : i + size] for i in range(0, len(rows), size))
    batches = tuple(_batch(chunk, padding) for chunk in chunks)
    return CalibrationSet(batches, documents, dict(sorted(tokens.items())), _digest(rows))


def _batch(rows: list[_Row], padding: int) -> TokenBatch:
    import torch

    length = max(len(row.ids) for row in rows)
    ids = [row.ids + [padding] * (length - len(row.ids)) for row in rows]
    mask = [[True] * len(row.ids) + [False] * (length - len(row.ids)) for row in rows]
    domains = tuple(row.domain for row in rows)
    return TokenBatch(torch.tensor(ids), torch.tensor(mask), domains)


def _digest(rows: list[_Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.domain, row.ids]).encode())
    return digest.hexdigest()
