"""Sizes by formula before anything runs, and by measurement after. No torch.

One definition serves both (reference: honest size): bytes are bytes on disk, ties count once,
and bits per weight divide by the logical parameters of the *base* model, so that pruning shows.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compressor.formats.files import GRAPHS, checkpoint_bytes, checkpoint_files
from compressor.formats.headers import (
    DTYPE_BITS,
    FLOATING,
    TensorInfo,
    read_folder,
    read_json,
)
from compressor.formats.support import ABSMAX, Format
from compressor.types import NF4, WeightScheme

Role = Literal["codes", "scales", "zero_points", "embeddings", "head", "rest"]
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""Dtypes as `config.json` names them -> as safetensors does."""

_SHAPE_BYTES = 16  # weight_shape, int64 [2]
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_positions)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_GRAPH_WEIGHTS = ("model.onnx", "openvino_model")
_SUFFIX_ROLES: Mapping[str, Role] = {
    "weight_packed": "codes",
    "weight_scale": "scales",
    "weight_global_scale": "scales",
    "k_scale": "scales",  # of the cache, as is the next one
    "v_scale": "scales",
    "weight_zero_point": "zero_points",
    "qweight": "codes",  # of GPTQ and AWQ, as are the next two
    "scales": "scales",
    "qzeros": "zero_points",
    "absmax": "scales",  # of bitsandbytes, as is the next
    "SCB": "scales",
}


class PackedSize(BaseModel):
    """Bytes on disk of one exported matrix; `shape` is what says how it is laid out.

    In bitsandbytes that is the table of NF4 with its description, or a byte.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    codes: int
    scales: int
    zero_points: int
    shape: int

    @property
    def total(self) -> int:
        """All tensors of the matrix."""
        return self.codes + self.scales + self.zero_points + self.shape


class SizeReport(BaseModel):
    """What a checkpoint weighs.

    Attributes:
        bytes_on_disk: every file needed to load, tokenizer included.
        tensor_bytes: all tensors.
        logical_parameters: weights of the base model, ties once.
        bits_checkpoint: 8 · tensor_bytes / logical_parameters, the headline.
        bits_nominal: mean code width over the weights of linear layers; a dense one counts its
            own width.
        bits_linear: the same with scales and zero-points.
        by_role: bytes of tensors; `embeddings` and `head` include their scales, `rest` is dense
            linear layers, norms, biases and shapes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_on_disk: int
    tensor_bytes: int
    logical_parameters: int
    bits_checkpoint: float
    bits_nominal: float
    bits_linear: float
    by_role: dict[Role, int]


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a dense tensor; `dtype` as safetensors names it (`BF16`, `F32`, …)."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def packed_bytes(
    shape: tuple[int, int],
    scheme: WeightScheme,
    scale_dtype: str = "BF16",
    form: Format = "pack-quantized",
) -> PackedSize:
    """Exact bytes of one matrix in a compressed-tensors export.

    Packed rows are whole 32-bit words: out · ceil(in·bits / 32) of them. Zero-points are packed
    the other way, along the output: ceil(out·bits / 32) · groups words.

    Args:
        shape: [out, in].
        scheme: the grid; its group size divides `in`.
        scale_dtype: as safetensors names it.
        form: int-quantized stores a byte per code and per zero-point, and no shape. Float grids
            have one layout each, and so do the two of bitsandbytes.
    """
    out, in_features = shape
    groups = scheme.groups(in_features)
    scales = out * groups * DTYPE_BITS[scale_dtype] // 8
    asymmetric = scheme.symmetry == "asymmetric"
    if scheme.number in ABSMAX:
        return _absmax_bytes(shape, scheme, scale_dtype)
    if scheme.number == "float":
        return _float_bytes(shape, scheme, scale_dtype)
    if form == "int-quantized":
        zeros = out * groups if asymmetric else 0
        return PackedSize(codes=out * in_features, scales=scales, zero_points=zeros, shape=0)
    zeros = _words(out, scheme.bits) * 4 * groups if asymmetric else 0
    codes = out * _words(in_features, scheme.bits) * 4
    return PackedSize(codes=codes, scales=scales, zero_points=zeros, shape=_SHAPE_BYTES)


def _float_bytes(shape: tuple[int, int], scheme: WeightScheme, scale_dtype: str) -> PackedSize:
    """Two fp4 to a byte, or fp8; scales of a byte if they are not dense; a divisor in fp32."""
    out, in_features = shape
    width = DTYPE_BITS[scale_dtype] // 8 if scheme.scales == "dense" else 1
    scales = out // scheme.rows * scheme.groups(in_features) * width
    divisor = 4 if scheme.scales == "e4m3" else 0
    codes = out * in_features * scheme.bits // 8
    return PackedSize(codes=codes, scales=scales + divisor, zero_points=0, shape=0)


def _absmax_bytes(shape: tuple[int, int], scheme: WeightScheme, dtype: str) -> PackedSize:
    """Two NF4 to a byte with fp32 scales, their table and its description; or bytes and a byte."""
    out, in_features = shape
    scales = 4 * out * scheme.groups(in_features)
    codes = out * in_features * scheme.bits // 8
    table = 4 * len(NF4) + len(nf4_description(shape, scheme, dtype))
    return PackedSize(
        codes=codes, scales=scales, zero_points=0, shape=table if scheme.number == "nf4" else 1
    )


def nf4_description(shape: Sequence[int], scheme: WeightScheme, dtype: str) -> bytes:
    """What bitsandbytes stores beside NF4 codes, as JSON: block, dtype and shape of the weight.

    Args:
        shape: [out, in].
        scheme: of number `nf4`.
        dtype: of the dense weight, as safetensors names it.
    """
    name = next(name for name, stored in STORED.items() if stored == dtype)
    blocks = {"quant_type": "nf4", "blocksize": scheme.group_size}
    return json.dumps(blocks | {"dtype": name, "shape": list(shape)}).encode()


