"""Files that are either absent or whole, whatever moment the process dies at.

Every write goes to a hidden temporary name in the same folder, is flushed to the device, and
is renamed; the folder entry is flushed last. A temporary name left by a killed process is never
read, is overwritten by the next attempt, and `remove_partial` clears it.
"""

from __future__ import annotations

import json
import os
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
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A library may create the file closed to other users; the umask should decide.
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
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
    """Clear temporary names that a killed process left in `folder`."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink()
