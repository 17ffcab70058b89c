"""Half-quadratic quantization against a slow implementation, group by group, and its promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import hqq as hqq_module
from compressor.numerics.grid import Search
from compressor.numerics.hqq import HalfQuadratic, hqq
from compressor.numerics.rtn import rtn
from compressor.types import QTensor, Symmetry, WeightScheme

W4 = WeightScheme(4, 16, "asymmetric")
DEFAULT = HalfQuadratic()


def heavy(out: int, width: int, seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom: most weights small, a few outliers."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, out, width, generator=random, dtype=torch.float64)
    return (normal[0] / normal[1:].square().mean(0).sqrt() / 20).to(torch.bfloat16).float()


def objectives(weight: Tensor, rounded: QTensor, exponent: float = 0.7) -> Tensor:
    """Σ|w - ŵ|^p of every group, in fp64."""
    error = (weight.double() - rounded.dequantize().double()).abs().pow(exponent)
    return error.view(*rounded.scale.shape, -1).sum(-1)


def slow_group(
    weights: list[float], scale: float, zero: int, scheme: WeightScheme, options: HalfQuadratic
) -> tuple[float, int]:
    """The scale and zero-point of one group, one weight at a time."""
    lowest, highest = scheme.code_range
    p = options.exponent

    def stored(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32).bfloat16())

    def steps(scale: float, zero: int) -> list[int]:
        return [min(max(round(w / scale), lowest - zero), highest - zero) for w in weights]

    def objective(scale: float, zero: int) -> float:
        points = [stored(step * scale) for step in steps(scale, zero)]
        return sum(abs(w - point) ** p for w, point in zip(weights, points, strict=True))

    best, beta = (objective(scale, zero), scale, zero), options.beta
    for _ in range(options.iterations):
        numbers = steps(scale, zero)
        targets = []
        for w, number in zip(weights, numbers, strict=True):
            x = w / scale - number
            size = max(abs(x) - abs(x) ** (p - 1) / beta, 0.0) if x else 0.0
            targets.append(w - math.copysign(size, x) * scale)
        codes = [number + zero for number in numbers]
        if scheme.symmetry == "asymmetric":
            offsets = [c - t / scale for c, t in zip(codes, targets, strict=True)]
            zero = min(max(round(sum(offsets) / len(offsets)), lowest), highest)
        numbers = [code - zero for code in codes]
        energy = sum(number * number for number in numbers)
        product = sum(n * t for n, t in zip(numbers, targets, strict=True))
        fitted = stored(product / energy) if energy else 0.0
        scale = fitted if fitted * scale > 0 else scale
        best = min(best, (objective(scale, zero), scale, zero), key=lambda entry: entry[0])
        beta *= options.growth
    return best[1], best[2]


@pytest.mark.parametrize("symmetry", ["symmetric", "full_range", "asymmetric"])
@pytest.mark.parametrize("options", [DEFAULT, HalfQuadratic(0.5, 2.0, 1.1, 12)])
def test_it_is_what_a_slow_implementation_finds(symmetry: Symmetry, options: HalfQuadratic) -> None:
    """A sum in fp32 may fall on the other side of a tie now and then; the objective does not."""
    weight, scheme = heavy(24, 64), WeightScheme(4, 16, symmetry)
    first, found = rtn(weight, scheme), hqq(weight, scheme, options)
    same = 0
    for row in range(24):
        for group in range(4):
            zero = 0 if first.zero_point is None else int(first.zero_point[row, group])
            values = weight[row, 16 * group : 16 * group + 16].tolist()
            expected = slow_group(values, float(first.scale[row, group]), zero, scheme, options)
            other = 0 if found.zero_point is None else int(found.zero_point[row, group])
            same += expected == (float(found.scale[row, group]), other)
    assert same >= 94  # of 96


@pytest.mark.parametrize("symmetry", ["symmetric", "full_range", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("start", ["minmax", "mse"])
def test_no_group_ends_above_the_grid_it_starts_from(
    symmetry: Symmetry, bits: int, start: Search
) -> None:
    """And all of them together below it; in bf16, 8-bit scales have hardly a neighbour to go to."""
    weight, scheme = heavy(32, 128, seed=bits), WeightScheme(bits, 32, symmetry)
    dtype = torch.float32 if bits == 8 else torch.bfloat16
    first = rtn(weight, scheme, search=start, scale_dtype=dtype)
    before = objectives(weight, first)
    after = objectives(weight, hqq(weight, scheme, DEFAULT, start=start, scale_dtype=dtype))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_more_iterations_never_raise_the_objective() -> None:
    weight = heavy(32, 128)
    falling = [
        objectives(weight, hqq(weight, W4, HalfQuadratic(iterations=count)))
        for count in (1, 2, 4, 8, 16, 32)
    ]
    assert all((b <= a * (1 + 1e-6)).all() for a, b in itertools.pairwise(falling))
    assert falling[-1].sum() < 0.98 * objectives(weight, rtn(weight, W4)).sum()


def test_a_whole_zero_point_on_a_fixed_scale_gains_nothing() -> None:
    """Why the scale is solved for: the original's solution, rounded, is that of min-max."""
    weight = heavy(32, 128)
    first = rtn(weight, W4)
    assert first.zero_point is not None
    scale, zero = first.scale.float().unsqueeze(-1), first.zero_point.float().unsqueeze(-1)
    start, groups, beta = zero, weight.view(32, 8, 16), DEFAULT.beta
    for _ in range(DEFAULT.iterations):
        codes = (groups / scale + zero).round().clamp(-8, 7)
        error = groups / scale - (codes - zero)
        shrunk = (error.abs() - error.abs().clamp_min(1e-8) ** -0.3 / beta).clamp_min(0)
        zero = (codes - (groups / scale - error.sign() * shrunk)).mean(-1, keepdim=True)
        beta *= DEFAULT.growth
    assert (zero != start).any()
    assert (zero.round() == start).float().mean() > 0.99


