"""Runs inside an engine's own environment: log-probabilities of texts, greedy texts, speed.

python answer.py ENGINE [ARGUMENT ...] CHECKPOINT < request.json > answer.json

ENGINE is a module beside this file. `compressor.serving.ask` says what request and answer hold.
Nothing here knows of this package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model: what the `load(checkpoint, request, *arguments)` of a module gives."""

    version: str
    dtype: str  # that it computes in

    def logprobs(self, texts: list[list[int]]) -> list[list[float]]:
        """Of every token of a text but the first, given those before."""

    def write(self, prompts: list[list[int]], tokens: int, whole: bool = False) -> list[list[int]]:
        """Greedy continuations; `whole` goes on after the end of a text."""

    def counters(self) -> dict[str, float]:
        """What the engine counted of speculative decoding; empty without."""


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's chatter goes to standard error
    name, *arguments, checkpoint = sys.argv[1:]
    json.dump(answer(name, arguments, checkpoint, request), answer_file)
    answer_file.close()


def answer(
    name: str, arguments: list[str], checkpoint: str, request: dict[str, Any]
) -> dict[str, Any]:
    """Load the checkpoint and do what is asked."""
    module = import_module(name)
    start = time.perf_counter()
    engine: Engine = module.load(checkpoint, request, *arguments)
    loaded = time.perf_counter() - start
    return {
        "version": engine.version,
        "dtype": engine.dtype,
        "load_seconds": loaded,
        "logprobs": engine.logprobs(request["texts"]),
        "greedy": engine.write(request["prompts"], request["tokens"]),
        "tokens_per_second": speed(engine, request),
        "counters": engine.counters(),
    }


def speed(engine: Engine, request: dict[str, Any]) -> float | None:
    """Tokens a second of one text at a time, after its first token; the best of each attempt."""
    tokens, prompts = request.get("timed", 0), request["prompts"]
    spent = CLOCKS[request.get("clock", "wall")]
    if not tokens or not prompts:
        return None
    seconds = {}
    for count in (1, tokens):
        seconds[count] = sum(
            min(
                spent(partial(engine.write, [ids], count, whole=True))
                for _ in range(request.get("repeats", 2))
            )
            for ids in prompts
        )
    return float(len(prompts) * (tokens - 1) / (seconds[tokens] - seconds[1]))


def _passed(work: Callable[[], object]) -> float:
    """Seconds by the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _computed(work: Callable[[], object]) -> float:
    """Processor seconds of the busiest process: others wait for it, some of them busily."""
    before = _processor_seconds()
    work()
    return max(spent - before.get(pid, 0.0) for pid, spent in _processor_seconds().items())


def _processor_seconds() -> dict[int, float]:
    """Of this process and those that it started, so far."""
    import psutil

    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {process.pid: sum(process.cpu_times()[:2]) for process in family}


CLOCKS: dict[str, Callable[[Callable[[], object]], float]] = {
    "wall": _passed,
    "processor": _computed,
}


if __name__ == "__main__":
    main()
