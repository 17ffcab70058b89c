"""Crash-safe Hugging Face checkpoints: write them block by block, read them tensor by tensor.

A shard exists under its name only when it is whole, so the shards present are the journal of
what is done, and the index, written last, says that the checkpoint is complete. Bytes depend on
the tensors alone: the library sorts them by dtype and name, and the metadata has a single key
(with several, its order would be random).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import ModelError
from compressor.formats.atomic import (
    atomic_write_json,
    remove_partial,
    replacing,
)
from compressor.formats.files import copy_parent_files
from compressor.formats.headers import INDEX, TensorInfo, read_folder, read_header
from compressor.types import TORCH_NAMES

SHARD_BYTES = 2 << 30  # of dense weights; bounds memory whatever the source's shards are
_CHUNK = 1 << 20

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in TORCH_NAMES.items()
}


def shard_name(part: int | str) -> str:
    """File name of the shard of decoder block `part`, or of a named part such as `embeddings`."""
    return (
        f"model-block-{part:05d}.safetensors"
        if isinstance(part, int)
        else (f"model-{part}.safetensors")
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file whole or not at all.

    Args:
        path: final name.
        tensors: any device, any strides; stored contiguous.
        metadata: at most one key, so that bytes are reproducible.

    Raises:
        ResourceError: the file system refused.
    """
    dense = {name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}
    with replacing(path) as temporary:
        save_file(dense, temporary, metadata=dict(metadata))


class CheckpointWriter:
    """Writes a Hugging Face checkpoint shard by shard; a second writer resumes the first.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def finished(self) -> bool:
        """Whether `finish` has run to its end."""
        return (self.folder / INDEX).is_file()

    def has_shard(self, name: str) -> bool:
        """Whether shard `name` is on disk and whole; a truncated one counts as absent."""
        if not (self.folder / name).is_file():
            return False
        try:
            read_header(self.folder / name)
        except ModelError:
            return False
        return True

    def write_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors` (by full name) as shard `name`, replacing one of that name.

        Args:
            name: file name, `model-….safetensors` (see `shard_name`).
            tensors: a tied tensor goes in once, under one of its names.

        Raises:
            ResourceError: the file system refused.
            ValueError: `name` is not a shard name.
        """
        if not (name.startswith("model-") and name.endswith(".safetensors")):
            raise ValueError(f"a shard is called model-….safetensors, not {name!r}")
        save_tensors(self.folder / name, tensors, {"format": "pt"})

    def shards(self) -> list[str]:
        """Names of the shards on disk, sorted."""
        return sorted(path.name for path in self.folder.glob("model-*.safetensors"))

    def finish(self, config: Mapping[str, Any], copy_from: Path, logical_parameters: int) -> None:
        """Add everything that makes the shards a loadable checkpoint; the index comes last.

        Args:
            config: content of `config.json`.
            copy_from: parent checkpoint, whose `PARENT_FILES` are copied byte for byte.
            logical_parameters: number of weights of the model, ties once. Packed tensors hide
                it, so the Hub would show a wrong count without this.

        Raises:
            ModelError: two shards hold the same tensor, or a shard is damaged.
            ResourceError: the file system refused.
        """
        weight_map, total = self._weight_map()
        copy_parent_files(copy_from, self.folder)
        atomic_write_json(self.folder / "config.json", dict(config))
        remove_partial(self.folder)
        metadata = {"total_size": total, "total_parameters": logical_parameters}
        atomic_write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _weight_map(self) -> tuple[dict[str, str], int]:
        weight_map: dict[str, str] = {}
        total = 0
        for shard in self.shards():
            for name, info in read_header(self.folder / shard)[0].items():
                if name in weight_map:
                    raise ModelError(f"{name} is stored twice: {weight_map[name]} and {shard}")
                weight_map[name] = shard
                total += info.nbytes
        return weight_map, total


class CheckpointReader(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each loaded when asked for and not kept.

    Args:
        folder: single-file or sharded safetensors checkpoint.

    Raises:
        ModelError: see `headers.read_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = read_folder(folder)

    def __getitem__(self, name: str) -> Tensor:
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt", device="cpu") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"cannot read {name} from {info.file}: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> tuple[str, ...]:
        """Every tensor name, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """File, dtype, shape and byte range of a tensor, without reading it.

        Raises:
            ModelError: the checkpoint has no such tensor.
        """
        if name not in self._tensors:
            raise ModelError(f"{self.folder} holds no tensor {name}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor's dimensions, without reading it."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Torch dtype of a tensor, without reading it."""
        return TORCH_DTYPES[self.info(name).dtype]

    def tensor_sha256(self, name: str) -> str:
        """SHA-256 of dtype, shape and raw bytes: equal exactly when the tensors are identical."""
        info = self.info(name)
        digest = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.begin)
            for start in range(0, info.nbytes, _CHUNK):
                digest.update(stream.read(min(_CHUNK, info.nbytes - start)))
        return digest.hexdigest()


def read_tensors(folder: Path) -> CheckpointReader:
    """Open a checkpoint for lazy reading; see `CheckpointReader`."""
    return CheckpointReader(folder)


def plan_shards(reader: CheckpointReader, limit: int) -> Iterator[list[str]]:
    """Cut the names, in order, where the dense bytes would pass the limit."""
    names: list[str] = []
    size = 0
    for name in reader.names():
        nbytes = reader.info(name).nbytes
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names
