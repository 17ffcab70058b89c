"""Blocks of GGUF from stored codes, and back: bits are moved, nothing is rounded but scales.

A block holds 32 neighbouring inputs of one output (ggml's `ggml-common.h`):

    Q4_0  d fp16 | 16 bytes, element j in the low half of byte j, element j+16 in the high half;
          w = d · (q - 8)
    Q4_1  d fp16 | m fp16 | 16 bytes as before; w = d · q + m
    Q5_0  d fp16 | fifth bits of all 32, element j in bit j | 16 bytes; w = d · (q - 16)
    Q5_1  d fp16 | m fp16 | fifth bits | 16 bytes; w = d · q + m
    Q8_0  d fp16 | 32 int8; w = d · q

A minimum m = -d·z is the product of two numbers and is itself rounded to fp16: by 2^-11 of itself,
which is at most 0.8 % of a step of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import VerificationError
from compressor.formats.exchange import GGUF_BLOCK, GGUF_BLOCK_BYTES
from compressor.formats.gguf_types import GgufType
from compressor.formats.words import half_scales
from compressor.types import QTensor, WeightScheme

_OFFSET = {"Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "Q8_0": 0}
_MINIMUM = ("Q4_1", "Q5_1")
_FIFTH = ("Q5_0", "Q5_1")
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
_HALF = GGUF_BLOCK // 2
_FP16_STEP = 2.0**-11  # largest relative error of rounding to fp16


def pack_blocks(quantized: QTensor, kind: GgufType) -> Tensor:
    """Blocks of a matrix as bytes.

    Args:
        quantized: codes [out, in] that `kind` can hold; its groups are multiples of 32 inputs and
            are repeated block by block.
        kind: see `exchange.gguf_type`.

    Returns:
        uint8 [out, in / 32 · bytes of a block].
    """
    out, blocks = quantized.codes.shape[0], quantized.codes.shape[1] // GGUF_BLOCK
    repeat = blocks // quantized.scale.shape[1]
    scale = half_scales(quantized.scale).repeat_interleave(repeat, 1)
    unsigned = quantized.codes.view(out, blocks, GGUF_BLOCK).to(torch.int16) + _OFFSET[kind]
    parts = [_bytes(scale)]
    if kind in _MINIMUM:
        assert quantized.zero_point is not None
        zero = quantized.zero_point.repeat_interleave(repeat, 1).float() + _OFFSET[kind]
        minimum = -scale.float() * zero + 0.0  # no negative zero, which ggml does not write either
        parts.append(_bytes(minimum.to(torch.float16)))
    if kind in _FIFTH:
        parts.append(_fifth_bits(unsigned))
    parts.append(_code_bytes(unsigned, kind))
    return torch.cat(parts, -1).view(out, -1)


def _bytes(half: Tensor) -> Tensor:
    return half.contiguous().view(torch.uint8).view(*half.shape, 2)


def _fifth_bits(unsigned: Tensor) -> Tensor:
    bits = (unsigned >> 4).view(*unsigned.shape[:-1], 4, 8)
    return (bits << torch.arange(8, dtype=torch.int16)).sum(-1).to(torch.uint8)


def _code_bytes(unsigned: Tensor, kind: GgufType) -> Tensor:
    if kind == "Q8_0":
        return unsigned.to(torch.int8).view(torch.uint8)
    low, high = unsigned[..., :_HALF] & 15, unsigned[..., _HALF:] & 15
    return (low | high << 4).to(torch.uint8)


def unpack_blocks(data: Tensor, kind: GgufType, dtype: torch.dtype) -> QTensor:
    """Codes, scales and zero-points of stored blocks; inverse of `pack_blocks`.

    Args:
        data: uint8 [out, blocks · bytes of a block].
        kind: of the blocks.
        dtype: that the scales had.

    Raises:
        VerificationError: a minimum is not the multiple of its scale that `pack_blocks` writes.
    """
    out = data.shape[0]
    blocks = data.view(out, -1, GGUF_BLOCK_BYTES[kind])
    scale, rest = _half(blocks[..., :2]), blocks[..., 2:]
    zero = None
    if kind in _MINIMUM:
        zero, rest = _zero_points(scale, _half(rest[..., :2]), kind), rest[..., 2:]
    unsigned = _codes(rest, kind)
    codes = (unsigned - _OFFSET[kind]).to(torch.int8).view(out, -1)
    symmetry = "symmetric" if zero is None else "asymmetric"
    scheme = WeightScheme(_BITS[kind], GGUF_BLOCK, symmetry)  # type: ignore[arg-type]
    return QTensor(codes, scale.to(dtype), zero, scheme)


def _half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)[..., 0]


def _codes(rest: Tensor, kind: GgufType) -> Tensor:
    if kind == "Q8_0":
        return rest.contiguous().view(torch.int8).to(torch.int16)
    packed = rest[..., -_HALF:].to(torch.int16)
    unsigned = torch.cat([packed & 15, packed >> 4], -1)
    if kind in _FIFTH:
        fifth = rest[..., :4].to(torch.int16).unsqueeze(-1) >> torch.arange(8, dtype=torch.int16)
        unsigned = unsigned | (fifth & 1).flatten(-2) << 4
    return unsigned


def _zero_points(scale: Tensor, minimum: Tensor, kind: GgufType) -> Tensor:
    """int8 [out, blocks]: the whole number that the minimum is of scales."""
    wide, offset = scale.float(), _OFFSET[kind]
    unsigned = torch.where(wide == 0, float(offset), -minimum.float() / wide).round()
    error = (minimum.float() + unsigned * wide).abs() - _FP16_STEP * minimum.float().abs()
    if (error > 2.0**-25).any():  # half of the smallest fp16 step
        raise VerificationError(f"a minimum in {kind} blocks is no multiple of its scale")
    return (unsigned - offset).to(torch.int8)
