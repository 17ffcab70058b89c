"""Inputs of a matrix as an engine rounds them while the model runs, computed without its kernels.

The arithmetic is that of compressed-tensors, in the dtype of the inputs and bit for bit, so that
a checkpoint read back by transformers gives the logits that were measured. Kernels of vLLM take
max|x| / 127 for the scale of int8 where compressed-tensors has max|x| / 127.5, and round in fp32:
the same grid but for 0.4 % of its step.

Those of LLM.int8 (arXiv:2208.07339) are what bitsandbytes makes of them, but for what it does in
integers afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.numerics.floats import LARGEST, round_to_float_
from compressor.types import ActivationScheme


def round_inputs(inputs: Tensor, scheme: ActivationScheme) -> Tensor:
    """The inputs [..., in] on the grid of their token or group, in their own dtype and shape.

    A scale is the largest magnitude over half the width of the grid, and the dtype's epsilon
    where all of it is zero.
    """
    if scheme.number == "absmax":
        return _llm_int8(inputs, scheme.threshold)
    size = inputs.shape[-1] if scheme.group_size is None else scheme.group_size
    grouped = inputs.reshape(*inputs.shape[:-1], -1, size)
    lowest, highest = _range(scheme)
    scale = grouped.abs().amax(-1, keepdim=True) / ((highest - lowest) / 2)
    scale = torch.where(scale == 0, torch.finfo(inputs.dtype).eps, scale)
    steps = (grouped / scale).clamp_(lowest, highest)
    numbers = steps.round_() if scheme.number == "int" else round_to_float_(steps, scheme.bits)
    return numbers.mul_(scale).flatten(-2)


def _llm_int8(inputs: Tensor, threshold: float) -> Tensor:
    """Every token to the integers up to 127, the columns of outliers as they are.

    A column is kept whole where one token has an outlier in it; the scale of a token is the largest
    of its other magnitudes. All in fp16, as the library has it.
    """
    tokens = inputs.reshape(-1, inputs.shape[-1])
    half = tokens.half()
    outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    within = half.masked_fill(outlier, 0)
    peak = within.abs().amax(-1, keepdim=True).float()
    codes = torch.where(peak > 0, within * (127.0 / peak), 0.0).round_()
    rounded = (codes * (peak / 127)).to(inputs.dtype)
    return torch.where(outlier.any(0), tokens, rounded).view_as(inputs)


def _range(scheme: ActivationScheme) -> tuple[float, float]:
    """Smallest and largest number on the grid before it is scaled."""
    if scheme.number == "float":
        return -LARGEST[scheme.bits], LARGEST[scheme.bits]
    return -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1
