"""Forwards through a block that stand still in front of a matrix, as many as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Collection

from compressor.model.memory import return_memory
from compressor.model.parking import ParkingLot
from compressor.model.passage import Passage

# Forwards, after as many of which memory is given back. Every page given back is cleared by the
# kernel before it serves again; forwards that are parked leave few holes between them.
_PER_TRIM, _PER_TRIM_PARKED = 4, 8


class Standing(dict[int, Passage]):
    """Those of one block, by batch.

    Args:
        sizes: bytes that the forward of each batch holds while it stands still, at most.
        room: bytes that all of them may hold in memory.
        lot: where those without room wait; None lets them run anew.
        owned: addresses of storages that the forward of a batch may meet and that are others'.
    """

    def __init__(
        self,
        sizes: Callable[[int], int],
        room: int,
        lot: ParkingLot | None,
        owned: Callable[[int], Collection[int]],
    ) -> None:
        super().__init__()
        self._sizes, self._room, self._lot, self._owned = sizes, room, lot, owned
        self._kept = 0

    def take(
        self, batch: int, ahead: Collection[str] = (), *, anew: bool = False
    ) -> Passage | None:
        """The forward of a batch, which is its caller's from now on; one of no use ends.

        Args:
            batch: its index.
            ahead: tensors that it must not have passed.
            anew: none is of use.
        """
        passage = self.pop(batch, None)
        if passage is None or (not anew and passage.passed.isdisjoint(ahead)):
            return passage
        passage.abandon()
        return None

    def keep(self, batch: int, passage: Passage) -> None:
        """Let a forward wait for the matrices ahead of it, in memory as far as there is room.

        What it has just reported may be in use, so that its own tensors stay where they are.
        """
        lot = self._lot if passage.passed else None  # else running anew costs nothing
        waiting = [other for other, held in self.items() if not held.is_parked]
        self[batch] = passage
        while lot and waiting and self._crowded():
            other = waiting.pop(0)
            self[other].park(lot, set(self._owned(other)))
        if self._crowded() and not lot:
            self.pop(batch).abandon()
        else:
            self._give_back(_PER_TRIM_PARKED if lot else _PER_TRIM)

    def end(self, passed: str | None) -> None:
        """End those that have passed a tensor, or all."""
        for batch, passage in list(self.items()):
            if passed is None or passed in passage.passed:
                self.pop(batch).abandon()

    def _give_back(self, forwards: int) -> None:
        """Once in so many forwards: what one has freed lies between what it holds."""
        self._kept += 1
        if self._kept % forwards == 0:
            return_memory()

    def _crowded(self) -> bool:
        held = [batch for batch, passage in self.items() if not passage.is_parked]
        return sum(map(self._sizes, held)) > self._room
