"""An interruption stays one, also when it strikes inside a library written in another language.

Ctrl-C raises KeyboardInterrupt in whatever Python code happens to run. When that is a callback
of compiled code (safetensors asking a tensor for its shape), or a class being made during an
import, what comes out is another error, and the user would read of a bug that is none.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object]


class Interruptible:
    """Within it, whatever exception follows a SIGINT leaves as KeyboardInterrupt.

    Where SIGINT does not raise KeyboardInterrupt anyway (outside the main thread, in a process
    that ignores it, under a host with a handler of its own) it changes nothing. It nests.
    """

    def __init__(self) -> None:
        self._struck = False
        self._before: Handler | None = None

    def __enter__(self) -> Interruptible:
        before = signal.getsignal(signal.SIGINT)
        ours = isinstance(getattr(before, "__self__", None), Interruptible)
        main = threading.current_thread() is threading.main_thread()
        if main and callable(before) and (ours or before is signal.default_int_handler):
            signal.signal(signal.SIGINT, self._strike)
            self._before = before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._struck and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def check(self) -> None:
        """Raise what was struck and lost: Python drops exceptions raised in a destructor."""
        if self._struck:
            raise KeyboardInterrupt

    def _strike(self, number: int, frame: FrameType | None) -> None:
        self._struck = True
        if self._before is not None:
            self._before(number, frame)
