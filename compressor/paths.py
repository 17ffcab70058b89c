"""Files that a recipe names: relative to its folder, and inside it unless the user says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compressor.source import Location, Source
from compressor.types import Problem

PATHS = ("evaluate.suite", "evaluate.text.*", "calibration.mix", "calibration.source")
"""Keys that may name a file; `*` stands for any key."""

_SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".parquet")


def real(path: Path) -> Path:
    """The path without links; one that leads to itself, of which `resolve` raises, stays."""
    return Path(os.path.realpath(path))


def resolve_paths(source: Source, folder: Path, allow_outside: bool) -> list[Problem]:
    """Make the paths in a recipe absolute; report those that leave its folder unasked."""
    problems = []
    for location, container, key in written_paths(source.data, folder):
        written = container[key]
        typed = bool(source.overridden(location))
        path = real((Path.cwd() if typed else folder) / Path(written).expanduser())
        container[key] = str(path)
        if not (typed or allow_outside or path.is_relative_to(folder)):
            problems.append(
                source.problem(
                    location,
                    f"the path {written!r} leaves the recipe's folder",
                    f"type it on the command line: --set {'.'.join(map(str, location))}=…, "
                    "or trust the whole recipe with --allow-outside",
                )
            )
    return problems


def written_paths(data: Any, folder: Path) -> list[tuple[Location, dict[str, Any], str]]:
    """Every value of `PATHS` that names a file, with the mapping that holds it."""
    found = []
    for pattern in PATHS:
        *parents, last = pattern.split(".")
        container = data
        for step in parents:
            container = container.get(step) if isinstance(container, dict) else None
        if not isinstance(container, dict):
            continue
        for key in list(container) if last == "*" else [last]:
            value = container.get(key)
            if isinstance(value, str) and (last == "*" or _is_path(value, folder)):
                found.append(((*parents, key), container, key))
    return found


def _is_path(value: str, folder: Path) -> bool:
    """Whether a value that may also be a name (of a suite, a mix, a Hub dataset) is a path."""
    if value.startswith(("/", "~", ".")) or "\\" in value or ".." in value.split("/"):
        return True
    return value.endswith(_SUFFIXES) or ("/" in value and (folder / value).exists())
