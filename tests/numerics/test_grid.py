from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import grid as grid_module
from compressor.numerics.grid import fit_grid, round_to_grid
from compressor.numerics.rtn import rtn
from compressor.types import WeightScheme

SYMMETRIES = ("symmetric", "full_range", "asymmetric")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gaussian(out: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def squared_errors(weight: Tensor, scheme: WeightScheme, **options: object) -> Tensor:
    """(ŵ-w)² in fp64, [out, groups, size], from the dense weight as it would be stored."""
    dense = rtn(weight, scheme, **options).dequantize()  # type: ignore[arg-type]
    error = (dense.double() - weight.double()).square()
    return error.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


@pytest.mark.parametrize(
    ("bits", "symmetry", "published"),
    [
        (3, "symmetric", 0.038),
        (3, "full_range", 0.035),
        (3, "asymmetric", 0.035),
        (2, "symmetric", 0.147),
        (2, "full_range", 0.136),
        (2, "asymmetric", 0.136),
    ],
)
def test_relative_error_on_gaussian_weights_is_the_known_one(
    bits: int, symmetry: str, published: float
) -> None:
    """Within 0.002 of a plain shrink search; lower where signs and zeros are tried too."""
    weight = gaussian(256, 1024)
    scheme = WeightScheme(bits, 128, symmetry)  # type: ignore[arg-type]
    error = squared_errors(weight, scheme, search="mse").mean() / weight.square().mean()
    assert published - 0.005 < error < published + 0.002


@pytest.mark.parametrize("symmetry", ["full_range", "asymmetric"])
def test_trying_signs_and_zeros_lowers_the_error(symmetry: str) -> None:
    """0.1319 on Gaussian weights at 2 bits; 0.1358 with the scale alone searched."""
    weight, scheme = gaussian(256, 1024), WeightScheme(2, 128, symmetry)  # type: ignore[arg-type]
    error = squared_errors(weight, scheme, search="mse").mean() / weight.square().mean()
    assert error == pytest.approx(0.1319, abs=0.001)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_minmax_is_the_grid_of_compressed_tensors(bits: int, symmetry: str) -> None:
    weight = gaussian(16, 64, seed=bits) + 0.3
    grouped = weight.view(16, 4, 16)
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetry == "symmetric", group_size=16)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    scheme = WeightScheme(bits, 16, symmetry)  # type: ignore[arg-type]
    grid = fit_grid(weight, scheme, search="minmax", scale_dtype=torch.float32)
    torch.testing.assert_close(grid.scale, scale, rtol=1e-6, atol=0)
    if grid.zero_point is not None:
        assert torch.equal(grid.zero_point, zero.to(torch.int8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_minmax_errs_by_half_a_step_at_most(bits: int, symmetry: str) -> None:
    weight = gaussian(32, 96)
    scheme = WeightScheme(bits, 32, symmetry)  # type: ignore[arg-type]
    quantized = rtn(weight, scheme, search="minmax", scale_dtype=torch.float32)
    steps = (quantized.dequantize() - weight).abs().view(32, 3, 32) / quantized.scale.unsqueeze(-1)
    # An asymmetric range whose zero-point was rounded may miss one end by half a step more.
    assert steps.max() <= (0.5001 if symmetry == "symmetric" else 1.0001)


@pytest.mark.parametrize("bits", range(2, 9))
def test_full_range_puts_the_largest_weight_on_the_lowest_code(bits: int) -> None:
    weight = gaussian(64, 64)
    scheme = WeightScheme(bits, 32, "full_range")
    quantized = rtn(weight, scheme, search="minmax", scale_dtype=torch.float32)
    at_peak = weight.view(64, 2, 32).abs().argmax(-1, keepdim=True)
    assert (quantized.codes.view(64, 2, 32).gather(-1, at_peak) == -(1 << (bits - 1))).all()
    assert (quantized.scale < 0).any()
    assert (quantized.scale > 0).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    symmetry=st.sampled_from(SYMMETRIES),
    group_size=st.sampled_from([None, 8, 32]),
    dtype=st.sampled_from(DTYPES),
    power=st.sampled_from([1.0, 3.0]),
    offset=st.sampled_from([0.0, 2.0]),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_search_never_exceeds_minmax_in_any_group(
    bits: int,
    symmetry: str,
    group_size: int | None,
    dtype: torch.dtype,
    power: float,
    offset: float,
    magnitude: float,
    weighted: bool,
    seed: int,
) -> None:
    weight = gaussian(4, 64, seed)
    weight = (weight.sign() * weight.abs() ** power + offset) * magnitude
    importance = gaussian(1, 64, seed + 1)[0].square()
    scheme = WeightScheme(bits, group_size, symmetry)  # type: ignore[arg-type]
    weights = importance.view(scheme.groups(64), -1) if weighted else torch.tensor(1.0)
    simple = (squared_errors(weight, scheme, search="minmax", scale_dtype=dtype) * weights).sum(-1)
    searched = squared_errors(
        weight,
        scheme,
        search="imatrix" if weighted else "mse",
        importance=importance,
        scale_dtype=dtype,
    )
    assert ((searched * weights).sum(-1) <= simple * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_close_to_every_grid_tried(bits: int, symmetry: str) -> None:
    weight = gaussian(128, 32, seed=7)
    scheme = WeightScheme(bits, None, symmetry)  # type: ignore[arg-type]
    lowest, highest = scheme.code_range
    zeros = range(lowest, highest + 1) if symmetry == "asymmetric" else [0]
    signs = (1, -1) if symmetry == "full_range" else (1,)
    scales = torch.linspace(0.05, 2.5, 600).view(-1, 1, 1)
    best = torch.full((128,), torch.inf)
    for zero, sign in itertools.product(zeros, signs):
        steps = (weight / (sign * scales)).round().clamp(lowest - zero, highest - zero)
        best = torch.minimum(best, (steps * sign * scales - weight).square().sum(-1).amin(0))
    ours = squared_errors(weight, scheme, search="mse", scale_dtype=torch.float32).sum((1, 2))
    ratio = ours.sum() / best.sum()
    assert 0.999 < ratio < 1.03


def test_importance_lowers_the_error_it_weighs() -> None:
    weight = gaussian(64, 128)
    importance = torch.logspace(0, -4, 128)
    scheme = WeightScheme(3, 128, "symmetric")
    plain = (squared_errors(weight, scheme, search="mse")[:, 0] * importance).sum()
    weighted = squared_errors(weight, scheme, search="imatrix", importance=importance)[:, 0]
    assert (weighted * importance).sum() < 0.9 * plain


def test_importance_of_nothing_is_a_plain_search() -> None:
    weight, scheme = gaussian(4, 64), WeightScheme(4, 32, "full_range")
    importance = torch.cat([torch.zeros(32), torch.ones(32)])
    plain = fit_grid(weight, scheme, search="mse")
    weighted = fit_grid(weight, scheme, search="imatrix", importance=importance)
    assert torch.equal(plain.scale, weighted.scale)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_degenerate_groups_stay_finite(symmetry: str, dtype: torch.dtype, search: str) -> None:
    rows = [0.0, 1e-45, -1e-39, 1e-30, 3e-8, -1.0, 7e4, -1e30, 3e38]
    weight = torch.tensor(rows).unsqueeze(1).repeat(1, 16)
    weight[-1, 8:] *= -1
    scheme = WeightScheme(4, 8, symmetry)  # type: ignore[arg-type]
    quantized = rtn(weight, scheme, search=search, scale_dtype=dtype)  # type: ignore[arg-type]
    dense = quantized.dequantize()
    assert torch.isfinite(dense).all()
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale != 0).all()
    assert (dense[0] == 0).all()
    # -1 is on the grid up to the precision of the scale; 7 and 8 steps of 1/7.5 are not exact.
    torch.testing.assert_close(dense[5], weight[5].to(dtype), rtol=0.07, atol=0)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_zero_weights_are_exactly_zero(symmetry: str) -> None:
    weight = gaussian(8, 64) + 1.5
    weight[:, ::3] = 0
    scheme = WeightScheme(3, 32, symmetry)  # type: ignore[arg-type]
    assert (rtn(weight, scheme, search="mse").dequantize()[:, ::3] == 0).all()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_zero_points_keep_to_their_range(bits: int, symmetry: str) -> None:
    scheme = WeightScheme(bits, 16, symmetry)  # type: ignore[arg-type]
    weight = gaussian(16, 64).exp()
    quantized = rtn(weight, scheme, search="mse")
    lowest, highest = scheme.code_range
    assert quantized.codes.dtype == torch.int8
    assert lowest <= quantized.codes.min() <= quantized.codes.max() <= highest
    if quantized.zero_point is not None:
        assert quantized.zero_point.dtype == torch.int8
        assert lowest <= quantized.zero_point.min() <= quantized.zero_point.max() <= highest


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, -1.5, 2.5, -8.0, 1.0, 7.0]])
    scheme = WeightScheme(4, None, "full_range")
    quantized = round_to_grid(weight, fit_grid(weight, scheme, search="minmax"), scheme)
    assert quantized.scale.item() == 1
    assert quantized.codes.tolist() == [[0, 2, 0, -2, 2, -8, 1, 7]]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_rounding_again_changes_nothing(symmetry: str) -> None:
    scheme = WeightScheme(4, 16, symmetry)  # type: ignore[arg-type]
    weight = gaussian(16, 64)
    grid = fit_grid(weight, scheme, search="mse")
    once = round_to_grid(weight, grid, scheme)
    assert torch.equal(round_to_grid(once.dequantize(), grid, scheme).codes, once.codes)


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = WeightScheme(4, 16, "asymmetric"), gaussian(37, 64)
    whole = fit_grid(weight, scheme, search="mse")
    monkeypatch.setattr(grid_module, "_CHUNK_ELEMENTS", 5 * 64)
    parts = fit_grid(weight, scheme, search="mse")
    assert whole.zero_point is not None
    assert parts.zero_point is not None
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_scaling_the_weights_scales_the_grid(symmetry: str) -> None:
    scheme, weight = WeightScheme(4, 16, symmetry), gaussian(8, 64)  # type: ignore[arg-type]
    small, large = (rtn(c * weight, scheme, search="mse") for c in (1.0, 64.0))
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(small.scale * 64, large.scale)


