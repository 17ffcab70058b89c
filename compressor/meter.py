"""Wall time and peak memory of a piece of work."""

from __future__ import annotations

import threading
import time

import psutil
import torch

_PERIOD = 0.05  # seconds between samples: blocks take longer than this


class Meter:
    """Context manager that measures `seconds` and `peaks` of this process.

    The operating system's own high-water mark never falls, so it cannot tell one stage from
    the one before; the resident set is sampled instead. That of a GPU begins anew.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._start = self._lap = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start

    def lap(self) -> float:
        """Seconds since the start or the lap before."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def peaks(self) -> dict[str, int]:
        """Most bytes since the start: resident, and of tensors on the GPU, 0 without one."""
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {"peak_bytes": self._peak_bytes, "device_peak_bytes": device}

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self._peak_bytes = max(self._peak_bytes, process.memory_info().rss)
            if self._stop.wait(_PERIOD):
                return
