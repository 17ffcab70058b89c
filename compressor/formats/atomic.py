"""Files that are either absent or whole, whatever moment the process dies at.

Every write goes to a hidden temporary folder beside the file, is flushed to the device, and is
renamed; the folder entry is flushed last. A temporary folder left by a killed process is never
read, is made anew by the next attempt, and `remove_partial` clears it. It is a folder because
libraries write to temporary names of their own before they rename to ours: safetensors does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.disk import flush, writing

_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; it becomes `path` when the block ends without error.

    Args:
        path: the final name; its folder is made if absent.

    Raises:
        ResourceError: the file system refused (full, read-only, no permission).
    """
    work = path.with_name(f".{path.name}{_SUFFIX}")
    temporary = work / path.name
    with writing(path):
        try:
            _remove(work)
            work.mkdir(parents=True)
            # A library may create the file closed to other users; the umask should decide.
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            _remove(work)
        flush(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all.

    Raises:
        ResourceError: the file system refused.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, line ends unchanged, whole or not at all.

    Raises:
        ResourceError: the file system refused.
    """
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values give equal bytes.

    Raises:
        ResourceError: the file system refused.
        ValueError: `value` holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def remove_partial(folder: Path) -> None:
    """Clear what a killed process left half-written in `folder`."""
    for path in folder.glob(f".*{_SUFFIX}"):
        _remove(path)


def _remove(work: Path) -> None:
    if work.is_dir():
        shutil.rmtree(work)
    else:
        work.unlink(missing_ok=True)
