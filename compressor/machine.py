"""What this machine offers, without loading torch."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux names them; empty where it does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def vector_extensions() -> list[str]:
    """The instruction sets that decide the speed of matrix products."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [name for name in known if name in cpu_flags()]


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def multiplies_bf16() -> bool:
    """Whether the processor has units for products of bf16 numbers, several times faster."""
    return not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})


def activation_budget() -> int:
    """Bytes of activations to keep in memory: a quarter of what is free now.

    The rest is for blocks, Hessians and everybody else.
    """
    return free_memory() // 4


def prefer_huge_pages() -> None:
    """Let torch ask Linux for huge pages behind tensors of 2 MB and more; the user's word stays.

    Fewer page faults, and what is freed goes back: holes that fit no second tensor took 70 MB of
    a walk over 135 million weights. To be called before torch first allocates as much.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def sleep_soon() -> None:
    """Let OpenMP's threads sleep soon while they wait for each other; the user's word stays.

    GNU's spin for milliseconds, and so hold the very core that the one they wait for needs where
    another process has the others: 14 times slower beside one busy process. A thousand turns, some
    20 microseconds, are what GNU's takes when it has more threads than cores itself; where nothing
    else runs they cost nothing. To be called before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
