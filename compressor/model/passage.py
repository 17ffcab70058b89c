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

Visit = Callable[[str, Tensor], bool]
"""Called with the name of a matrix and what it is about to multiply; False: stand still."""


class Passage:
    """A forward that can stand still.

    Args:
        forward: runs one batch and returns its output; tells `arrive` about its matrices.

    Attributes:
        passed: names of the matrices that have been used.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.passed: set[str] = set()
        self._route = greenlet(forward)
        self._visit: Visit = _go_on

    def advance(self, visit: Visit | None = None) -> Tensor | None:
        """Start or go on, first asking about the matrix in front of which it stands.

        Args:
            visit: whether to go on, at every matrix; never stands still by default.

        Returns:
            The output at the end, or None where it stands still.
        """
        self._visit = visit or _go_on
        output: Tensor | None = self._route.switch()
        return output

    def arrive(self, name: str, inputs: Tensor) -> None:
        """To be called within the forward, in front of a matrix."""
        while not self._visit(name, inputs):
            getcurrent().parent.switch(None)
        self.passed.add(name)

    def abandon(self) -> None:
        """Leave the forward where it stands; it unwinds as if it had failed there."""
        self._route.throw()


def _go_on(_: str, __: Tensor) -> bool:
    return True
