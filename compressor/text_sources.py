"""Rows of text that the user brings: files, folders, saved datasets, datasets of the Hub."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import text
from compressor.errors import AccessError, CompressorError, ResourceError, TextError

if TYPE_CHECKING:
    from compressor.calibration import CalibrationConfig

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_LEAST_ROW = 8  # bytes of a row of JSON around its text
Numbered = tuple[int, Mapping[str, Any]]
"""A row and its place in the source."""


@dataclass(frozen=True)
class Amount:
    """The most that text can hold, whatever the tokenizer."""

    tokens: int
    documents: int

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.documents + other.documents)


def local_files(source: str) -> list[Path]:
    """The files of a source on this machine; none of a dataset, saved here or on the Hub.

    Raises:
        TextError: a folder without files that can be read, or a file of another kind.
    """
    path = Path(source).expanduser()
    if not path.exists() or _is_saved(path):
        return []
    if path.is_dir():
        return _files_in(path)
    _require_suffix(path)
    return [path]


def has_text(path: Path) -> bool:
    """Whether a file of a source is not empty, without reading all of a large one.

    Raises:
        TextError: it cannot be read as what its name says.
    """
    return text.has_text(path) if path.suffix != ".parquet" else _parquet_length(path) > 0


def most_in(path: Path) -> Amount:
    """What a file of a source can hold: at most a token a byte, and two around every document.

    Those of parquet are compressed, so that only its rows are known.
    """
    if path.suffix == ".parquet":
        return Amount(sys.maxsize, _parquet_length(path))
    size = path.stat().st_size
    return Amount(size + 2, 1 + size // _LEAST_ROW if path.suffix == ".jsonl" else 1)


def numbered_rows(config: CalibrationConfig, source: str) -> Iterator[Numbered]:
    """Rows of a source with their numbers; shuffled by the seed unless they are streamed.

    Args:
        config: which split, subset and revision; the seed.
        source: a .txt, .md, .jsonl or .parquet file, a folder of such, a dataset that
            `save_to_disk` wrote, or an id on the Hub.

    Raises:
        TextError: unknown kind of file, broken content, or no such dataset, subset or split.
        ResourceError: the Hub cannot be reached.
        AccessError: the Hub wants credentials.
    """
    path = Path(source).expanduser()
    if not path.exists():
        yield from _hub_rows(config, source)
    elif path.is_file():
        yield from _shuffled(list(_file_rows(path)), config.seed)
    elif _is_saved(path):
        yield from _saved_rows(config, path)
    else:
        yield from _shuffled(_folder_rows(path), config.seed)


def _shuffled(rows: Any, seed: int) -> Iterator[Numbered]:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        yield index, rows[index]


def _is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _folder_rows(folder: Path) -> list[Mapping[str, Any]]:
    return [row for file in _files_in(folder) for row in _file_rows(file)]


def _files_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        raise TextError(f"folder {folder} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _require_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise TextError(f"{path} must end in one of {', '.join(SUFFIXES)}")


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of one file; a text file is one row.

    Raises:
        TextError: unknown kind of file, or its content is broken.
    """
    _require_suffix(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    content = text.read_utf8(path)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, content)
    else:
        yield {"text": content}


def _json_rows(path: Path, content: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = text.json_row(line)
        except ValueError as error:
            raise TextError(f"{path}:{number} is not a row of JSON: {error}") from None
        if not isinstance(row, dict):
            raise TextError(f"{path}:{number} must be a JSON object with named columns")
        yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    with _parquet_told(path):
        table = pyarrow.parquet.read_table(path)
    yield from table.to_pylist()


def _parquet_length(path: Path) -> int:
    """Rows, by the footer alone."""
    import pyarrow.parquet

    with _parquet_told(path):
        return int(pyarrow.parquet.read_metadata(path).num_rows)


@contextmanager
def _parquet_told(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowInvalid as error:
        raise TextError(f"{path} is not a parquet file: {error}") from error


def _saved_rows(config: CalibrationConfig, path: Path) -> Iterator[Numbered]:
    """Rows of a folder that `Dataset.save_to_disk` wrote."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            hint = f"splits: {', '.join(loaded)}"
            raise TextError(f"dataset {path} has no split {config.split!r}", hint)
        loaded = loaded[config.split]
    yield from _shuffled(loaded, config.seed)


def _hub_rows(config: CalibrationConfig, source: str) -> Iterator[Numbered]:
    """Rows of a dataset of the Hub; streamed rows keep their order.

    `datasets` reports a wrong subset or split as ValueError, with a list of the right ones.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(
            source,
            config.subset,
            split=config.split,
            streaming=config.streaming,
            revision=config.revision,
        )
    except (OSError, ValueError) as error:
        raise _hub_error(source, error) from error
    yield from enumerate(loaded) if config.streaming else _shuffled(loaded, config.seed)


def _hub_error(source: str, error: OSError | ValueError) -> CompressorError:
    """`datasets` says that a dataset is gated in its message only."""
    if "is a gated dataset" in str(error):
        hint = "accept its terms on its page, then run `hf auth login`"
        return AccessError(f"dataset {source!r} is gated", hint)
    if isinstance(error, (FileNotFoundError, ValueError)):
        return TextError(f"dataset {source!r} cannot be read: {error}")
    hint = "calibrate on a shipped mix or a local file when offline"
    return ResourceError(f"dataset {source!r} cannot be fetched: {error}", hint)
