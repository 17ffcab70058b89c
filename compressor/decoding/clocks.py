"""Wall-clock seconds of ways of decoding, by domain of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clocks:
    """Seconds of every way of decoding, by domain."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, str], float] = {}

    @contextmanager
    def running(self, way: str, domain: str) -> Iterator[None]:
        """Count the time within."""
        began = time.perf_counter()
        yield
        key = (way, domain)
        self._taken[key] = self._taken.get(key, 0.0) + time.perf_counter() - began

    def seconds(self, way: str, domain: str | None = None) -> float:
        """Of a way, in one domain or all."""
        return sum(
            taken for (one, place), taken in self._taken.items()
            if one == way and domain in (None, place)
        )  # fmt: skip

    def domains(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(domain for _, domain in self._taken))

    def gains(self) -> dict[str, float]:
        """Speed-up of every way over plain decoding."""
        ways = dict.fromkeys(way for way, _ in self._taken if way != "plain")
        return {way: self.seconds("plain") / self.seconds(way) for way in ways}
