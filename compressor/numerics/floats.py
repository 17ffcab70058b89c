"""Rounding to the small floating-point numbers of accelerators: e2m1 (fp4) and e4m3 (fp8).

OCP Microscaling Formats (MX) Specification 1.0, 2023, and OCP 8-bit Floating Point Specification
1.0, 2023. Ties go to the number with the even mantissa; what is beyond the largest number becomes
it, as in compressed-tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {4: 6.0, 8: 448.0}
"""Largest number, by width."""

_HALVES = torch.tensor([1, 2, 3, 4, 6, 8, 12], dtype=torch.int8)  # of e2m1's magnitudes above 0


def round_to_float_(numbers: Tensor, bits: int) -> Tensor:
    """Each number becomes the nearest of its width, in place.

    Args:
        numbers: of any floating-point dtype.
        bits: 4 for e2m1, 8 for e4m3.
    """
    numbers.clamp_(-LARGEST[bits], LARGEST[bits])
    if bits == 8:
        return numbers.copy_(numbers.to(torch.float8_e4m3fn))
    magnitude = numbers.abs()
    # e2m1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of 0.5, from 2 on of 1, from 4 on of 2.
    step = (magnitude >= 2).to(numbers.dtype).add_(magnitude >= 4).exp2_().mul_(0.5)
    return numbers.div_(step).round_().mul_(step)


def float_codes(numbers: Tensor, bits: int) -> Tensor:
    """int8 codes of numbers that are on the grid: the bits of the magnitude under its sign.

    Zero has no sign: its code is 0.
    """
    if bits == 8:
        patterns = numbers.to(torch.float8_e4m3fn).view(torch.int8)
        magnitude = patterns & 0x7F
        return torch.where(patterns < 0, -magnitude, magnitude)
    halves = (numbers * 2).to(torch.int8)
    index = torch.bucketize(halves.abs(), _HALVES.to(halves.device), right=True)
    return index.to(torch.int8) * halves.sign()
