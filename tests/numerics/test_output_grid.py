"""Grids that are searched by the output error of a group, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import grid as grid_module
from compressor.numerics.grid import fit_grid
from compressor.numerics.grid_search import OutputObjective, Stored, factors
from compressor.numerics.rtn import rtn
from compressor.types import WeightScheme
from tests.numerics.test_gptq import correlated_inputs
from tests.numerics.test_grid import DTYPES, SYMMETRIES, gaussian


def hessian_of(width: int, seed: int = 0) -> Tensor:
    """Second moments of correlated inputs with a mean, a few of them large."""
    inputs = correlated_inputs(4 * width, width, seed) + 0.5
    inputs[:, 3] *= 10
    return 2 / len(inputs) * inputs.T @ inputs


def output_errors(
    weight: Tensor, scheme: WeightScheme, hessian: Tensor, search: str, dtype: torch.dtype
) -> Tensor:
    """d H d of every group in fp64 [out, groups], one after the other, of the stored weight."""
    options = {"search": search, "importance": hessian.diagonal(), "hessian": hessian}
    quantized = rtn(weight, scheme, scale_dtype=dtype, **options)  # type: ignore[arg-type]
    difference = quantized.dequantize().double() - weight.double()
    size = weight.shape[1] // scheme.groups(weight.shape[1])
    errors = [
        [
            d[start : start + size]
            @ hessian.double()[start : start + size, start : start + size]
            @ d[start : start + size]
            for start in range(0, len(d), size)
        ]
        for d in difference
    ]
    return torch.tensor(errors, dtype=torch.float64)


def test_objective_is_the_output_error_on_the_inputs_themselves() -> None:
    """‖X (ŵ - w)‖² of one group, no second moments involved."""
    inputs, weight = correlated_inputs(200, 24, 5), gaussian(6, 24)
    scheme = WeightScheme(3, None)
    moment = (inputs.T @ inputs).unsqueeze(0)
    objective = OutputObjective(
        weight.unsqueeze(1), torch.ones(6, 1, 1), Stored(scheme, torch.float32, None), moment
    )
    scale, zero = torch.full((6, 1, 1), 0.7), torch.zeros(6, 1, 1)
    rounded = (weight / 0.7).round().clamp(-4, 3) * 0.7
    expected = ((rounded - weight).double() @ inputs.double().T).square().sum(1)
    found = objective.error(scale, zero).flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    steps = ((rounded / 0.7) @ inputs.T).double()
    wanted = (weight @ inputs.T).double()
    fitted = (steps * wanted).sum(1) / steps.square().sum(1)
    found = objective.least_squares(scale, zero).flatten().double()
    torch.testing.assert_close(found, fitted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_search_is_the_plain_loop(symmetry: str) -> None:
    """At least as good as a loop over the same shrunken ranges, row by row, group by group."""
    weight, hessian = gaussian(6, 64), hessian_of(64)
    scheme = WeightScheme(3, 32, symmetry)  # type: ignore[arg-type]
    lowest, highest = scheme.code_range
    found = output_errors(weight, scheme, hessian, "clip", torch.float32)
    simple = fit_grid(weight, scheme, search="minmax", scale_dtype=torch.float32)
    for row in range(6):
        for group, start in enumerate((0, 32)):
            w = weight[row, start : start + 32].double()
            block = hessian[start : start + 32, start : start + 32].double()
            zero = 0 if simple.zero_point is None else int(simple.zero_point[row, group])
            errors = []
            for factor in (1.0, *factors(scheme)):
                scale = float(simple.scale[row, group]) * factor
                steps = (w / scale).round().clamp(lowest - zero, highest - zero)
                errors.append(float((steps * scale - w) @ block @ (steps * scale - w)))
            assert found[row, group] <= min(errors) * (1 + 1e-4)


def test_correlations_count() -> None:
    """What imatrix cannot see: a mean of the inputs that rounding errors add up along."""
    weight, hessian = gaussian(64, 128), hessian_of(128)
    scheme = WeightScheme(3, 64)
    clip, imatrix, mse = (
        output_errors(weight, scheme, hessian, search, torch.bfloat16).sum()
        for search in ("clip", "imatrix", "mse")
    )
    assert clip < 0.97 * imatrix < 0.9 * mse


def test_uncorrelated_inputs_give_the_imatrix_grid() -> None:
    weight, hessian = gaussian(16, 64), torch.logspace(0, -2, 64).diag()
    scheme = WeightScheme(4, 32, "asymmetric")
    clip = output_errors(weight, scheme, hessian, "clip", torch.bfloat16)
    imatrix = output_errors(weight, scheme, hessian, "imatrix", torch.bfloat16)
    torch.testing.assert_close(clip, imatrix, rtol=1e-4, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    symmetry=st.sampled_from(SYMMETRIES),
    group_size=st.sampled_from([None, 8, 32]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_no_group_is_worse_than_with_minmax(
    bits: int,
    symmetry: str,
    group_size: int | None,
    dtype: torch.dtype,
    magnitude: float,
    seed: int,
) -> None:
    weight, hessian = gaussian(4, 64, seed) ** 3 * magnitude, hessian_of(64, seed)
    scheme = WeightScheme(bits, group_size, symmetry)  # type: ignore[arg-type]
    found, simple = (
        output_errors(weight, scheme, hessian, search, dtype) for search in ("clip", "minmax")
    )
    assert (found <= simple * (1 + 1e-4) + 1e-9 * magnitude**2).all()


def test_float_blocks_of_several_channels_share_a_scale() -> None:
    """fp8 by block: 128 channels of one scale are 128 errors through one block of H."""
    weight, hessian = gaussian(256, 256) ** 3, hessian_of(256)
    scheme = WeightScheme(8, 128, number="float", rows=128)
    clip, simple = (
        output_errors(weight, scheme, hessian, search, torch.bfloat16).view(2, 128, 2).sum(1)
        for search in ("clip", "minmax")
    )
    assert (clip <= simple * (1 + 1e-5)).all()
    assert clip.sum() < simple.sum()


def test_a_group_without_inputs_is_searched_by_its_weights() -> None:
    weight, hessian = gaussian(8, 64), hessian_of(64)
    hessian[32:], hessian[:, 32:] = 0, 0
    scheme = WeightScheme(3, 32)
    blind = fit_grid(weight, scheme, search="mse").scale
    found = fit_grid(weight, scheme, search="clip", hessian=hessian).scale
    torch.testing.assert_close(found[:, 1], blind[:, 1], rtol=0.02, atol=0)
    assert not torch.equal(found[:, 0], blind[:, 0])


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of other shapes may differ in the last bit, which bf16 scales do not show."""
    scheme, weight, hessian = WeightScheme(4, 16), gaussian(37, 64), hessian_of(64)
    whole, again = (fit_grid(weight, scheme, search="clip", hessian=hessian) for _ in range(2))
    assert torch.equal(whole.scale, again.scale)
    monkeypatch.setattr(grid_module, "_CHUNK_ELEMENTS", 5 * 64)
    parts = fit_grid(weight, scheme, search="clip", hessian=hessian)
    torch.testing.assert_close(whole.scale, parts.scale)


@pytest.mark.parametrize("hessian", [None, torch.eye(63), torch.ones(64)])
def test_a_hessian_that_does_not_fit_is_refused(hessian: Tensor | None) -> None:
    with pytest.raises(ValueError, match="Hessian of all inputs"):
        fit_grid(gaussian(4, 64), WeightScheme(4, 16), search="clip", hessian=hessian)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(poison: float) -> None:
    hessian = torch.eye(64)
    hessian[5, 5] = poison
    with pytest.raises(NumericalError, match="Hessian"):
        fit_grid(gaussian(4, 64), WeightScheme(4, 16), search="clip", hessian=hessian)
