"""One batch on its way through a block, able to stand still in front of a matrix.

A matrix is to see inputs that passed through the rounded ones before it. Running the block anew
for every matrix costs one and a half more forwards. Here the model's own forward runs as a
coroutine: in front of a matrix it hands back control, and later goes on behind that place with
the weights that the modules have by then. Nothing is computed twice, nothing of the model is
imitated, and what waits in memory is what the forward itself still needs.

Generators cannot do that from within calls of calls, and threads would each bring thread pools,
scratch memory and a heap of their own; greenlets switch stacks within one thread.
"""

from __future__ import annotations

from collections.abc import Callable

from greenlet import getcurrent, greenlet
from torch import Tensor


class Passage:
    """A forward that can halt.

    Args:
        forward: runs one batch and returns its output; something within it calls `halt`.

    Attributes:
        passed: names on disk of the matrices that were used already, kept by the caller.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.passed: set[str] = set()
        self._route = greenlet(forward)

    def advance(self) -> Tensor | None:
        """Start or go on: None at the next halt, the output at the end."""
        output: Tensor | None = self._route.switch()
        return output

    def abandon(self) -> None:
        """Leave the forward where it stands; it unwinds as if it had failed there."""
        self._route.throw()


def halt() -> None:
    """Stand still; to be called within the forward of a `Passage`."""
    getcurrent().parent.switch(None)
