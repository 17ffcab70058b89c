"""Wall time and peak resident memory of a piece of work."""

from __future__ import annotations

import threading
import time

import psutil

_PERIOD = 0.05  # seconds between samples: blocks take longer than this


class Meter:
    """Context manager that measures `seconds` and `peak_bytes` of this process.

    The operating system's own high-water mark never falls, so it cannot tell one stage from
    the one before; the resident set is sampled instead.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._start = self._lap = time.perf_counter()
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

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            if self._stop.wait(_PERIOD):
                return
