"""Learned rounding against finite differences, brute force over all roundings, and its start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compressor.numerics.grid import Grid, fit_grid, round_to_grid
from compressor.numerics.signround import LearnedRounding, rate_at
from compressor.types import Symmetry, WeightScheme
from tests.numerics.test_gptq import correlated_inputs, normal

SYMMETRIES: tuple[Symmetry, ...] = ("symmetric", "full_range", "asymmetric")


def begin(
    weight: Tensor, bits: int, symmetry: Symmetry, dtype: torch.dtype = torch.bfloat16
) -> LearnedRounding:
    scheme = WeightScheme(bits, 16, symmetry)
    grid = fit_grid(weight, scheme, search="mse", scale_dtype=dtype)
    return LearnedRounding(weight, grid, scheme)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_begins_at_rounding_to_nearest(bits: int, symmetry: Symmetry) -> None:
    weight = normal(8, 48)
    scheme = WeightScheme(bits, 16, symmetry)
    grid = fit_grid(weight, scheme, search="mse")
    plain = round_to_grid(weight, grid, scheme)
    found = LearnedRounding(weight, grid, scheme).quantized()
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)
    if plain.zero_point is not None:
        assert found.zero_point is not None
        assert torch.equal(found.zero_point, plain.zero_point)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_begins_at_codes_that_are_given(bits: int, symmetry: Symmetry) -> None:
    """Any codes; learning takes those back that gain nothing, and moves an offset by ½ at most."""
    weight = normal(8, 48)
    scheme = WeightScheme(bits, 16, symmetry)
    grid = fit_grid(weight, scheme, search="mse")
    nearest = round_to_grid(weight, grid, scheme).codes
    generator = torch.Generator().manual_seed(bits)
    moves = torch.randint(-2, 3, nearest.shape, generator=generator, dtype=torch.int8)
    codes = (nearest + moves).clamp(*scheme.code_range)
    rounding = LearnedRounding(weight, grid, scheme, codes)
    assert torch.equal(rounding.quantized().codes, codes)
    assert torch.equal(rounding.quantized().scale, grid.scale)
    start = rounding.offset.detach().clone()
    error = error_of(rounding.dense(), torch.eye(48), weight.T)
    assert learn(rounding, torch.eye(48), weight.T, 20) < error
    reach = torch.maximum(start.abs() + 0.5, torch.tensor(0.5))
    assert bool((rounding.offset.detach().abs() <= reach).all())


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_learned_on_is_what_is_stored(symmetry: Symmetry, dtype: torch.dtype) -> None:
    """Bit for bit, anywhere in the space of what can be learned."""
    rounding = begin(normal(8, 48), 3, symmetry, dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for parameter in rounding.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        rounding.step(0.05)
        stored = rounding.quantized()
        lowest, highest = stored.scheme.code_range
        assert int(stored.codes.min()) >= lowest
        assert int(stored.codes.max()) <= highest
        assert torch.equal(rounding.dense().detach(), stored.dequantize().float())
    assert float(rounding.offset.detach().abs().max()) <= 0.5
    assert float(rounding.high.detach().min()) >= 0.5
    assert float(rounding.high.detach().max()) <= 1.5


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_gradients_are_those_of_the_surrogate(symmetry: Symmetry) -> None:
    """The surrogate has every rounding replaced by adding what it adds at the point: smooth there.

    Finite differences of that, in fp64, against what backward gives.
    """
    weight, inputs = normal(3, 16), normal(32, 16, seed=1)
    scheme = WeightScheme(4, 16, symmetry)
    tight = fit_grid(weight, scheme, search="minmax", scale_dtype=torch.float32)
    grid = Grid(tight.scale * 1.5, tight.zero_point)  # so wide that no code is at an end
    rounding = LearnedRounding(weight, grid, scheme)
    with torch.no_grad():
        rounding.offset += 0.3 * torch.rand(rounding.offset.shape) - 0.15
        rounding.high *= 0.93
        rounding.low *= 0.96
    target = inputs @ weight.T
    ((inputs @ rounding.dense().T - target).square().sum()).backward()  # type: ignore[no-untyped-call]
    lowest, highest = scheme.code_range

    def loss(offset: Tensor, low: Tensor, high: Tensor, at: tuple[Tensor, ...]) -> float:
        """All in fp64; `at` is the point at which the residuals of rounding are frozen."""

        def parts(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale = grid.scale.double().unsqueeze(-1)
            if grid.zero_point is None:
                return w / (scale * b) + v, scale * b, torch.zeros_like(scale)
            zero = grid.zero_point.double().unsqueeze(-1)
            bottom, top = scale * (lowest - zero) * a, scale * (highest - zero) * b
            step = (top - bottom) / (highest - lowest)
            return w / step + v, step, lowest - bottom / step

        w = weight.double().reshape(3, 1, 16)
        frozen_x, _, frozen_z = parts(*at)
        x, scale, z = parts(offset, low, high)
        zero = (z + (frozen_z.round() - frozen_z)).clamp(lowest, highest)
        codes = (x + (frozen_x.round() - frozen_x) + zero).clamp(lowest, highest)
        dense = ((codes - zero) * scale).reshape(3, 16)
        return float((inputs.double() @ dense.T - target.double()).square().sum())

    point = tuple(p.detach().double() for p in (rounding.offset, rounding.low, rounding.high))
    checked = [(0, rounding.offset), (2, rounding.high)]
    checked += [(1, rounding.low)] if symmetry == "asymmetric" else []
    for which, parameter in checked:
        assert parameter.grad is not None
        for index in itertools.islice(itertools.product(*map(range, parameter.shape)), 24):
            shifted = []
            for sign in (1e-6, -1e-6):
                moved = [p.clone() for p in point]
                moved[which][index] += sign
                shifted.append(loss(moved[0], moved[1], moved[2], point))
            slope = (shifted[0] - shifted[1]) / 2e-6
            assert float(parameter.grad[index]) == pytest.approx(slope, rel=2e-3, abs=1e-2)


def learn(rounding: LearnedRounding, inputs: Tensor, target: Tensor, steps: int) -> float:
    """As the stage does it, for one layer: best squared error seen."""
    best = float("inf")
    for step in range(steps):
        error = (inputs @ rounding.dense().T - target).square().sum()
        best = min(best, float(error.detach()))
        error.backward()  # type: ignore[no-untyped-call]
        rounding.step(rate_at(step, steps, 1 / steps))
    return min(best, error_of(rounding.dense(), inputs, target))


def error_of(dense: Tensor, inputs: Tensor, target: Tensor) -> float:
    return float((inputs @ dense.detach().T - target).square().sum())


def test_close_to_the_best_of_all_roundings() -> None:
    """One row of eight weights: each goes up or down, 256 choices on the fixed grid."""
    scheme = WeightScheme(3, None, "symmetric")
    gains = []
    for seed in range(6):
        weight = normal(1, 8, seed=seed)
        inputs = correlated_inputs(64, 8, seed)
        target = inputs @ weight.T
        grid = fit_grid(weight, scheme, search="mse", scale_dtype=torch.float32)
        steps = weight / grid.scale.float()
        choices = [
            torch.tensor([float(way) for way in ways]).clamp(*scheme.code_range) * grid.scale
            for ways in itertools.product(*zip(steps.floor()[0], steps.ceil()[0], strict=True))
        ]
        optimum = min(error_of(choice, inputs, target) for choice in choices)
        nearest = round_to_grid(weight, grid, scheme).dequantize()
        plain = error_of(nearest, inputs, target)
        rounding = LearnedRounding(weight, grid, scheme)
        learned = learn(rounding, inputs, target, 200)
        assert learned <= plain
        gains.append((plain - learned) / (plain - optimum) if plain > optimum else 1.0)
    # The scale is learned too, so that it may even pass the best rounding on the grid as it was.
    assert sum(gains) / len(gains) > 0.8


def test_what_is_clipped_does_not_learn() -> None:
    weight = torch.tensor([[9.0, -9.0, 0.2, 0.3]])
    scheme = WeightScheme(3, None, "symmetric")
    rounding = LearnedRounding(weight, Grid(torch.ones(1, 1), None), scheme)
    rounding.dense().sum().backward()  # type: ignore[no-untyped-call]
    assert rounding.offset.grad is not None
    assert rounding.offset.grad.flatten().tolist() == [0, 0, 1, 1]
    assert rounding.high.grad is not None
    # d(s·q)/ds = q where clipped, and q - w/s = the rounding error elsewhere.
    assert float(rounding.high.grad) == pytest.approx(3 - 4 - 0.2 - 0.3)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.7), (4, 0.9)])
def test_learning_lowers_the_error_of_a_layer(bits: int, share: float) -> None:
    weight, inputs = normal(24, 64), correlated_inputs(512, 64, 0)
    rounding = begin(weight, bits, "asymmetric")
    target = inputs @ weight.T
    plain = error_of(rounding.dense(), inputs, target)
    assert learn(rounding, inputs, target, 100) < share * plain


def test_states_are_copies() -> None:
    rounding = begin(normal(4, 16), 3, "asymmetric")
    kept, before = rounding.state(), rounding.quantized()
    for parameter in rounding.parameters:
        parameter.grad = torch.ones_like(parameter)
    rounding.step(0.4)
    assert not torch.equal(rounding.quantized().codes, before.codes)
    assert all(parameter.grad is None for parameter in rounding.parameters)
    rounding.restore(kept)
    assert torch.equal(rounding.quantized().codes, before.codes)
    assert torch.equal(rounding.quantized().scale, before.scale)


def test_the_rate_falls_to_zero_and_bounds_the_way() -> None:
    rates = [rate_at(step, 200, 1 / 200) for step in range(200)]
    assert rates[0] == 1 / 200
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert sum(rates) == pytest.approx(0.5, abs=0.01)
