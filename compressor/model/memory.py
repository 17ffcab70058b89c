"""Give freed memory back to the operating system, and not before."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # as malloc.h numbers what is set
_KEPT, _LARGEST, _SMALLEST = 96 << 20, 16 << 20, 128 << 10  # bytes


def return_memory() -> None:
    """Release the pages of freed tensors, where the C library keeps them for itself.

    Torch asks glibc for aligned memory, and glibc fails to put an aligned request into the hole
    that a tensor of the same size has left. Walking blocks of 13 MB, the process grew by 9 MB
    per block although nothing was alive; trimmed between blocks, it does not grow.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_memory() -> None:
    """Let glibc keep up to 96 MiB of freed memory until `return_memory`; the user's word stays.

    Left to itself it returns the intermediate results of every forward, and the kernel clears each
    page once more for the next: a tenth of the processor time of a walk. Tensors above 16 MiB, such
    as the matrices of a solve, still go back at once: kept, they raised the peak by 40 MB. Threads
    share one heap: what lies in heaps of their own is given back at every turn, a twentieth of the
    time of a walk in two lanes.
    """
    _set(_MMAP_THRESHOLD, _LARGEST)
    _set(_TRIM_THRESHOLD, _KEPT)
    if "MALLOC_ARENA_MAX" not in os.environ:
        _set(_ARENA_MAX, 1)


@contextmanager
def memory_returned() -> Iterator[None]:
    """Give back what is freed above 128 KiB at once, while a whole model comes; then `keep_memory`.

    A packed model is unpacked into tensors of other sizes than those it frees, which, kept, took
    75 MB beside a model of 270.
    """
    return_memory()
    _set(_MMAP_THRESHOLD, _SMALLEST)
    try:
        yield
    finally:
        keep_memory()


def _set(option: int, value: int) -> None:
    """Tell glibc, where it is the C library and the user has told it nothing of the kind."""
    said = os.environ.get("GLIBC_TUNABLES", "")
    mallopt = _of_glibc("mallopt")
    if mallopt and "MALLOC_TRIM_THRESHOLD_" not in os.environ and "glibc.malloc" not in said:
        mallopt(option, value)


def _of_glibc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function that only some C libraries have."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
