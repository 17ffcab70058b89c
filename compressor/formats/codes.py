"""Codes, scales and zero-points of a rounder, stored beside the dense weights.

Packing for an engine reads these files, so no weight is ever rounded twice. One file per block
keeps writing and reading bounded by a block. Codes of 2 or 4 bits share a byte (others take the
next of 2, 4, 8 bits up); everything round-trips exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import ModelError
from compressor.formats.headers import read_header
from compressor.formats.shards import save_tensors
from compressor.types import QTensor, WeightScheme

_KEY = "compressor.codes"


def codes_name(part: int | str) -> str:
    """File name of the codes of decoder block `part`, or of a named part such as `head`."""
    return (
        f"codes-block-{part:05d}.safetensors"
        if isinstance(part, int)
        else (f"codes-{part}.safetensors")
    )


def _stored_bits(bits: int) -> int:
    return next(width for width in (2, 4, 8) if bits <= width)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes 8 // stored bits to a byte along the input, first code lowest.

    Args:
        codes: int8 [out, in] within [-2^(bits-1), 2^(bits-1) - 1].
        bits: width of a code, 2 to 8.

    Returns:
        uint8 [out, ceil(in · stored / 8)] with stored the next of 2, 4, 8.
    """
    width = _stored_bits(bits)
    per_byte = 8 // width
    unsigned = (codes.to(torch.int16) + (1 << (width - 1))).to(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % per_byte))
    lanes = padded.view(codes.shape[0], -1, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * width)
    return packed


def unpack_bytes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Inverse of `pack_bytes`: int8 [out, in_features]."""
    width = _stored_bits(bits)
    mask = (1 << width) - 1
    lanes = [(packed >> (lane * width)) & mask for lane in range(8 // width)]
    unsigned = torch.stack(lanes, dim=-1).view(packed.shape[0], -1)[:, :in_features]
    return (unsigned.to(torch.int16) - (1 << (width - 1))).to(torch.int8)


def write_codes(path: Path, codes: Mapping[str, QTensor]) -> None:
    """Store what a rounder produced for some matrices, whole or not at all.

    Args:
        path: file to write, usually `folder / codes_name(block)`.
        codes: module name (the matrix on disk without `.weight`) to its codes.

    Raises:
        ResourceError: the file system refused.
    """
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, dict[str, object]] = {}
    for module, quantized in codes.items():
        tensors[f"{module}.codes"] = pack_bytes(quantized.codes, quantized.scheme.bits)
        tensors[f"{module}.scale"] = quantized.scale
        if quantized.zero_point is not None:
            tensors[f"{module}.zero_point"] = quantized.zero_point
        if quantized.divisor is not None:
            tensors[f"{module}.divisor"] = quantized.divisor
        schemes[module] = {**asdict(quantized.scheme), "in_features": quantized.codes.shape[1]}
    save_tensors(path, tensors, {_KEY: json.dumps(schemes, sort_keys=True)})


def read_codes(path: Path) -> dict[str, QTensor]:
    """Every matrix of one codes file.

    Raises:
        ModelError: the file is absent, damaged or not a codes file.
    """
    return {module: _load(path, module, entry) for module, entry in _schemes(path).items()}


def _schemes(path: Path) -> dict[str, dict[str, object]]:
    metadata = read_header(path)[1]
    if _KEY not in metadata:
        raise ModelError(f"{path} is not a codes file: its metadata lacks {_KEY!r}")
    schemes: dict[str, dict[str, object]] = json.loads(metadata[_KEY])
    return schemes


def _load(path: Path, module: str, entry: Mapping[str, object]) -> QTensor:
    fields = dict(entry)
    in_features = int(str(fields.pop("in_features")))
    scheme = WeightScheme(**fields)  # type: ignore[arg-type]
    asymmetric = scheme.symmetry == "asymmetric"
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            packed = handle.get_tensor(f"{module}.codes")
            # Copies: what the file itself lends would keep all of it mapped.
            scale = handle.get_tensor(f"{module}.scale").clone()
            zero_point = handle.get_tensor(f"{module}.zero_point").clone() if asymmetric else None
            divided = scheme.scales == "e4m3"
            divisor = handle.get_tensor(f"{module}.divisor").clone() if divided else None
    except SafetensorError as error:
        raise ModelError(f"cannot read the codes of {module} from {path}: {error}") from error
    codes = unpack_bytes(packed, scheme.bits, in_features)
    return QTensor(codes, scale, zero_point, scheme, divisor)


class CodesReader(Mapping[str, QTensor]):
    """All codes of some folders by module name, each loaded when asked for and not kept.

    Args:
        folders: hold `codes-*.safetensors`; none at all gives an empty mapping.

    Raises:
        ModelError: a file is damaged, or two files hold the same module.
    """

    def __init__(self, *folders: Path) -> None:
        self._entries: dict[str, tuple[Path, dict[str, object]]] = {}
        for path in (p for folder in folders for p in sorted(folder.glob("codes-*.safetensors"))):
            for module, entry in _schemes(path).items():
                if module in self._entries:
                    other = self._entries[module][0].name
                    raise ModelError(f"{module} has codes twice: in {other} and {path.name}")
                self._entries[module] = (path, entry)

    def __getitem__(self, module: str) -> QTensor:
        if module not in self._entries:
            raise KeyError(module)
        return _load(self._entries[module][0], module, self._entries[module][1])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, module: object) -> bool:
        return module in self._entries

    def scheme(self, module: str) -> WeightScheme:
        """Scheme of a module, without reading its codes."""
        entry = dict(self._entries[module][1])
        del entry["in_features"]
        return WeightScheme(**entry)  # type: ignore[arg-type]