@given(
    seed=st.integers(0, 1 << 30),
    bits=st.integers(2, 8),
    magnitude=st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]),
    symmetry=st.sampled_from(["symmetric", "full_range", "asymmetric"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(max_examples=40, deadline=None)
def test_any_weight_gets_a_grid_that_can_be_stored(
    seed: int, bits: int, magnitude: float, symmetry: Symmetry, dtype: torch.dtype
) -> None:
    weight = heavy(4, 32, seed % 1000) * magnitude
    weight[seed % 4] = 0
    scheme = WeightScheme(bits, 16, symmetry)
    found = hqq(weight, scheme, DEFAULT, scale_dtype=dtype)
    lowest, highest = scheme.code_range
    assert found.scale.dtype == dtype
    assert found.scale.isfinite().all()
    assert (found.scale != 0).all()
    assert lowest <= found.codes.min() <= found.codes.max() <= highest
    assert found.dequantize().isfinite().all()
    assert not found.dequantize()[seed % 4].any()


def test_the_unit_of_the_weights_does_not_matter() -> None:
    weight = heavy(16, 64)
    one, other = hqq(weight, W4, DEFAULT), hqq(weight * 1024, W4, DEFAULT)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 1024, other.scale)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy(16, 64)
    whole = hqq(weight, W4, DEFAULT)
    monkeypatch.setattr(hqq_module, "_CHUNK_ELEMENTS", 48)
    parts = hqq(weight, W4, DEFAULT)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


def test_twice_gives_the_same_bytes() -> None:
    first, second = (hqq(heavy(16, 64), W4, DEFAULT) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert first.zero_point is not None
    assert second.zero_point is not None
    assert torch.equal(first.zero_point, second.zero_point)


def test_what_it_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="integer grids"):
        hqq(heavy(4, 32), WeightScheme(4, 32, number="float", scales="e8m0"), DEFAULT)
    weight = heavy(4, 32)
    weight[0, 0] = math.nan
    with pytest.raises(NumericalError):
        hqq(weight, W4, DEFAULT)
