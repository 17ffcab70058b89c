"""Rounding as bitsandbytes does it: codes of a weight over the largest magnitude of its group.

NF4 (Dettmers et al., "QLoRA", arXiv:2305.14314): sixteen quantiles of a Gaussian, in blocks. The
weights of LLM.int8 (Dettmers et al., arXiv:2208.07339): integers up to 127, by output channel, of
the weight in fp16. Both give the library's own codes, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.types import NF4, QTensor, WeightScheme

_LEAST = 1e-38  # what the library divides by where all of a block is zero


def round_to_absmax(weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> QTensor:
    """The codes of a matrix, and the largest magnitude of each group as its scale.

    Args:
        weight: [out, in], finite, of values that `scale_dtype` holds exactly.
        scheme: of number `nf4` or `absmax`; its group size divides `in`.
        scale_dtype: of the dense weight: bfloat16, float16 or float32.

    Raises:
        NumericalError: NaN or infinity, also of what fp16 makes of the weights of LLM.int8.
    """
    out, in_features = weight.shape
    held = weight.to(torch.float16) if scheme.number == "absmax" else weight
    if not torch.isfinite(held).all():
        raise NumericalError("the weight matrix holds NaN or infinity, or is beyond fp16")
    grouped = held.float().reshape(out, scheme.groups(in_features), -1)
    largest = grouped.abs().amax(-1, keepdim=True)
    codes = (_nf4_codes if scheme.number == "nf4" else _integers)(grouped, largest)
    scale = largest.squeeze(-1).to(scale_dtype)
    return QTensor(codes.reshape(out, in_features), scale, None, scheme)


def _nf4_codes(grouped: Tensor, largest: Tensor) -> Tensor:
    """The nearest entry; half way between two, the lower one."""
    table = grouped.new_tensor(NF4)
    shares = (grouped * (1.0 / largest.clamp_min(_LEAST))).clamp_(-1, 1)
    return (torch.bucketize(shares, (table[:-1] + table[1:]) / 2) - 8).to(torch.int8)


def _integers(grouped: Tensor, largest: Tensor) -> Tensor:
    """The nearest integer; half way between two, the even one."""
    return torch.where(largest > 0, grouped * (127.0 / largest), 0.0).round().to(torch.int8)
