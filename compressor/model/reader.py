"""Tensors of a checkpoint directory, one at a time.

Every tensor is copied out of the mapped file and the mapping closed at once: pages of a mapped
file count as resident memory of the process, so that a mapping held open would grow with the
model and hide whether memory is bounded by a block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import ModelError
from compressor.model.files import require_tensors, weight_files
from compressor.types import TORCH_NAMES

_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in TORCH_NAMES.items()
}


class TensorReader:
    """What lies in the safetensors files of a checkpoint directory.

    Raises:
        ModelError: no weights, a damaged file, or a tensor that two files hold.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in weight_files(checkpoint):
            self._scan(path)

    def _scan(self, path: Path) -> None:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 — a safetensors handle is no mapping
                if name in self._files:
                    raise ModelError(
                        f"{name} lies in both {self._files[name].name} and {path.name}"
                    )
                header = file.get_slice(name)
                self._files[name] = path
                self._headers[name] = (tuple(header.get_shape()), header.get_dtype())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, file by file."""
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk."""
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk.

        Raises:
            ModelError: torch has no such dtype.
        """
        try:
            return _DTYPES[self._headers[name][1]]
        except KeyError:
            raise ModelError(f"{name} has the unknown dtype {self._headers[name][1]}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, exactly as on disk, in memory of its own.

        Raises:
            ModelError: there is none of that name, or the file is damaged.
        """
        if name not in self._files:
            raise ModelError(f"{self.checkpoint} holds no tensor {name!r}")
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def under(self, prefix: str) -> tuple[str, ...]:
        """Names that begin so."""
        return tuple(name for name in self._files if name.startswith(prefix))

    def require(self, expected: Collection[tuple[str, tuple[int, ...]]]) -> None:
        """Check that tensors of these names and shapes are there.

        Raises:
            ModelError: naming the first that is missing or has another shape.
        """
        require_tensors(self.checkpoint, {name: self.shape(name) for name in self._files}, expected)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
