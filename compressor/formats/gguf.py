"""GGUF for llama.cpp: one file with weights, tokenizer and chat template.

Matrices with codes go into blocks bit by bit (`gguf_blocks`); other matrices keep their dtype
(BF16, F16, F32); vectors are F32, as llama.cpp wants them. Rows of q and k are reordered for the
llama architecture, whose rotary positions turn neighbouring pairs instead of halves of a head.

A file that is meant for llama.cpp's quantizer says so under `compressor.quantizer`; the quantizer
carries the key on, so that its blocks are told from ours when the file is read. Matrices that the
export itself rounds (`Source.embedding`) are named under `compressor.rounded`, for the same reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats.atomic import replacing
from compressor.formats.exchange import GGUF_FAMILIES, gguf_type
from compressor.formats.exporters import Source
from compressor.formats.gguf_blocks import pack_blocks, unpack_blocks
from compressor.formats.gguf_metadata import (
    DTYPE_KEY,
    QUANTIZER_KEY,
    ROUNDED_KEY,
    add_metadata,
    check,
    configuration,
    rope_factors,
)
from compressor.formats.gguf_types import GgufType
from compressor.formats.headers import read_json
from compressor.formats.shards import CheckpointReader
from compressor.formats.words import schemes
from compressor.types import QTensor

__all__ = ["FILE", "check", "read", "write"]

FILE = "model.gguf"
_OUTER: Mapping[str, str] = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
_INNER: Mapping[str, str] = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_STORED = re.compile(r"blk\.(\d+)\.(.+)")
_FACTORS = "rope_freqs.weight"
_ROUNDED = ("model.embed_tokens", "lm_head")
FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
}  # fmt: skip
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor.

    Raises:
        ModelError: the tensor has none in the families that are written.
    """
    module, _, leaf = name.rpartition(".")
    match = _BLOCK.fullmatch(module)
    if match and match[2] in _INNER:
        return f"blk.{match[1]}.{_INNER[match[2]]}.{leaf}"
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    raise ModelError(f"llama.cpp has no name for the tensor {name}")


def hugging_face_name(name: str) -> str:
    """Inverse of `gguf_name`."""
    module, _, leaf = name.rpartition(".")
    match = _STORED.fullmatch(module)
    table = {stored: own for own, stored in (_INNER if match else _OUTER).items()}
    if match:
        return f"model.layers.{match[1]}.{table[match[2]]}.{leaf}"
    return f"{table[module]}.{leaf}"


def row_order(name: str, rows: int, heads: Mapping[str, int]) -> Tensor | None:
    """Row i of the stored tensor is row `order[i]` of the checkpoint's; None: as it is.

    Rotary positions in transformers pair row j of a head with row j + half; llama.cpp's llama
    architecture pairs rows 2j and 2j + 1.

    Args:
        name: of the checkpoint's tensor.
        rows: of it.
        heads: number of heads of `q_proj` and `k_proj`; empty for other architectures.
    """
    count = heads.get(name.split(".")[-2])
    if count is None:
        return None
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)


