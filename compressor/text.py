"""The text that ships with the package: shards by domain and split, checked by their hashes.

A text folder holds `manifest.json` and JSON-lines shards below `text/<domain>/`; see
calibration/README.md for how they are built. A shard that differs from its manifest is refused,
because every published number names the text it was measured on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from codecs import getincrementaldecoder
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor import resources
from compressor.errors import TextError

Split = Literal["calibration", "development", "evaluation"]

_HEAD = 1 << 24  # bytes; a user's file may have many times as many


@dataclass(frozen=True)
class Document:
    """One piece of running text.

    Attributes:
        id: unique within its domain.
        domain: the group of text it belongs to.
        text: the text itself.
        source: where it comes from, such as `npm:rxjs@7.8.1`, or the path of a user's file.
        license: licence of the text, empty when unknown.
    """

    id: str
    domain: str
    text: str
    source: str = ""
    license: str = ""


class Shard(BaseModel):
    """One file of documents, as the manifest describes it."""

    model_config = ConfigDict(frozen=True)

    path: str
    domain: str
    split: Split
    documents: int
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """Fields of manifest.json that reading needs; the rest informs people."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1]
    shards: tuple[Shard, ...]


def shards(folder: Path) -> tuple[Shard, ...]:
    """Shards that the manifest of a text folder lists.

    Raises:
        TextError: the manifest is missing or broken.
    """
    path = folder / "manifest.json"
    try:
        return _Manifest.model_validate_json(path.read_bytes()).shards
    except FileNotFoundError:
        raise TextError(f"{folder} holds no manifest.json, so it is no text folder") from None
    except ValidationError as error:
        raise TextError(f"{path} is not a manifest of format 1: {error}") from error


def domains(folder: Path, split: Split) -> tuple[str, ...]:
    """Names of the domains that have text in a split, sorted."""
    return tuple(sorted({shard.domain for shard in shards(folder) if shard.split == split}))


def read_domain(folder: Path, domain: str, split: Split) -> list[Document]:
    """All documents of a domain and split, in the order of the shards.

    Raises:
        TextError: no such domain, or a shard is missing or differs from its manifest.
    """
    found = [s for s in shards(folder) if s.domain == domain and s.split == split]
    if not found:
        raise unknown_domain(domain, domains(folder, split))
    return [document for shard in found for document in _read_shard(folder, shard)]


def read_utf8(path: Path) -> str:
    """A user's text file.

    Raises:
        TextError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from None


def has_text(path: Path) -> bool:
    """Whether a user's file is not blank, by as much of its beginning as is quick to read.

    Raises:
        TextError: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from None
    whole = len(head) < _HEAD
    try:
        written = getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return bool(written.strip()) or not whole


def json_row(line: str) -> object:
    """What one line of a user's JSON-lines file holds.

    Raises:
        ValueError: no JSON, nested beyond reason, or with half of a surrogate pair in its text.
    """
    try:
        row: object = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in line:
        json.dumps(row, ensure_ascii=False).encode()  # raises of half a pair
    return row


def unknown_domain(domain: str, valid: tuple[str, ...]) -> TextError:
    """The error for a domain that does not exist, with the nearest name and the list."""
    close = difflib.get_close_matches(domain, valid, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return TextError(f"there is no domain {domain!r}", f"{guess}domains: {', '.join(valid)}")


def _read_shard(folder: Path, shard: Shard) -> list[Document]:
    path = folder / shard.path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path} is missing though the manifest lists it") from None
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        hint = "restore the file, or rebuild text and manifest with calibration/build_text.py"
        raise TextError(f"{path} is not the file that the manifest describes (sha256)", hint)
    rows = (json.loads(line) for line in data.decode().split("\n") if line)
    return [Document(r["id"], r["domain"], r["text"], r["source"], r["license"]) for r in rows]


def calibration_documents(domain: str, split: Split = "calibration") -> list[Document]:
    """Documents of the shipped calibration text (splits `calibration` and `development`)."""
    return read_domain(resources.calibration(), domain, split)


def evaluation_documents(domain: str) -> list[Document]:
    """Documents of the shipped evaluation text; nothing else may calibrate or train on them."""
    return read_domain(resources.evals(), domain, "evaluation")


def evaluation_domains() -> tuple[str, ...]:
    """Domains of the shipped evaluation text."""
    return domains(resources.evals(), "evaluation")