def test_full_range_mirrors_with_the_sign_of_the_weights() -> None:
    scheme, weight = WeightScheme(3, 16, "full_range"), gaussian(8, 64)
    plain, mirrored = (rtn(c * weight, scheme, search="mse") for c in (1.0, -1.0))
    assert torch.equal(plain.codes, mirrored.codes)
    assert torch.equal(plain.scale, -mirrored.scale)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_refused(poison: float) -> None:
    scheme, weight, importance = WeightScheme(4, 16), gaussian(4, 32), torch.ones(32)
    grid = fit_grid(weight, scheme)
    importance[3] = abs(poison)
    with pytest.raises(NumericalError, match="importance"):
        fit_grid(weight, scheme, search="imatrix", importance=importance)
    weight[1, 2] = poison
    with pytest.raises(NumericalError, match="weight"):
        fit_grid(weight, scheme)
    with pytest.raises(NumericalError, match="weight"):
        round_to_grid(weight, grid, scheme)


@pytest.mark.parametrize(
    ("scheme", "importance", "match"),
    [
        (WeightScheme(1, 16), torch.ones(64), "2 to 8 bits"),
        (WeightScheme(9, 16), torch.ones(64), "2 to 8 bits"),
        (WeightScheme(4, 24), torch.ones(64), "does not divide"),
        (WeightScheme(4, 16), None, "needs the importance"),
        (WeightScheme(4, 16), torch.ones(63), "one non-negative"),
        (WeightScheme(4, 16), -torch.ones(64), "one non-negative"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    scheme: WeightScheme, importance: Tensor | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        fit_grid(gaussian(4, 64), scheme, search="imatrix", importance=importance)
