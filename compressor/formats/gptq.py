"""GPTQ's layout (AutoGPTQ, GPTQModel): codes packed along the input, for GPTQModel and vLLM.

Of a matrix [out, in] with codes c, zero-points z (signed here, unsigned there) and b bits:

    qweight  int32 [in·b/32, out]     c + 2^(b-1), one stream of bits down each column
    qzeros   int32 [groups, out·b/32] z + 2^(b-1), in v1 less one, one stream along each row
    scales   fp16  [groups, out]
    g_idx    int32 [in]               group of every input; act-order here is static, so i // size

Version 1 (`checkpoint_format: gptq`) stores zero-points less one, which cannot say 0; it is written
for symmetric grids, where every engine reads it. `gptq_v2` stores them as they are and is written
as soon as one grid is asymmetric. Tests build the words from this definition, bit by bit, and vLLM
computes from them what it computes from compressed-tensors (`tests/engines`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compressor
from compressor.formats.atomic import atomic_write_json
from compressor.formats.exporters import Source
from compressor.formats.headers import read_json
from compressor.formats.words import (
    Tensors,
    dense_modules,
    from_words,
    half_scales,
    read_words,
    schemes,
    to_words,
    write_words,
)
from compressor.types import QTensor, WeightScheme

_FUSED = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))


def write(source: Source, out: Path) -> None:
    """Write a GPTQ checkpoint, with `quantize_config.json` beside `config.json`.

    Raises:
        ModelError: codes that fit no matrix, or that GPTQ cannot hold.
        VerificationError: dense weights and codes disagree, or packing lost a code.
        ResourceError: the file system refused.
    """
    configuration = quantization_config(schemes(source), dense_modules(source))
    version = 2 if configuration["checkpoint_format"] == "gptq_v2" else 1
    write_words(
        source,
        out,
        partial(pack, version=version),
        partial(unpack, version=version),
        configuration,
    )
    atomic_write_json(out / "quantize_config.json", configuration)


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor of a GPTQ checkpoint, from its files alone."""
    config = read_json(folder / "config.json")["quantization_config"]
    version = 2 if config["checkpoint_format"] == "gptq_v2" else 1
    return read_words(folder, lambda _, tensors: unpack(tensors, version=version))


def pack(quantized: QTensor, *, version: int) -> dict[str, Tensor]:
    """The four tensors of a matrix, by their names within the module.

    Args:
        quantized: codes [out, in]; in·bits and out·bits fill 32-bit words.
        version: 1 stores zero-points less one, modulo 2^bits; 2 as they are.
    """
    bits, (out, in_features) = quantized.scheme.bits, quantized.codes.shape
    half, groups = 1 << (bits - 1), quantized.scale.shape[1]
    zero = quantized.zero_point
    signed = torch.zeros(out, groups, dtype=torch.int64) if zero is None else zero.long()
    stored = (signed + half - (2 - version)) % (1 << bits)
    return {
        "qweight": to_words(quantized.codes.long() + half, bits).T.contiguous(),
        "qzeros": to_words(stored.T, bits),
        "scales": half_scales(quantized.scale).T.contiguous(),
        "g_idx": (torch.arange(in_features) // (in_features // groups)).to(torch.int32),
    }


def unpack(tensors: Tensors, *, version: int) -> QTensor:
    """Inverse of `pack`; the width follows from the shapes, zero-points are always given."""
    qweight, scales = tensors["qweight"], tensors["scales"]
    in_features, groups = len(tensors["g_idx"]), scales.shape[0]
    bits = 32 * qweight.shape[0] // in_features
    half = 1 << (bits - 1)
    codes = from_words(qweight.T, bits) - half
    stored = from_words(tensors["qzeros"], bits) + (2 - version)
    zero = (stored % (1 << bits)).T - half
    scheme = WeightScheme(bits, in_features // groups, "asymmetric")
    return QTensor(codes.to(torch.int8), scales.T.contiguous(), zero.to(torch.int8), scheme)


def quantization_config(grids: Mapping[str, WeightScheme], dense: list[str]) -> dict[str, Any]:
    """What `config.json` and `quantize_config.json` say.

    The commonest grid is the default; other grids and dense layers are named under `dynamic`, as
    regular expressions (GPTQModel's convention, which vLLM reads), with the names of fused layers.
    """
    values = list(grids.values())
    default = max(values, key=lambda scheme: (values.count(scheme), repr(scheme)))
    dynamic: dict[str, dict[str, Any]] = {
        f"-:{_pattern(names)}": {} for names in _by_layer(dense) if names != ("lm_head",)
    }
    for names in _by_layer([name for name, scheme in grids.items() if scheme != default]):
        dynamic[f"+:{_pattern(names)}"] = _grid(grids[names[0]])
    asymmetric = any(scheme.symmetry == "asymmetric" for scheme in values)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if asymmetric else "gptq",
        **_grid(default),
        "desc_act": False,
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.01,
        "lm_head": "lm_head" in grids,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"compressor:{compressor.__version__}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _grid(scheme: WeightScheme) -> dict[str, Any]:
    group = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": group, "sym": scheme.symmetry != "asymmetric"}


def _by_layer(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Names of layers, each followed by the fused one when it is the last of a complete set."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((f"{parent}.{f}" for f, parts in _FUSED if _completes(name, parts, names)), "")
        yield (name, fused) if fused and leaf else (name,)


def _completes(name: str, parts: tuple[str, ...], names: list[str]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf == parts[-1] and all(f"{parent}.{part}" in names for part in parts)


def _pattern(names: tuple[str, ...]) -> str:
    escaped = [re.escape(name) for name in names]
    return rf"^{escaped[0]}$" if len(escaped) == 1 else rf"^({'|'.join(escaped)})$"
