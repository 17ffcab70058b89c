"""An interruption stays one, also when it strikes inside a library written in another language.

Ctrl-C raises KeyboardInterrupt in whatever Python code happens to run. When that is a callback
of compiled code (safetensors asking a tensor for its shape), the library may report an error of
its own instead, and the user would read of a bug that is none.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruptible:
    """Within it, whatever exception follows a SIGINT leaves as KeyboardInterrupt.

    Where SIGINT does not raise KeyboardInterrupt anyway (outside the main thread, in a process
    that ignores it, under a host with a handler of its own) it changes nothing.
    """

    def __init__(self) -> None:
        self._struck = False
        self._installed = False

    def __enter__(self) -> Interruptible:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._strike)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._struck and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _strike(self, number: int, frame: FrameType | None) -> None:
        self._struck = True
        signal.default_int_handler(number, frame)
