"""Tensors of a checkpoint directory, one at a time.

Every tensor is copied out of the mapped file and the mapping closed at once: pages of a mapped
file count as resident memory of the process, so that a mapping held open would grow with the
model and hide whether memory is bounded by a block.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import ModelError

INDEX = "model.safetensors.index.json"

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_config(path: Path) -> dict[str, Any]:
    """Content of `config.json` in a checkpoint directory.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no config.json, so it is not a model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must be a JSON object")
    return config


def weight_files(path: Path) -> tuple[Path, ...]:
    """Safetensors files of a checkpoint directory, as the index lists them if there is one.

    Raises:
        ModelError: there are none, one is missing, or the index names a file elsewhere.
    """
    index = path / INDEX
    if not index.is_file():
        whole = path / "model.safetensors"
        files = (whole,) if whole.is_file() else tuple(sorted(path.glob("*.safetensors")))
        if files:
            return files
        raise ModelError(*_no_weights(path))
    for name in _listed(index):
        if not (path / name).is_file():
            raise ModelError(f"{path} lacks {name}, which its index lists")
    return tuple(path / name for name in _listed(index))


def _listed(index: Path) -> list[str]:
    """Names of files in an index; every one must lie beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        listed = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index} is not an index of safetensors files") from None
    for name in listed:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} lists {name!r}, which is no safetensors file beside it")
    return listed


def _no_weights(path: Path) -> tuple[str, str]:
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickled:
        return (
            f"{path} holds its weights only as {pickled[0].name}; loading that would run code",
            "convert it once, where you trust it: load the model with transformers and call"
            " save_pretrained()",
        )
    return f"{path} holds no *.safetensors file", ""


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
        for name, shape in expected:
            if name not in self._files:
                raise ModelError(
                    f"{self.checkpoint} lacks the tensor {name}, which its config.json calls for",
                    "files older than transformers 5 may use other names: load the model with"
                    " transformers and save_pretrained() it once",
                )
            if self.shape(name) != shape:
                raise ModelError(
                    f"{name} has shape {list(self.shape(name))} on disk,"
                    f" but config.json calls for {list(shape)}"
                )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
