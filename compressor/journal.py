"""The append-only journal of a run: one JSON object a line, on disk before it counts.

A line is written only after what it announces is safely on disk, so that a run killed at
any moment can be resumed from its last whole line.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from compressor.disk import writing
from compressor.errors import ResumeError

Event = dict[str, Any]

_FACTS = {
    "run_started": {"command"},
    "block_done": {"stage", "record", "seconds", "peak_bytes"},
    "stage_done": {"stage", "result", "seconds", "peak_bytes"},
    "stage_verified": {"stage", "kl_to_parent", "loaded_whole"},
    "evaluated": {"variant"},
    "exported": {"format", "sha256"},
}
"""What a run that goes on reads of an event."""


class Journal:
    """Events of one run, in order.

    A last line cut short by a crash is dropped when the journal is opened: what it would
    have announced is done again.

    Raises:
        ResumeError: a whole line is no event.
        ResourceError: it may not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.touch()
        whole = [line for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
        os.truncate(path, sum(map(len, whole)))
        self.events = [self._read(number, line) for number, line in enumerate(whole, 1)]

    def _read(self, number: int, line: bytes) -> Event:
        try:
            event: Event | object = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not _is_whole(event):
            raise ResumeError(
                f"{self.path}:{number} is damaged", "start again in another folder with -o"
            )
        return event

    def append(self, name: str, **facts: Any) -> Event:
        """Write one event, flushed to the disk before this returns.

        Raises:
            ResourceError: the disk refused it.
        """
        event = {"event": name, "time": round(time.time(), 3), **facts}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.events.append(event)
        return event

    def find(self, name: str, **facts: Any) -> Event | None:
        """The latest event of that name whose facts include `facts`, if any."""
        return next(reversed(self.all(name, **facts)), None)

    def all(self, name: str, **facts: Any) -> list[Event]:
        """All events of that name whose facts include `facts`, oldest first."""
        return [
            event
            for event in self.events
            if event["event"] == name
            and all(event.get(key) == value for key, value in facts.items())
        ]


def _is_whole(event: Event) -> bool:
    return {"event", "time"} <= event.keys() and event.keys() >= _FACTS.get(
        str(event["event"]), set()
    )