def llama_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of `q_proj` and `k_proj`, whose rows the llama architecture pairs; see `row_order`."""
    heads = int(config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}


def _heads(family: str, config: Mapping[str, Any]) -> dict[str, int]:
    return llama_heads(config) if family == "llama" else {}


def write(source: Source, out: Path) -> None:
    """Write `model.gguf`, one tensor in memory at a time.

    Raises:
        ModelError: the model is of a kind that is not written.
        VerificationError: dense weights and codes disagree.
        ResourceError: the file system refused.
    """
    grids, reader = schemes(source), CheckpointReader(source.checkpoint)
    config = read_json(source.checkpoint / "config.json")
    check(source.checkpoint)
    family = GGUF_FAMILIES[config["model_type"]]
    names = _written(config, reader)
    kinds = {name: _kind(reader, name, grids.get(name.removesuffix(".weight"))) for name in names}
    rounded = {name: source.embedding for name in rounded_here(source) if source.embedding}
    kinds |= rounded
    tensors = _Tensors(source, reader, kinds, _heads(family, config))
    with replacing(out / FILE) as temporary:
        writer = gguf.GGUFWriter(temporary, family)
        common = Counter(kinds[n] for n in names if len(reader.shape(n)) == 2).most_common(1)
        dtype = reader.dtype("model.embed_tokens.weight")
        add_metadata(writer, source.checkpoint, FILE_TYPES[common[0][0]], dtype)
        if source.container == "llama-quantize":
            writer.add_string(QUANTIZER_KEY, source.container)
        if rounded:
            writer.add_array(ROUNDED_KEY, [gguf_name(name) for name in rounded])
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(_FACTORS, factors.shape, np.dtype("float32"), factors.nbytes)
        for name in names:
            writer.add_tensor_info(gguf_name(name), *tensors.info(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for name in names:
            writer.write_tensor_data(tensors.data(name))
        writer.close()


def _written(config: Mapping[str, Any], reader: CheckpointReader) -> list[str]:
    """Names of what goes into the file: no copy of a tied embedding, nothing that no module reads.

    The caller's look at the finished file tells whether a tensor of the model is missing.
    """
    tied = _is_tied(config, reader)
    return [n for n in reader if _has_name(n) and not (tied and n == "lm_head.weight")]


def _has_name(name: str) -> bool:
    try:
        return bool(gguf_name(name))
    except ModelError:
        return False


def _is_tied(config: Mapping[str, Any], reader: CheckpointReader) -> bool:
    return bool(config.get("tie_word_embeddings")) and "model.embed_tokens.weight" in reader


def rounded_here(source: Source) -> tuple[str, ...]:
    """Weights of an embedding and a head without codes, which the export rounds if it is asked to.

    A head that is tied to the embedding has no weights of its own in the file.
    """
    if source.embedding is None:
        return ()
    reader = CheckpointReader(source.checkpoint)
    tied = _is_tied(read_json(source.checkpoint / "config.json"), reader)
    modules = _ROUNDED[:1] if tied else _ROUNDED
    found = [f"{module}.weight" for module in modules if module not in source.codes]
    return tuple(name for name in found if name in reader)


def _kind(reader: CheckpointReader, name: str, scheme: Any) -> str:
    if len(reader.shape(name)) == 1:
        return "F32"
    if scheme is None:
        return FLOATS[reader.dtype(name)]
    kind = gguf_type(scheme)
    assert kind is not None  # `schemes` has refused what no block holds
    return kind


class _Tensors:
    """What stands in the file for each tensor, made when asked for."""

    def __init__(
        self,
        source: Source,
        reader: CheckpointReader,
        kinds: Mapping[str, str],
        heads: Mapping[str, int],
    ) -> None:
        self.source = source
        self.reader = reader
        self.kinds = kinds
        self.heads = heads

    def info(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int, Any]:
        """Shape in bytes, dtype of bytes, number of bytes, type of block."""
        kind = gguf.GGMLQuantizationType[self.kinds[name]]
        *outer, last = self.reader.shape(name)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*outer, last // elements * size)
        return shape, np.dtype("uint8"), int(np.prod(shape)), kind

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """The bytes."""
        tensor, kind = self.reader[name], self.kinds[name]
        order = row_order(name, tensor.shape[0], self.heads)
        if kind in FLOATS.values():
            dtype = next(d for d, stored in FLOATS.items() if stored == kind)
            return _raw(tensor.to(dtype) if order is None else tensor[order].to(dtype))
        if name.removesuffix(".weight") not in self.source.codes:
            blocks = gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
            return blocks.view(np.uint8)
        quantized = self.source.codes[name.removesuffix(".weight")]
        if not torch.equal(quantized.dequantize(), tensor):
            raise VerificationError(f"{name} was changed after it was rounded to its codes")
        return _raw(_pack_checked(name, _rows(quantized, order), kind))  # type: ignore[arg-type]


def _rows(quantized: QTensor, order: Tensor | None) -> QTensor:
    if order is None:
        return quantized
    zero = None if quantized.zero_point is None else quantized.zero_point[order]
    return QTensor(quantized.codes[order], quantized.scale[order], zero, quantized.scheme)


def _pack_checked(name: str, quantized: QTensor, kind: GgufType) -> Tensor:
    blocks = pack_blocks(quantized, kind)
    if not torch.equal(unpack_blocks(blocks, kind, quantized.scale.dtype).codes, quantized.codes):
        raise VerificationError(f"packing lost codes of {name}")
    return blocks


def _raw(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.contiguous().view(torch.uint8).numpy()
    return array


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor of a checkpoint, by its name there, from its GGUF file alone.

    Blocks of llama.cpp's quantizer, and of matrices that the export rounded, become fp32.
    """
    reader = gguf.GGUFReader(folder / FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    family = fields["general.architecture"]
    dtype = getattr(torch, str(fields[DTYPE_KEY]))
    heads = _heads(
        family,
        {
            "num_attention_heads": fields[f"{family}.attention.head_count"],
            "num_key_value_heads": fields[f"{family}.attention.head_count_kv"],
        },
    )
    rounded = fields.get(ROUNDED_KEY, ())
    for stored in reader.tensors:
        if stored.name == _FACTORS:
            continue
        name = hugging_face_name(stored.name)
        ours = QUANTIZER_KEY not in fields and stored.name not in rounded
        value = _dense(stored, dtype, ours=ours)
        order = row_order(name, value.shape[0], heads)
        yield name, value if order is None else value[order.argsort()]


def described(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The configuration that a file describes, and shapes by the names of the checkpoint."""
    reader = gguf.GGUFReader(folder / FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {
        hugging_face_name(stored.name): tuple(int(size) for size in stored.shape[::-1])
        for stored in reader.tensors
        if stored.name != _FACTORS
    }
    return configuration(fields, shapes), shapes


def _dense(stored: Any, dtype: torch.dtype, *, ours: bool) -> Tensor:
    kind = stored.tensor_type.name
    if kind not in FLOATS.values() and not ours:
        return torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    data = torch.from_numpy(np.ascontiguousarray(stored.data).view(np.uint8).copy())
    if kind in FLOATS.values():
        own = next(d for d, name in FLOATS.items() if name == kind)
        return data.view(-1).view(own).view(*(int(size) for size in stored.shape[::-1]))
    return unpack_blocks(data, kind, dtype).dequantize()
