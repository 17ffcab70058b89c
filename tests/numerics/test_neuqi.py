"""The joint search of scale and zero-point against loops over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.numerics import grid as grid_module
from compressor.numerics.grid import fit_grid
from compressor.numerics.grid_search import Objective, Stored, full_range_of
from compressor.numerics.neuqi import best_zero_point
from compressor.numerics.rtn import rtn
from compressor.types import WeightScheme
from tests.numerics.test_grid import DTYPES, gaussian


def importance_of(width: int, seed: int = 4) -> Tensor:
    """A few inputs hold most of it, as in language models."""
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) ** 4


def weighted_errors(
    weight: Tensor, scheme: WeightScheme, importance: Tensor, search: str, dtype: torch.dtype
) -> Tensor:
    """Σ h (ŵ-w)² of every group, fp64 [out, groups], of the weight as it would be stored."""
    quantized = rtn(weight, scheme, search=search, importance=importance, scale_dtype=dtype)  # type: ignore[arg-type]
    error = (quantized.dequantize().double() - weight.double()).square() * importance.double()
    return error.view(weight.shape[0], scheme.groups(weight.shape[1]), -1).sum(-1)


def exhaustive(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The same for groups [groups, size]: least over 3 000 scales and every zero-point."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    w = weight.double().unsqueeze(0)
    spread = w.amax(-1, keepdim=True).clamp_min(0) - w.amin(-1, keepdim=True).clamp_max(0)
    scale = torch.linspace(0.02, 1.1, 3000).double().view(-1, 1, 1) * spread / (2**bits - 1)
    best = torch.full(w.shape[1:2], float("inf"), dtype=torch.float64)
    for zero in range(lowest, highest + 1):
        codes = ((w / scale).round() + zero).clamp(lowest, highest)
        error = ((scale * (codes - zero) - w).square() * importance.double()).sum(-1)
        best = torch.minimum(best, error.amin(0))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shrink", [1.2, 1.0, 0.5, 0.2])
def test_the_zero_point_is_the_best_of_all(bits: int, shrink: float) -> None:
    """Its error in fp64 beside that of every zero-point there is, one after the other."""
    scheme = WeightScheme(bits, 32, "asymmetric")
    weight = gaussian(24, 64, seed=bits).view(24, 2, 32) + 0.4
    emphasis = importance_of(64).view(2, 32).sqrt().expand_as(weight)
    scale = full_range_of(weight, scheme)[0] * shrink
    objective = Objective(weight, emphasis, Stored(scheme, torch.float32, None))
    zero = best_zero_point(objective, scale).double()
    lowest, highest = scheme.code_range

    def error(point: Tensor | int) -> Tensor:
        steps = (weight.double() / scale).round().clamp(lowest - point, highest - point)
        return ((steps * scale - weight) * emphasis).square().sum(-1)

    least = torch.stack([error(point) for point in range(lowest, highest + 1)]).amin(0)
    assert zero.shape == (24, 2, 1)
    assert (error(zero) <= least * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_close_to_an_exhaustive_one(bits: int) -> None:
    """Of a few inputs that hold all the importance the error is a comb over the scale."""
    weight, scheme = gaussian(48, 32, seed=3) + 0.3, WeightScheme(bits, 16, "asymmetric")
    importance = importance_of(32)
    found = weighted_errors(weight, scheme, importance, "neuqi", torch.float32)
    start = weighted_errors(weight, scheme, importance, "imatrix", torch.float32)
    halves = [(weight[:, part], importance[part]) for part in (slice(16), slice(16, 32))]
    least = sum(float(exhaustive(*half, bits).sum()) for half in halves)
    assert float(found.sum()) < 1.05 * least
    assert float(found.sum()) < (1 - 0.003 * (bits - 2)) * float(start.sum())


def test_a_range_away_from_that_of_all_weights_is_found() -> None:
    """A large weight that nothing flows through, far on one side of all that counts."""
    weight = 0.8 + 0.4 * torch.rand(16, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 5] = -8
    importance = torch.ones(32)
    importance[5] = 1e-7
    scheme = WeightScheme(4, 32, "asymmetric")
    found, start = (
        weighted_errors(weight, scheme, importance, search, torch.bfloat16).sum()
        for search in ("neuqi", "imatrix")
    )
    assert found < 0.25 * start


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.integers(0, 1000),
)
def test_no_group_is_worse_than_with_a_simpler_search(
    bits: int, dtype: torch.dtype, offset: float, magnitude: float, seed: int
) -> None:
    weight = (gaussian(4, 64, seed) ** 3 + offset) * magnitude
    importance = gaussian(1, 64, seed + 1)[0].square()
    scheme = WeightScheme(bits, 32, "asymmetric")
    found, imatrix, minmax = (
        weighted_errors(weight, scheme, importance, search, dtype)
        for search in ("neuqi", "imatrix", "minmax")
    )
    assert (found <= imatrix * (1 + 1e-5)).all()
    assert (found <= minmax * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_groups_stay_finite(dtype: torch.dtype) -> None:
    rows = [0.0, 1e-45, -1e-39, 1e-30, 3e-8, -1.0, 7e4, -1e30, 3e38]
    weight = torch.tensor(rows).unsqueeze(1).repeat(1, 16)
    weight[-1, 8:] *= -1
    importance = torch.cat([torch.zeros(8), torch.ones(8)])
    scheme = WeightScheme(4, 8, "asymmetric")
    quantized = rtn(weight, scheme, search="neuqi", importance=importance, scale_dtype=dtype)
    assert torch.isfinite(quantized.dequantize()).all()
    assert (quantized.scale > 0).all()
    assert (quantized.dequantize()[0] == 0).all()


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also twice the same gives the same, to the last bit."""
    scheme, weight = WeightScheme(4, 16, "asymmetric"), gaussian(37, 64)
    importance = importance_of(64)
    whole = fit_grid(weight, scheme, search="neuqi", importance=importance)
    monkeypatch.setattr(grid_module, "_CHUNK_ELEMENTS", 5 * 64)
    parts = fit_grid(weight, scheme, search="neuqi", importance=importance)
    assert whole.zero_point is not None
    assert parts.zero_point is not None
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


@pytest.mark.parametrize("symmetry", ["symmetric", "full_range"])
def test_grids_without_zero_points_are_refused(symmetry: str) -> None:
    scheme = WeightScheme(4, 16, symmetry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero-points"):
        fit_grid(gaussian(4, 64), scheme, search="neuqi", importance=torch.ones(64))


def test_importance_is_required() -> None:
    with pytest.raises(ValueError, match="needs the importance"):
        fit_grid(gaussian(4, 64), WeightScheme(4, 16, "asymmetric"), search="neuqi")
