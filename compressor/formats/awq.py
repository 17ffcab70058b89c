"""AWQ's `gemm` layout: 4-bit codes packed along the output, for vLLM, SGLang and GPTQModel.

Of a matrix [out, in] with codes c and zero-points z (signed here, unsigned there):

    qweight  int32 [in, out/8]      c + 8; of eight neighbouring outputs, nibble i of the word
    qzeros   int32 [groups, out/8]  z + 8; holds number 0, 2, 4, 6, 1, 3, 5, 7
    scales   fp16  [groups, out]

One grid serves all matrices; a symmetric one is written with zero-points of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.formats.exporters import Source
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

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_HALF = 8


def write(source: Source, out: Path) -> None:
    """Write an AWQ checkpoint.

    Raises:
        ModelError: codes that fit no matrix, or that AWQ cannot hold.
        VerificationError: dense weights and codes disagree, or packing lost a code.
        ResourceError: the file system refused.
    """
    (grid,) = set(schemes(source).values())
    write_words(source, out, pack, unpack, quantization_config(grid, dense_modules(source)))


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor of an AWQ checkpoint, from its files alone."""
    return read_words(folder, lambda _, tensors: unpack(tensors))


def pack(quantized: QTensor) -> dict[str, Tensor]:
    """The three tensors of a matrix with a multiple of 8 outputs, by their names."""
    out, groups = quantized.scale.shape
    zero = quantized.zero_point
    signed = torch.zeros(out, groups, dtype=torch.int64) if zero is None else zero.long()
    return {
        "qweight": _interleave(quantized.codes.T.long() + _HALF),
        "qzeros": _interleave(signed.T + _HALF),
        "scales": half_scales(quantized.scale).T.contiguous(),
    }


def _interleave(values: Tensor) -> Tensor:
    """Words [rows, out/8] of unsigned values [rows, out]."""
    eights = values.reshape(values.shape[0], -1, len(_ORDER))[..., _ORDER]
    return to_words(eights.reshape(values.shape), _BITS)


def _separate(words: Tensor) -> Tensor:
    """Inverse of `_interleave`."""
    eights = from_words(words, _BITS).reshape(words.shape[0], -1, len(_ORDER))
    places = torch.tensor(_ORDER).argsort()
    return eights[..., places].reshape(words.shape[0], -1)


def unpack(tensors: Tensors) -> QTensor:
    """Inverse of `pack`; zero-points are always given."""
    codes = (_separate(tensors["qweight"]) - _HALF).T.contiguous().to(torch.int8)
    zero = (_separate(tensors["qzeros"]) - _HALF).T.contiguous().to(torch.int8)
    group_size = codes.shape[1] // tensors["scales"].shape[0]
    scheme = WeightScheme(_BITS, group_size, "asymmetric")
    return QTensor(codes, tensors["scales"].T.contiguous(), zero, scheme)


def quantization_config(grid: WeightScheme, dense: list[str]) -> dict[str, Any]:
    """What `config.json` says; names of dense layers are matched as parts of names."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": _BITS,
        "group_size": -1 if grid.group_size is None else grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": dense,
    }
