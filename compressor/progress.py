"""Whom the engine and the stages tell how far they are.

Code that works takes an `Observer` and knows nothing of terminals. Progress goes to standard
error, so that standard output carries results only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

_PLAIN_SECONDS = 10.0


class Task(Protocol):
    """A piece of work of known length."""

    def advance(self, steps: int = 1) -> None:
        """Say that `steps` more steps are done."""


class Observer(Protocol):
    """Receives what happens during a run."""

    def event(self, name: str, **facts: object) -> None:
        """Something happened once: a stage began, a fallback, a file was written."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        """Begin a piece of work of `total` steps; leaving the context ends it."""

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """What stands now; the next table of the same title takes its place where it can."""


def _sentence(name: str, facts: dict[str, object]) -> str:
    told = "  ".join(f"{key}={value}" for key, value in facts.items())
    return f"{name}  {told}".rstrip()


class _SilentTask:
    def advance(self, steps: int = 1) -> None:
        del steps


class SilentObserver:
    """Says nothing: for `--quiet`, for tests and for use as a library."""

    def event(self, name: str, **facts: object) -> None:
        """Drop the event."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        """A task that counts for nobody."""
        del label, total
        return nullcontext(_SilentTask())

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Drop the table."""


class _PlainTask:
    """Prints a line when it ends and at most every ten seconds in between."""

    def __init__(self, label: str, total: int, stream: IO[str]) -> None:
        self._label, self._total, self._stream = label, total, stream
        self._done = 0
        self._began = self._told = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if self._done >= self._total or now - self._told >= _PLAIN_SECONDS:
            self._told = now
            self._stream.write(self._line(now - self._began))
            self._stream.flush()

    def _line(self, seconds: float) -> str:
        left = seconds / self._done * max(self._total - self._done, 0) if self._done else 0.0
        tail = f", about {left:.0f} s left" if left else ""
        return f"{self._label}  {self._done}/{self._total}  {seconds:.1f} s{tail}\n"


class PlainObserver:
    """One line per event: for logs, pipes and terminals that cannot redraw."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr

    def event(self, name: str, **facts: object) -> None:
        """Write the event as one line."""
        self._stream.write(_sentence(name, facts) + "\n")
        self._stream.flush()

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        """A task that reports now and then."""
        return nullcontext(_PlainTask(label, total, self._stream))

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write it in columns below its title."""
        lines = [tuple(head), *(tuple(row) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        written = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        self._stream.write("\n".join([title, *(f"  {line}" for line in written)]) + "\n")
        self._stream.flush()


class _RichTask:
    def __init__(self, progress: Progress, identity: TaskID) -> None:
        self._progress, self._identity = progress, identity

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._identity, steps)


class RichObserver:
    """Progress bars with the time left. Use as a context manager, so that the bars are removed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        tables: dict[str, RenderableType] = {}
        self._tables = tables

        class Bars(Progress):
            """Progress bars below the tables that stand."""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield from tables.values()
                yield from super().get_renderables()

        self._progress = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> RichObserver:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, name: str, **facts: object) -> None:
        """Write the event above the bars."""
        self._progress.console.print(_sentence(name, facts), markup=False, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """A bar of its own, removed at the end."""
        identity = self._progress.add_task(label, total=total)
        try:
            yield _RichTask(self._progress, identity)
        finally:
            self._progress.remove_task(identity)
            self._tables.clear()

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Redraw it above the bars, until the work that it belongs to ends."""
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for number, name in enumerate(head):
            drawn.add_column(name, justify="right" if number else "left")
        for row in rows:
            drawn.add_row(*row)
        self._tables[title] = drawn


@contextmanager
def observer(*, quiet: bool) -> Iterator[Observer]:
    """The observer that suits standard error: silent, bars on a terminal, or plain lines."""
    if quiet:
        yield SilentObserver()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with RichObserver() as bars:
            yield bars
    else:
        yield PlainObserver()
