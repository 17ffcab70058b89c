"""What a checkpoint folder holds, from safetensors headers alone. No torch.

A safetensors file is an 8-byte little-endian header length, a JSON header and the raw tensors
(https://huggingface.co/docs/safetensors). Reading the header here, and not through the library,
gives sizes and hashes without torch, and one clear sentence for each way a file can be broken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: safetensors name, for example `BF16`.
        shape: sizes of the dimensions.
        begin: first byte within `file`.
        end: one past the last byte within `file`.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return math.prod(self.shape)


def read_json(path: Path) -> Any:
    """Parse a JSON file of a checkpoint.

    Raises:
        ModelError: the file is absent or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Raises:
        ModelError: the file is absent, truncated or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{file} is truncated or is not a safetensors file", _DAMAGED)
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist", _DAMAGED) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"the header of {file} is damaged: {error}", _DAMAGED) from error
    return _parse_header(file, header, data=8 + length, size=size)


_DAMAGED = "download or write the checkpoint again"


def _parse_header(
    file: Path, header: dict[str, Any], data: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: TensorInfo(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            data + entry["data_offsets"][0],
            data + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }
    end = max((info.end for info in tensors.values()), default=data)
    if end != size:
        raise ModelError(f"{file} has {size} bytes where its header promises {end}", _DAMAGED)
    return tensors, metadata


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, single-file or sharded, in name order.

    Raises:
        ModelError: no safetensors weights, a damaged file, an index that names an absent file
            or a tensor that its file lacks.
    """
    if (folder / INDEX).is_file():
        return _read_index(folder)
    if (folder / SINGLE).is_file():
        return dict(sorted(read_header(folder / SINGLE)[0].items()))
    hint = "convert pickled weights to safetensors first" if list(folder.glob("*.bin")) else ""
    raise ModelError(f"{folder} holds no safetensors weights ({INDEX} or {SINGLE})", hint)


def _read_index(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX} has no weight_map")
    files: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ModelError(f"{folder / INDEX} names {file!r}, which is not a plain file name")
        if not (folder / file).is_file():
            raise ModelError(f"{folder / INDEX} names {file}, which does not exist", _DAMAGED)
        files[file] = read_header(folder / file)[0]
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ModelError(f"{folder / INDEX} places {name} in {file}, which lacks it", _DAMAGED)
    return {name: files[file][name] for name, file in sorted(weight_map.items())}
