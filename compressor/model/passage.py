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

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compressor.model.parking import Parked, ParkingLot

Visit = Callable[[str, Tensor], bool]
"""Called with the name of a matrix and what it is about to multiply; False: stand still."""


class Passage:
    """A forward that can stand still.

    Args:
        forward: runs one batch and returns its output; tells `arrive` about its matrices, and
            `meet` about tensors that it may still hold when it stands still.

    Attributes:
        passed: names of the matrices that have been used.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.passed: set[str] = set()
        self._route = greenlet(forward)
        self._visit: Visit = _go_on
        self._met: dict[int, ref[Tensor]] = {}
        self._lot: ParkingLot | None = None
        self._parked: list[Parked] = []

    def advance(self, visit: Visit | None = None) -> Tensor | None:
        """Start or go on, first asking about the matrix in front of which it stands.

        Args:
            visit: whether to go on, at every matrix; never stands still by default.

        Returns:
            The output at the end, or None where it stands still.
        """
        self._visit = visit or _go_on
        self._fetch()
        output: Tensor | None = self._route.switch()
        self._visit = _go_on  # a visitor may hold what it was told
        return output

    @property
    def is_parked(self) -> bool:
        """Whether what it holds is in a file."""
        return self._lot is not None

    def meet(self, tensor: Tensor) -> None:
        """To be called within the forward, with activations of its batch and nothing else."""
        self._met[id(tensor)] = ref(tensor)

    def park(self, lot: ParkingLot, keep: Collection[int] = ()) -> None:
        """Free the memory of what it has met and still holds, until it goes on.

        Args:
            lot: takes the bytes.
            keep: addresses of storages that belong to somebody else as well.
        """
        self._lot = lot
        held = [tensor for known in self._met.values() if (tensor := known()) is not None]
        storages = {s.data_ptr(): s for s in (tensor.untyped_storage() for tensor in held)}
        self._parked = [
            lot.park(storage)
            for address, storage in storages.items()
            if address and address not in keep and storage.resizable()
        ]

    def _fetch(self) -> None:
        if self._lot:
            for parked in self._parked:
                self._lot.fetch(parked)
        self._parked, self._lot = [], None

    def arrive(self, name: str, inputs: Tensor) -> None:
        """To be called within the forward, in front of a matrix; it meets the inputs as well."""
        self.meet(inputs)
        while not self._visit(name, inputs):
            getcurrent().parent.switch(None)
        self.passed.add(name)

    def abandon(self) -> None:
        """Leave the forward where it stands; it unwinds as if it had failed there."""
        if self._lot:
            for parked in self._parked:
                self._lot.forget(parked)
        self._parked, self._lot = [], None
        self._route.throw()


def _go_on(_: str, __: Tensor) -> bool:
    return True


@contextmanager
def introduced(module: nn.Module, tokens: int, passage: Passage) -> Iterator[None]:
    """Let a passage meet what enters and leaves every part of a module: all that is held there.

    Args:
        module: the block.
        tokens: of the batch; tensors with other leading sizes are none of its activations.
        passage: its forward.
    """

    def meet(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and _leads(value, tokens):
            passage.meet(value)

    with ExitStack() as stack:
        for part in module.modules():
            before = part.register_forward_pre_hook(lambda _, args: meet(args[0] if args else None))
            after = part.register_forward_hook(lambda _, __, output: meet(output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _leads(value: Tensor, tokens: int) -> bool:
    """Whether it is [tokens, …] or [batch, length, …]."""
    shape = value.shape
    return value.ndim > 1 and tokens in (shape[0], shape[0] * shape[1])
