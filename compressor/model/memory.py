"""Give freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import sys


def return_memory() -> None:
    """Release the pages of freed tensors, where the C library keeps them for itself.

    Torch asks glibc for aligned memory, and glibc fails to put an aligned request into the hole
    that a tensor of the same size has left. Walking blocks of 13 MB, the process grew by 9 MB
    per block although nothing was alive; trimmed between blocks, it does not grow.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
