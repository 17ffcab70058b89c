"""Memory of tensors that nobody looks at for a while, in a file until they are needed again.

A forward that stands still in front of a matrix (`passage`) holds a dozen kilobytes for each token
of a wide model. Its tensors belong to the model's own code and cannot be replaced, but the storage
behind a tensor can be given back and filled again: torch's own `fully_shard` does that with
weights. The file has no name, so that it is gone with the process; its places are used again, so
that the operating system's cache of it stays as large as what is parked at one time.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from compressor.disk import writing
from compressor.errors import ResourceError


@dataclass(frozen=True)
class Parked:
    """A storage without memory, and where its bytes are."""

    storage: torch.UntypedStorage
    place: int
    size: int


class ParkingLot:
    """A file for the bytes of parked storages.

    Args:
        folder: on whose medium; made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._end = 0

    def park(self, storage: torch.UntypedStorage) -> Parked:
        """Write a storage's bytes and free its memory; nobody may use it until `fetch`.

        Args:
            storage: on the CPU, resizable, of more than no bytes.

        Raises:
            ResourceError: the disk refused the bytes, which then stay in memory.
        """
        size = storage.nbytes()
        place = self._free[size].pop() if self._free[size] else self._grown(size)
        with writing(self._folder):
            file = self._opened()
            file.seek(place)
            file.write(_bytes_of(storage))
            file.flush()
        storage.resize_(0)
        return Parked(storage, place, size)

    def fetch(self, parked: Parked) -> None:
        """Give a storage its memory and its bytes back.

        Raises:
            ResourceError: the file is shorter than what was written.
        """
        parked.storage.resize_(parked.size)
        file = self._opened()
        file.seek(parked.place)
        if file.readinto(_bytes_of(parked.storage)) != parked.size:  # type: ignore[attr-defined]
            raise ResourceError(
                f"{self._folder}: the file of parked activations lost bytes",
                "the disk may be failing; the same command goes on where it stopped",
            )
        self.forget(parked)

    def forget(self, parked: Parked) -> None:
        """Its bytes are not wanted any more."""
        self._free[parked.size].append(parked.place)

    def _grown(self, size: int) -> int:
        place, self._end = self._end, self._end + size
        return place

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        return self._file


def _bytes_of(storage: torch.UntypedStorage) -> ctypes.Array[Any]:
    """Its memory as a buffer. NumPy's view of it would fix its size for ever."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
