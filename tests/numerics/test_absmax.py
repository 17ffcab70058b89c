"""Codes of bitsandbytes: those of the library itself, and what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.absmax import round_to_absmax
from compressor.numerics.rtn import rtn
from compressor.types import NF4, QTensor, WeightScheme

library = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = WeightScheme(4, 64, number="nf4")
ROWS = WeightScheme(8, None, number="absmax")

MATRICES = given(
    seed=st.integers(0, 999),
    out=st.integers(1, 5),
    blocks=st.integers(1, 5),
    magnitude=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
)


def weights(seed: int, out: int, width: int, magnitude: float, dtype: torch.dtype) -> Tensor:
    """Gaussian, with a row of zeros, a block of zeros and an outlier."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=random) * magnitude
    weight[0], weight[-1, :64] = 0, 0
    weight[-1, -1] *= 40
    return weight.to(dtype)


def rounded(weight: Tensor, scheme: WeightScheme) -> QTensor:
    return round_to_absmax(weight.float(), scheme, weight.dtype)


def test_the_table_is_the_papers() -> None:
    """QLoRA, appendix E: quantiles of a Gaussian, 8 and 9 of them on the sides, over the last."""
    offset = 0.9677083
    above = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].numpy())
    below = -norm.ppf(torch.linspace(offset, 0.5, 8)[:-1].numpy())
    table = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    assert torch.allclose(table, torch.tensor(NF4).double(), atol=2e-7)
    assert torch.equal(torch.tensor(NF4), library.get_4bit_type("nf4", device="cpu"))


@MATRICES
@settings(max_examples=60, deadline=None)
def test_nf4_is_what_the_library_rounds_and_reads(
    seed: int, out: int, blocks: int, magnitude: float, dtype: torch.dtype
) -> None:
    weight = weights(seed, out, 64 * blocks, magnitude, dtype)
    ours = rounded(weight, BLOCKS)
    packed, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.cat([packed >> 4, packed & 15], 1).view(weight.shape)
    assert torch.equal(ours.codes.int(), nibbles.int() - 8)
    assert torch.equal(ours.scale.float().flatten(), state.absmax)
    assert torch.equal(ours.dequantize(), library.dequantize_4bit(packed, state))


@MATRICES
@settings(max_examples=60, deadline=None)
def test_int8_is_what_the_library_rounds_and_reads(
    seed: int, out: int, blocks: int, magnitude: float, dtype: torch.dtype
) -> None:
    """The library leaves the codes of a row of zeros to chance; here they are 0."""
    weight = weights(seed, out, 64 * blocks, magnitude, dtype)
    ours = rounded(weight, ROWS)
    codes, largest, _ = library.int8_vectorwise_quant(weight.half())
    some = weight.half().any(1)
    assert torch.equal(ours.codes[some], codes[some])
    assert not ours.codes[~some].any()
    assert torch.equal(ours.scale.float().flatten(), largest)
    dense = library.int8_vectorwise_dequant(ours.codes, largest).to(dtype)
    assert torch.equal(ours.dequantize(), dense)


@pytest.mark.parametrize("scheme", [BLOCKS, ROWS], ids=["nf4", "llm-int8"])
def test_every_point_of_the_grid_rounds_to_itself(scheme: WeightScheme) -> None:
    lowest, highest = scheme.code_range
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8).repeat(64)[: 4 * 64].view(4, 64)
    codes[:, 0] = highest
    scale = torch.tensor([0.5, 1.0, 0.011, 300.0]).bfloat16().unsqueeze(1)
    weight = QTensor(codes, scale.float(), None, scheme).dequantize()
    again = round_to_absmax(weight, scheme, torch.float32)
    assert torch.equal(again.codes, codes)
    assert torch.allclose(again.scale, scale.float(), rtol=1e-3)


def test_the_error_of_integers_is_that_of_uniform_steps() -> None:
    """A step squared over 12, on average; a step is a row's largest magnitude over 127."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    ours = rtn(weight, ROWS, scale_dtype=torch.float32)
    expected = (ours.scale / 127).square().mean() / 12
    assert (ours.dequantize() - weight).square().mean() == pytest.approx(float(expected), rel=0.01)


def test_quantiles_suit_gaussian_weights_better_than_even_steps() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    even = WeightScheme(4, 64)
    errors = [
        (rtn(weight, scheme, scale_dtype=torch.float32).dequantize() - weight).square().mean()
        for scheme in (BLOCKS, even)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", [BLOCKS, ROWS], ids=["nf4", "llm-int8"])
def test_what_is_not_finite_is_refused(scheme: WeightScheme, bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(NumericalError):
        round_to_absmax(weight, scheme, torch.float32)


def test_int8_refuses_what_fp16_does_not_hold() -> None:
    with pytest.raises(NumericalError, match="fp16"):
        round_to_absmax(torch.full((2, 64), 1e6), ROWS, torch.bfloat16)
