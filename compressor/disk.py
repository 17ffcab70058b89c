"""What a process asks of the disk, whoever writes, and what it hears when the disk refuses."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from compressor.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HINT = "free some space, or give the folder more; the same command goes on where it stopped"
_WITHIN_SAFETENSORS = re.compile(r"I/O error: .*\(os error (\d+)\)")


def flush(path: Path) -> None:
    """Force a file's bytes or a folder's entries out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what the file system refuses while `path` is written.

    Whatever writes large files goes through here: checkpoints, codes and caches by way of
    `formats.atomic.replacing`, activations and the journal directly.

    Args:
        path: the file, or the folder of files without a name.

    Raises:
        ResourceError: the disk is full, read-only or gone, or `path` may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number is None and isinstance(error, SafetensorError):
            raise  # not the disk's doing
        raise ResourceError(f"cannot write {path}: {_reason(error)}", hint(number)) from error


def hint(number: int | None) -> str:
    """What helps against an error of the operating system; "" where nothing general does."""
    return _HINT if number in _FULL else ""


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name, or make a copy of it where the file system has no links.

    Args:
        path: the file itself, or a symlink to it.
        target: replaced if it is there; its folder is made if absent.

    Raises:
        ResourceError: the file system refused the copy too.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), target)  # the file itself: the Hub's cache holds symlinks
        except OSError:
            shutil.copy2(path, target)


def _number(error: OSError | SafetensorError) -> int | None:
    """Of the operating system's error; safetensors has it in its message only."""
    if isinstance(error, OSError):
        return error.errno
    found = _WITHIN_SAFETENSORS.search(str(error))
    return int(found[1]) if found else None


def _reason(error: OSError | SafetensorError) -> str:
    number = _number(error)
    return str(error) if number is None else os.strerror(number)
