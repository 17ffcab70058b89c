"""bitsandbytes' layouts, as transformers saves and loads them: NF4, and the weights of LLM.int8.

Of a matrix [out, in] of NF4 codes c in -8 … 7, with blocks of 64 inputs or another power of two:

    weight          uint8 [out·in/2, 1]  c + 8, two to a byte along the input, the first one high
    weight.absmax   fp32  [out·in/64]    largest magnitude of each block
    weight.quant_map  fp32 [16]          the table of NF4
    weight.quant_state.bitsandbytes__nf4  uint8, the rest as JSON: block, dtype, shape

and of LLM.int8:

    weight          int8  [out, in]      codes up to 127
    SCB             fp32  [out]          largest magnitude of each row
    weight_format   uint8                0: by rows

Nothing is rounded here. What is written is unpacked by the library itself, and must be the dense
weight bit for bit.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import VerificationError
from compressor.formats.exporters import Source
from compressor.formats.shards import TORCH_DTYPES
from compressor.formats.sizes import nf4_description
from compressor.formats.words import Tensors, dense_modules, schemes, write_words
from compressor.types import NF4, ActivationScheme, QTensor, WeightScheme

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises other packages
from bitsandbytes import functional as library  # noqa: E402

_STATE = "weight.quant_state.bitsandbytes__nf4"
_THRESHOLD = 6.0  # what the library assumes where nothing is said


def write(source: Source, out: Path) -> None:
    """Write a checkpoint that transformers loads with bitsandbytes.

    Raises:
        ModelError: codes that fit no matrix, or that the library cannot hold.
        VerificationError: dense weights and codes disagree, or the library reads others.
        ResourceError: the file system refused.
    """
    (number,) = {scheme.number for scheme in schemes(source).values()}
    inputs = next(iter(source.activations.values()), None)
    configuration = quantization_config(number == "nf4", inputs, dense_modules(source))
    write_words(source, out, _packed, unpack, configuration)


def _packed(quantized: QTensor) -> dict[str, Tensor]:
    tensors = pack(quantized)
    if not torch.equal(decompress(tensors).to(quantized.scale.dtype), quantized.dequantize()):
        shape = list(quantized.codes.shape)
        raise VerificationError(f"bitsandbytes reads codes {shape} otherwise than they were meant")
    return tensors


def pack(quantized: QTensor) -> dict[str, Tensor]:
    """The tensors of a matrix, by their names within the module; codes [out, in]."""
    largest, shape = quantized.scale.float().flatten(), quantized.codes.shape
    if quantized.scheme.number == "absmax":
        layout = torch.zeros((), dtype=torch.uint8)
        return {"weight": quantized.codes, "SCB": largest, "weight_format": layout}
    pairs = (quantized.codes.reshape(-1, 2) + 8).to(torch.uint8)
    dtype = next(name for name, known in TORCH_DTYPES.items() if known == quantized.scale.dtype)
    description = nf4_description(shape, quantized.scheme, dtype)
    return {
        "weight": pairs[:, :1] << 4 | pairs[:, 1:],
        "weight.absmax": largest,
        "weight.quant_map": torch.tensor(NF4),
        _STATE: torch.frombuffer(bytearray(description), dtype=torch.uint8),
    }


def unpack(tensors: Tensors) -> QTensor:
    """Inverse of `pack`; scales are fp32."""
    weight = tensors["weight"]
    if "SCB" in tensors:
        scheme = WeightScheme(8, None, number="absmax")
        return QTensor(weight, tensors["SCB"].unsqueeze(1), None, scheme)
    state = _state(tensors)
    out, in_features = state.shape
    codes = torch.cat([weight >> 4, weight & 15], 1).reshape(out, in_features).to(torch.int8) - 8
    scheme = WeightScheme(4, state.blocksize, number="nf4")
    return QTensor(codes, state.absmax.reshape(out, -1), None, scheme)


def decompress(tensors: Tensors) -> Tensor:
    """Dense weight [out, in] that the library makes of stored tensors."""
    if "SCB" in tensors:
        rows: Tensor = library.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        return rows
    weight: Tensor = library.dequantize_4bit(tensors["weight"], _state(tensors))
    return weight


def _state(tensors: Tensors) -> library.QuantState:
    """All but the codes; the library takes apart what it is given."""
    stored = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    return library.QuantState.from_dict(stored, torch.device("cpu"))


def quantization_config(
    nf4: bool, inputs: ActivationScheme | None, dense: list[str]
) -> dict[str, Any]:
    """What `config.json` says.

    Args:
        nf4: else LLM.int8.
        inputs: how LLM.int8 rounds inputs.
        dense: names of linear layers that stay as they are.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": nf4,
        "load_in_8bit": not nf4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": _THRESHOLD if inputs is None else inputs.threshold,
        "llm_int8_skip_modules": dense,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
