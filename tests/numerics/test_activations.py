"""Rounded inputs: the library that engines' checkpoints are made with is the reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.numerics.activations import round_inputs
from compressor.types import ACTIVATIONS, ActivationScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library(inputs: Tensor, scheme: ActivationScheme) -> Tensor:
    args = QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.number,
        symmetric=True,
        strategy="group" if scheme.group_size else "token",
        group_size=scheme.group_size,
        dynamic=True,
    )
    module = torch.nn.Linear(1, 1)
    module.quantization_status = QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    result: Tensor = forward_quantize(module, inputs, "input", args)
    return result


def tokens(seed: int, width: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Hidden states [2, 7, width] of tokens that differ widely in size, with an outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 7, width, generator=generator)
    inputs *= (spread * torch.randn(2, 7, 1, generator=generator)).exp()
    inputs[..., 0] *= 20
    return inputs.clamp(-2e4, 2e4).to(dtype)  # fp16 ends at 6.5e4


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(st.integers(0, 10_000), st.integers(1, 65), st.sampled_from(DTYPES), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_equals_the_library_bit_for_bit(
    name: str, seed: int, width: int, dtype: torch.dtype, spread: float
) -> None:
    inputs = tokens(seed, width * (ACTIVATIONS[name].group_size or 1), dtype, spread)
    rounded = round_inputs(inputs, ACTIVATIONS[name])
    assert rounded.dtype == dtype
    assert torch.equal(rounded, library(inputs, ACTIVATIONS[name]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    inputs = tokens(1, 256, torch.float32)
    together = round_inputs(inputs, ACTIVATIONS[name])
    alone = round_inputs(inputs[1, 3], ACTIVATIONS[name])
    assert torch.equal(together[1, 3], alone)
    # one scale for all tokens, as a static scheme has, gives something else; groups keep theirs
    flat = round_inputs(inputs.reshape(1, -1), ACTIVATIONS[name]).view_as(inputs)
    assert torch.equal(together, flat) == (ACTIVATIONS[name].group_size is not None)


def test_int8_errs_by_half_a_step_at_most() -> None:
    inputs = tokens(2, 64, torch.float32)
    error = (round_inputs(inputs, ACTIVATIONS["int8"]) - inputs).abs()
    step = inputs.abs().amax(-1, keepdim=True) / 127.5
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert error.amax() > 0.4 * step[error.amax(-1, keepdim=True) == error.amax()].min()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tokens_stay_zero_and_inputs_stay_whole(name: str, dtype: torch.dtype) -> None:
    inputs = tokens(3, 128, dtype)
    inputs[0, 0] = 0
    before = inputs.clone()
    rounded = round_inputs(inputs, ACTIVATIONS[name])
    assert torch.equal(inputs, before)
    assert not rounded[0, 0].any()
    assert rounded.isfinite().all()


def test_kernels_that_divide_by_127_differ_by_their_step() -> None:
    """What vLLM's kernels do, so that the difference to what is measured stays known."""
    inputs = tokens(4, 256, torch.float32)
    scale = inputs.abs().amax(-1, keepdim=True) / 127
    kernel = (inputs / scale).round() * scale
    ours = round_inputs(inputs, ACTIVATIONS["int8"])
    errors = [float((rounded - inputs).square().mean().sqrt()) for rounded in (kernel, ours)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
