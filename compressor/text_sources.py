"""Rows of text that the user brings: files, folders, saved datasets, datasets of the Hub."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import text
from compressor.errors import AccessError, CompressorError, ResourceError, TextError

if TYPE_CHECKING:
    from compressor.calibration import CalibrationConfig

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
Numbered = tuple[int, Mapping[str, Any]]
"""A row and its place in the source."""


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
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _saved_rows(config, path)
    else:
        yield from _shuffled(_folder_rows(path), config.seed)


def _shuffled(rows: Any, seed: int) -> Iterator[Numbered]:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        yield index, rows[index]


def _folder_rows(folder: Path) -> list[Mapping[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not files:
        raise TextError(f"folder {folder} holds no file that ends in {', '.join(SUFFIXES)}")
    return [row for file in files for row in _file_rows(file)]


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of one file; a text file is one row.

    Raises:
        TextError: unknown kind of file, or its content is broken.
    """
    if path.suffix not in SUFFIXES:
        raise TextError(f"{path} must end in one of {', '.join(SUFFIXES)}")
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
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise TextError(f"{path} is not a parquet file: {error}") from error
    yield from table.to_pylist()


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