def _words(elements: int, bits: int) -> int:
    return -(-elements * bits // 32)


def bits_per_weight(
    shape: tuple[int, int],
    scheme: WeightScheme,
    scale_dtype: str = "BF16",
    form: Format = "pack-quantized",
) -> float:
    """Bits per weight with scales, zero-points and padding: 4.125 for 4 bits in groups of 128."""
    size = packed_bytes(shape, scheme, scale_dtype, form)
    return 8 * (size.codes + size.scales + size.zero_points) / math.prod(shape)


def measure(folder: Path, logical_parameters: int) -> SizeReport:
    """Weigh a checkpoint from its headers.

    Args:
        folder: dense, compressed-tensors, GPTQ, AWQ or bitsandbytes checkpoint, or one with a
            GGUF file or a graph.
        logical_parameters: weights of the base model, ties once.

    Raises:
        ModelError: the weights are missing or damaged.
    """
    if whole := sorted(folder.glob("*.gguf")):
        from compressor.formats.gguf_sizes import measure_gguf

        return measure_gguf(whole[0], logical_parameters)
    if any((folder / name).is_file() for name in GRAPHS):
        return _measure_graph(folder, logical_parameters)
    tensors = read_folder(folder)
    by_role: Counter[Role] = Counter(
        {"codes": 0, "scales": 0, "zero_points": 0, "embeddings": 0, "head": 0, "rest": 0}
    )
    for name, info in tensors.items():
        by_role[_role(name, info)] += info.nbytes
    total = sum(by_role.values())
    nominal, with_scales = _linear_bits(folder, tensors)
    return SizeReport(
        bytes_on_disk=checkpoint_bytes(folder),
        tensor_bytes=total,
        logical_parameters=logical_parameters,
        bits_checkpoint=8 * total / logical_parameters,
        bits_nominal=nominal,
        bits_linear=with_scales,
        by_role=dict(by_role),
    )


def _measure_graph(folder: Path, logical_parameters: int) -> SizeReport:
    """Weights of a graph are fp32; the graph around them counts as such, a few per cent at most."""
    total = sum(
        path.stat().st_size
        for path in checkpoint_files(folder)
        if path.name.startswith(_GRAPH_WEIGHTS) and path.suffix != ".xml"
    )
    return SizeReport(
        bytes_on_disk=checkpoint_bytes(folder),
        tensor_bytes=total,
        logical_parameters=logical_parameters,
        bits_checkpoint=8 * total / logical_parameters,
        bits_nominal=32,
        bits_linear=32,
        by_role={"rest": total},
    )


def _role(name: str, info: TensorInfo) -> Role:
    if _EMBEDDINGS.search(name):
        return "embeddings"
    if _HEAD.search(name):
        return "head"
    if name.endswith(".weight") and info.dtype in ("I8", "U8", "F8_E4M3"):
        return "codes"
    return _SUFFIX_ROLES.get(name.rpartition(".")[2], "rest")


def _linear_bits(folder: Path, tensors: Mapping[str, TensorInfo]) -> tuple[float, float]:
    """Mean bits of a linear weight: codes alone, and with scales and zero-points."""
    groups = _config_groups(folder)
    elements, code_bits, stored_bits = 0, 0, 0
    for name, info in tensors.items():
        if _EMBEDDINGS.search(name) or _HEAD.search(name):
            continue
        module, _, leaf = name.rpartition(".")
        if _SUFFIX_ROLES.get(leaf) in ("scales", "zero_points"):
            stored_bits += 8 * info.nbytes
        elif count := _weights(name, info, tensors):
            dense = info.dtype in FLOATING
            elements += count
            stored = leaf == "qweight" or (leaf == "weight" and info.dtype == "U8")
            bits = 8 * info.nbytes // count if stored else _code_bits(module, groups)
            code_bits += count * (DTYPE_BITS[info.dtype] if dense else bits)
            stored_bits += 8 * info.nbytes
    return (code_bits / elements, stored_bits / elements) if elements else (0.0, 0.0)


def _weights(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> int:
    """Number of linear weights that a tensor stores; 0 for anything else."""
    if name.endswith((".weight_packed", ".weight")) and info.dtype == "U8":
        return 2 * info.elements  # fp4, NF4
    if name.endswith(".weight_packed"):
        shape = tensors[name.removesuffix("packed") + "shape"]
        with shape.file.open("rb") as stream:
            stream.seek(shape.begin)
            return math.prod(struct.unpack("<2q", stream.read(_SHAPE_BYTES)))
    if name.endswith(".qweight"):
        indices = tensors.get(name.removesuffix("qweight") + "g_idx")
        scales = tensors[name.removesuffix("qweight") + "scales"]
        return (indices.elements if indices else info.shape[0]) * scales.shape[1]
    # Fused experts are three-dimensional parameters without the suffix `.weight`.
    is_matrix = len(info.shape) == 3 or (len(info.shape) == 2 and name.endswith(".weight"))
    return info.elements if is_matrix else 0


def _config_groups(folder: Path) -> list[dict[str, Any]]:
    config = read_json(folder / "config.json").get("quantization_config", {})
    return list(config.get("config_groups", {}).values())


def _code_bits(module: str, groups: Sequence[Mapping[str, Any]]) -> int:
    """Code width of a module by its group's targets; exact names first, then patterns, classes."""
    for matches in (_is_named, _is_pattern, _is_class):
        for group in groups:
            if any(matches(target, module) for target in group["targets"]):
                return int(group["weights"]["num_bits"])
    return 8  # int8 weights without a configuration


def _is_named(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str, module: str) -> bool:
    return target == "Linear"
