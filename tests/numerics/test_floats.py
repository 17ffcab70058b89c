"""Float grids: the library that reads them back is the reference, or enumeration."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.numerics.floats import LARGEST, float_codes, round_to_float_
from compressor.numerics.gptq import factorize, gptq
from compressor.numerics.grid import Grid, Search, fit_grid, round_to_grid
from compressor.numerics.rtn import rtn
from compressor.types import QTensor, WeightScheme

FP8 = WeightScheme(8, None, number="float")
FP8_BLOCK = WeightScheme(8, 32, number="float", rows=16)
MXFP4 = WeightScheme(4, 32, number="float", scales="e8m0")
NVFP4 = WeightScheme(4, 16, number="float", scales="e4m3")
SCHEMES = {"fp8": FP8, "fp8-block": FP8_BLOCK, "mxfp4": MXFP4, "nvfp4": NVFP4}
PRESETS = {"fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}


def weights(seed: int, out: int = 32, in_features: int = 64) -> Tensor:
    """bf16 weights whose rows differ in size, as a model has them; [out, in] in fp32."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, in_features, generator=generator)
    matrix *= torch.randn(out, 1, generator=generator).exp() * 0.02
    return matrix.bfloat16().float()


def hessian(seed: int, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    inputs = torch.randn(300, width, generator=generator) @ mixed
    return inputs.T @ inputs / 150


def library_args(name: str) -> QuantizationArgs:
    args: QuantizationArgs = deepcopy(PRESET_SCHEMES[PRESETS[name]]["weights"])
    scheme = SCHEMES[name]
    if args.block_structure:
        args.block_structure = [scheme.rows, scheme.group_size]
    return args


def library(name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers [out, in], scales and divisor as compressed-tensors' min-max observer gives them."""
    args, scheme = library_args(name), SCHEMES[name]
    divisor = generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    grouped = weight.unflatten(-1, (scheme.groups(weight.shape[1]), -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if scheme.rows > 1:
        low = low.unflatten(0, (-1, scheme.rows)).amin(1)
        high = high.unflatten(0, (-1, scheme.rows)).amax(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=divisor)
    scale = scale.bfloat16() if scheme.scales == "dense" else scale
    numbers = quantize(weight, scale.float(), zero.float(), args, global_scale=divisor)
    return numbers, scale.float(), divisor


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", LARGEST)
def test_every_code_stands_for_a_number_and_back(bits: int) -> None:
    lowest, highest = WeightScheme(bits, None, number="float").code_range
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8)[None]
    scale = torch.ones(1, 1)
    numbers = QTensor(codes, scale, None, WeightScheme(bits, None, number="float")).numbers()
    assert torch.equal(float_codes(numbers, bits), codes)
    assert torch.equal(round_to_float_(numbers.clone(), bits), numbers)
    assert (numbers.diff() > 0).all()  # in order, none twice
    assert numbers.max() == LARGEST[bits] == -numbers.min()
    expected = {4: torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]), 8: None}[bits]
    if expected is None:  # all bit patterns but the NaN
        expected = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(numbers[0, -lowest:], expected)


@pytest.mark.parametrize("bits", LARGEST)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_rounds_to_the_nearest_number(bits: int, values: list[float]) -> None:
    scheme = WeightScheme(bits, None, number="float")
    codes = torch.arange(scheme.code_range[0], scheme.code_range[1] + 1, dtype=torch.int8)[None]
    grid = QTensor(codes, torch.ones(1, 1), None, scheme).numbers()[0].double()
    exact = torch.tensor(values, dtype=torch.float64)
    rounded = round_to_float_(exact.float(), bits).double()
    best = (exact[:, None] - grid).abs().amin(1)
    assert torch.equal((exact - rounded).abs(), best)


def test_ties_go_where_the_library_sends_them() -> None:
    points = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    both = torch.cat([points, -points])
    expected = FP4_E2M1_DATA.cast_to_fp4(both.clone().clamp(-6, 6))
    assert torch.equal(round_to_float_(both.clone(), 4), expected)
    # rounding half away from zero is something else
    assert not torch.equal(expected[:8], torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, 6]))


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("name", SCHEMES)
@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_min_max_is_the_librarys_bit_for_bit(name: str, seed: int) -> None:
    weight = weights(seed)
    numbers, scale, divisor = library(name, weight)
    ours = rtn(weight, SCHEMES[name], search="minmax")
    assert torch.equal(ours.scale.float(), scale)
    if divisor is not None:
        assert ours.divisor is not None
        assert torch.equal(ours.divisor, divisor)
    assert torch.equal(ours.numbers(), numbers + 0.0)  # the library keeps a sign on zero


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_packing_keeps_every_code(name: str) -> None:
    numbers = rtn(weights(1), SCHEMES[name]).numbers().bfloat16()
    packed = pack_fp4_to_uint8(numbers)
    assert torch.equal(unpack_fp4_from_uint8(packed, *numbers.shape), numbers)


