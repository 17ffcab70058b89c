"""Inputs of a matrix as an engine rounds them while the model runs, computed without its kernels.

The arithmetic is that of compressed-tensors, in the dtype of the inputs and bit for bit, so that
a checkpoint read back by transformers gives the logits that were measured. Kernels of vLLM take
max|x| / 127 for the scale of int8 where compressed-tensors has max|x| / 127.5, and round in fp32:
the same grid but for 0.4 % of its step.
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
    size = inputs.shape[-1] if scheme.group_size is None else scheme.group_size
    grouped = inputs.reshape(*inputs.shape[:-1], -1, size)
    lowest, highest = _range(scheme)
    scale = grouped.abs().amax(-1, keepdim=True) / ((highest - lowest) / 2)
    scale = torch.where(scale == 0, torch.finfo(inputs.dtype).eps, scale)
    steps = (grouped / scale).clamp_(lowest, highest)
    numbers = steps.round_() if scheme.number == "int" else round_to_float_(steps, scheme.bits)
    return numbers.mul_(scale).flatten(-2)


def _range(scheme: ActivationScheme) -> tuple[float, float]:
    """Smallest and largest number on the grid before it is scaled."""
    if scheme.number == "float":
        return -LARGEST[scheme.bits], LARGEST[scheme.bits]
    return -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1
