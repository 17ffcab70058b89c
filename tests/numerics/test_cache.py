"""The cache's rounding: e4m3 by a scale, against the library that reads our files and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from compressor.errors import NumericalError
from compressor.numerics.cache import cache_scale, round_to_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def e4m3() -> list[float]:
    """Every number of the format, from its definition (OCP, 2023): no infinity, two NaNs."""
    found = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue
            number = (
                mantissa / 8 * 2.0**-6
                if exponent == 0
                else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            )
            found |= {number, -number}
    return sorted(found)


def test_every_state_becomes_the_nearest_number_of_the_cache() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4000, generator=generator) * torch.logspace(-4, 1, 4000)
    scale = 0.0078125 * 3
    grid = torch.tensor(e4m3()) * scale
    found = round_to_cache(states.clone(), scale)
    distance = (states[:, None] - grid).abs().amin(1)
    assert set(found.tolist()) <= set(grid.tolist())
    torch.testing.assert_close((found - states).abs(), distance, rtol=1e-5, atol=1e-7)
    assert len(set(found.tolist())) > 150


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_arithmetic_of_the_library_that_reads_our_files(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    states = (torch.randn(2, 3, 40, 16, generator=generator) * 9).to(dtype)
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
    for largest in (0.3, 7.0, 50.0):
        scale = cache_scale(largest, dtype)
        theirs = fake_quantize(states, torch.tensor([scale], dtype=dtype), None, arguments)
        assert torch.equal(round_to_cache(states, scale), theirs)


def test_what_lies_beyond_is_cut_off_and_the_input_is_left_alone() -> None:
    states = torch.tensor([1000.0, -1000.0, 448.0, 0.0, 2.0**-10, 2.0**-11])
    before = states.clone()
    found = round_to_cache(states, 1.0)
    assert found.tolist() == [448.0, -448.0, 448.0, 0.0, 0.0, 0.0]  # ties to even at 2^-10
    assert torch.equal(states, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_reaches_the_largest_and_is_a_number_of_the_dtype(dtype: torch.dtype) -> None:
    for largest in (0.1, 3.7, 448.0, 1e3):
        for headroom in (1.0, 2.0):
            scale = cache_scale(largest, dtype, headroom)
            assert scale == float(torch.tensor(scale, dtype=dtype))
            rounding = torch.finfo(dtype).eps
            assert math.isclose(448 * scale, headroom * largest, rel_tol=rounding)


def test_a_scale_is_never_zero_nor_infinite() -> None:
    assert cache_scale(0.0, torch.bfloat16) == 1.0
    assert cache_scale(1e-9, torch.float16) == torch.finfo(torch.float16).tiny
    assert cache_scale(1e38, torch.float16) == torch.finfo(torch.float16).max
    for wrong in (math.nan, math.inf):
        with pytest.raises(NumericalError, match="no scale holds them"):
            cache_scale(wrong, torch.float32)