@pytest.mark.parametrize("search", ["mse", "imatrix"])
@pytest.mark.parametrize("name", SCHEMES)
def test_searching_never_loses_to_min_max(name: str, search: Search) -> None:
    scheme = SCHEMES[name]
    gains = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight, importance = weights(seed), torch.rand(64, generator=generator) + 0.01
        plain, found = (
            rtn(weight, scheme, search=how, importance=importance) for how in ("minmax", search)
        )
        emphasis = importance if search == "imatrix" else torch.ones(64)
        errors = [
            ((q.dequantize().float() - weight).square() * emphasis).sum() for q in (plain, found)
        ]
        assert errors[1] <= errors[0]
        gains.append(float(errors[1] / errors[0]))
    # Floats are as fine at one scale as at another, but for their ends and for how coarse e2m1 is.
    assert max(gains) < {"nvfp4": 0.95, "mxfp4": 0.995}.get(name, 1.0)


def test_scales_are_what_the_format_holds() -> None:
    weight = weights(3)
    for search in ("minmax", "mse"):
        powers = fit_grid(weight, MXFP4, search=search).scale.float().log2()  # type: ignore[arg-type]
        assert torch.equal(powers, powers.round())
        grid = fit_grid(weight, NVFP4, search=search)  # type: ignore[arg-type]
        stored = grid.scale.float()
        assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)
        assert stored.max() <= 448
        blocks = fit_grid(weight, FP8_BLOCK, search=search)  # type: ignore[arg-type]
        assert blocks.scale.shape == (2, 2)


def test_stacked_matrices_share_a_divisor_and_come_apart() -> None:
    parts = [weights(5, 16), 8 * weights(6, 32)]
    for scheme in SCHEMES.values():
        together = rtn(torch.cat(parts), scheme)
        first, second = together.rows(0, 16), together.rows(16, 48)
        assert torch.equal(
            torch.cat([first.dequantize(), second.dequantize()]), together.dequantize()
        )
    assert first.divisor is not None
    assert second.divisor is not None
    assert torch.equal(first.divisor, second.divisor)
    assert not torch.equal(rtn(parts[0], NVFP4).divisor, first.divisor)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_and_extremes(name: str) -> None:
    weight = weights(7)
    weight[:16] = 0
    weight[20, :32] = 1e-30
    weight[21] *= 1e6
    for search in ("minmax", "mse"):
        dense = rtn(weight, SCHEMES[name], search=search).dequantize()  # type: ignore[arg-type]
        assert dense.isfinite().all()
        assert not dense[:16].any()
    assert not rtn(torch.zeros(16, 64), SCHEMES[name]).dequantize().any()


def test_a_grid_that_no_format_has_is_refused() -> None:
    for scheme in (
        WeightScheme(6, 32, number="float"),
        WeightScheme(8, None, "asymmetric", number="float"),
        WeightScheme(8, 32, number="float", rows=24),
    ):
        with pytest.raises(ValueError, match=r"float|divide"):
            fit_grid(weights(1), scheme)


# ---------------------------------------------------------------------- solvers


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_gptq_never_loses_to_rounding(name: str, sweeps: int) -> None:
    scheme = SCHEMES[name]
    gains = []
    for seed in range(3):
        weight, moments = weights(seed), hessian(seed)
        grid = fit_grid(weight, scheme)
        factor = factorize(moments, damping=0.01)
        outcome = gptq(weight, factor, scheme, grid, sweeps=sweeps)
        nearest = round_to_grid(weight, grid, scheme)
        assert torch.equal(outcome.quantized.scale, nearest.scale)
        losses = [loss(weight, q, moments) for q in (outcome.quantized, nearest)]
        assert (losses[0] <= losses[1] * (1 + 1e-4)).all()
        gains.append(float(losses[0].sum() / losses[1].sum()))
    assert max(gains) < 0.8


def loss(weight: Tensor, quantized: QTensor, moments: Tensor) -> Tensor:
    difference = (weight - quantized.dequantize().float()).double()
    return ((difference @ moments.double()) * difference).sum(1)


def test_a_coarser_rounding_in_the_solver_would_show() -> None:
    """Codes off by one number, as a solver that mistakes the grid would leave them."""
    weight, moments = weights(1), hessian(1)
    grid = fit_grid(weight, MXFP4)
    outcome = gptq(weight, factorize(moments), MXFP4, grid)
    shifted = (outcome.quantized.codes + 1).clamp_max(7)
    wrong = Grid.of(outcome.quantized).tensor(shifted, MXFP4)
    assert (loss(weight, wrong, moments) > outcome.row_loss.double()).all()
