"""Keys and values as they lie in an fp8 cache (e4m3), computed without an engine's kernels.

The arithmetic is that of compressed-tensors, in the dtype of keys and values and bit for bit, so
that a checkpoint read back by transformers gives the logits that were measured. vLLM divides by
the same scale. Its kernels may also round queries (FlashAttention 3), which this does not show.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.floats import LARGEST, round_to_float_


def round_to_cache(states: Tensor, scale: float) -> Tensor:
    """Keys or values [...] as they come back out of the cache, in their own dtype.

    Args:
        states: after the rotary embedding.
        scale: what they are divided by; beyond 448 times it they are cut off.
    """
    step = torch.tensor([scale], dtype=states.dtype, device=states.device)
    return round_to_float_(states / step, 8).mul_(step)


def cache_scale(largest: float, dtype: torch.dtype, headroom: float = 1.0) -> float:
    """The scale, a number of `dtype`, with which e4m3 reaches `headroom` times the largest.

    Nothing but zeros gets 1, with which zeros stay what they are.

    Args:
        largest: magnitude that calibration text has reached.
        dtype: in which the scale is stored.
        headroom: at least 1; room for text that reaches further.

    Raises:
        NumericalError: `largest` is no number.
    """
    if not math.isfinite(largest):
        raise NumericalError(f"keys or values reach {largest}, so that no scale holds them")
    if largest == 0:
        return 1.0
    wanted = torch.tensor(headroom * largest / LARGEST[8], dtype=torch.float64)
    limits = torch.finfo(dtype)
    return float(wanted.clamp(limits.tiny, limits.max).to(dtype))
