"""Run a command and say what it cost: wall and CPU seconds, and the most memory held.

CPU seconds are the kernel's, of the process and all its descendants. Resident memory is sampled
twenty times a second over the whole tree of processes (a library may fork), and is never less
than the kernel's own high-water mark of the largest one. The load average before and after says
whether the machine was quiet: only then do the seconds mean anything.
"""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05  # seconds between two samples
LIMIT = 4 * 3600.0  # seconds of wall time after which a command counts as hung


@dataclass(frozen=True)
class Cost:
    """What one command took.

    Attributes:
        wall_seconds: from start to exit.
        cpu_seconds: user and system, all descendants.
        peak_bytes: resident, summed over the tree of processes.
        load_before, load_after: one-minute load averages of the machine.
        niceness: of the process; another's work goes first when it is above zero.
        cores: that the process may use.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    load_before: float
    load_after: float
    niceness: int
    cores: int


def run(
    command: Sequence[str], folder: Path, log: Path, environment: dict[str, str], niceness: int
) -> Cost:
    """Run `command` to its end.

    Args:
        command: program and arguments.
        folder: where it runs.
        log: receives what it prints.
        environment: added to ours.
        niceness: added to ours.

    Raises:
        subprocess.CalledProcessError: it failed; `log` says why.
        subprocess.TimeoutExpired: it hung.
    """
    load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=folder,
        )
        psutil.Process(process.pid).nice(os.nice(0) + niceness)
        peak = _watch(process)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(
        wall_seconds=wall,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_bytes=peak,
        load_before=load,
        load_after=os.getloadavg()[0],
        niceness=os.nice(0) + niceness,
        cores=len(os.sched_getaffinity(0)),
    )


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Most resident bytes of a process and its descendants, until it ends."""
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, _resident(process.pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        done.set()
        thread.join()
    return peak


def _resident(pid: int) -> int:
    """Bytes of a tree of processes; one that ends meanwhile counts nothing."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        return 0
    return total
