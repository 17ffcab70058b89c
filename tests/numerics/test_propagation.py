"""The propagating target against least squares, and what it does to the layer error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import propagation as propagation_module
from compressor.numerics.gptq import factorize, gptq
from compressor.numerics.grid import fit_grid
from compressor.numerics.hessian import HessianAccumulator, shrink
from compressor.numerics.propagation import DriftAccumulator, propagated_target
from compressor.types import WeightScheme
from tests.numerics.test_gptq import correlated_inputs, normal


def streams(tokens: int, width: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """X and X̃ [tokens, in], fp32: the second as if earlier layers had been rounded."""
    original = correlated_inputs(tokens, width, seed)
    mixing = torch.eye(width) + noise * normal(width, width, seed=seed + 2) / width**0.5
    jitter = noise * original.square().mean().sqrt() * normal(tokens, width, seed=seed + 3)
    return original, original @ mixing + jitter


def moments(original: Tensor, rounded: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """H and G - H as the accumulators have them."""
    hessian = HessianAccumulator(original.shape[1])
    drift = DriftAccumulator(original.shape[1])
    for x, y in zip(original.chunk(parts), rounded.chunk(parts), strict=True):
        hessian.add(y)
        drift.add(x, y)
    assert drift.tokens == hessian.tokens == len(original)
    return hessian.matrix(), drift.matrix()


def ridge(weight: Tensor, original: Tensor, rounded: Tensor, damping: float) -> Tensor:
    """argmin ‖W X - T X̃‖²·2/N + λ‖T - W‖² by an orthogonal factorisation: no moments, no solve."""
    x, y, w = original.double(), rounded.double(), weight.double()
    scale = (2 / len(x)) ** 0.5
    pull = (damping * 2 * y.square().mean()) ** 0.5
    rows = torch.cat([scale * y, pull * torch.eye(y.shape[1], dtype=torch.float64)])
    wanted = torch.cat([scale * x @ w.T, pull * w.T])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def error(weight: Tensor, target: Tensor, original: Tensor, rounded: Tensor) -> float:
    """‖W X - T X̃‖² / ‖W X‖²."""
    wanted = original.double() @ weight.double().T
    got = rounded.double() @ target.double().T
    return float((wanted - got).square().sum() / wanted.square().sum())


def test_drift_of_bf16_streams_is_summed_in_fp32() -> None:
    """Differences come out exactly where the streams are close, which is nearly everywhere."""
    original, rounded = (stream.bfloat16() for stream in streams(2048, 300, 0.05))
    drift, same = DriftAccumulator(300), DriftAccumulator(300)
    for x, y in zip(original.split(256), rounded.split(256), strict=True):
        drift.add(x, y)
        same.add(y, y)
    x, y = original.double(), rounded.double()
    expected = 2 / 2048 * (x - y).T @ y
    assert (drift.matrix() - expected).norm() < 1e-3 * expected.norm()
    assert not same.matrix().any()


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_target_is_the_ridge_solution(damping: float, share: float) -> None:
    weight = normal(12, 40)
    original, rounded = streams(300, 40, 0.2)
    hessian, drift = moments(original, rounded, parts=3)
    factor = factorize(hessian, damping=damping)
    target = propagated_target(weight, factor, drift, share=share)
    exact = (1 - share) * weight.double() + share * ridge(weight, original, rounded, damping)
    moved = (exact - weight).norm()
    assert target.dtype == torch.float32
    assert moved > 0.01 * weight.norm()
    assert (target - exact).norm() < 2e-4 * moved


def test_mutants_miss_the_ridge_solution() -> None:
    weight = normal(12, 40)
    original, rounded = streams(300, 40, 0.2)
    hessian, drift = moments(original, rounded)
    swapped, backwards = moments(rounded, original)
    factor = factorize(hessian)
    exact = ridge(weight, original, rounded, 0.01)
    moved = (exact - weight).norm()
    mutants = {
        "transposed": (factor, drift.T),
        "sign": (factor, -drift),
        "normalisation": (factor, drift / 2),
        "streams swapped": (factorize(swapped), backwards),
        "H for G": (factor, torch.zeros_like(drift)),
        "other damping": (factorize(hessian, damping=0.1), drift),
        "Gram matrix of X": (factor, moments(original, original)[0] - hessian),
    }
    for name, (wrong, moment) in mutants.items():
        target = propagated_target(weight, wrong, moment, share=1)
        assert (target - exact).norm() > 0.05 * moved, name


@pytest.mark.parametrize("rows", [3, 200])
def test_the_target_does_not_depend_on_what_is_multiplied_first(rows: int) -> None:
    """More rows than inputs or fewer: the products are associated the other way."""
    original, rounded = streams(600, 48, 0.1)
    rounded[:, 5] = 0
    weight = normal(rows, 48, seed=4)
    hessian, drift = moments(original, rounded)
    factor = factorize(hessian, damping=0.1)
    upper, order = factor.upper.double(), factor.permutation
    pull = weight.double() @ drift.double()
    pull[:, 5] = 0
    step = (pull[:, order] @ upper.T) @ upper
    expected = weight.double().index_add(1, order, step, alpha=0.5)
    found = propagated_target(weight, factor, drift, share=0.5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(found[:, 5], weight[:, 5])
    assert (found - weight).abs().max() > 0.01


def test_pieces_of_both_streams_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    original, rounded = (stream.bfloat16() for stream in streams(1300, 64, 0.1))
    _, cut = moments(original, rounded)
    monkeypatch.setattr(propagation_module, "pieces", lambda rows, _: (rows,))
    _, whole = moments(original, rounded)
    assert not torch.equal(cut, torch.zeros_like(cut))
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_no_share_and_no_drift_leave_the_weight_bit_for_bit() -> None:
    weight = normal(12, 40)
    original, rounded = streams(300, 40, 0.2)
    hessian, drift = moments(original, rounded)
    assert torch.equal(propagated_target(weight, factorize(hessian), drift, share=0), weight)
    same, still = moments(rounded, rounded, parts=4)
    assert torch.equal(same, moments(original, rounded, parts=4)[0])
    assert not still.any()
    assert torch.equal(propagated_target(weight, factorize(same), still, share=1), weight)


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_that_never_fired_keep_their_weights(act_order: bool) -> None:
    weight = normal(12, 40)
    original, rounded = streams(300, 40, 0.2)
    rounded[:, [3, 17]] = 0
    hessian, drift = moments(original, rounded)
    target = propagated_target(weight, factorize(hessian, act_order=act_order), drift, share=1)
    assert torch.equal(target[:, [3, 17]], weight[:, [3, 17]])
    alive = [column for column in range(40) if column not in (3, 17)]
    assert error(weight, target, original, rounded) < error(weight, weight, original, rounded)
    reduced, moved = moments(original[:, alive], rounded[:, alive])
    assert torch.allclose(reduced, hessian[alive][:, alive], rtol=1e-5, atol=1e-7)
    # What the dead inputs carried in the original is made up for by the others.
    partial = propagated_target(weight[:, alive], factorize(reduced), moved, share=1)
    assert not torch.allclose(target[:, alive], partial, rtol=1e-2)


def test_an_indefinite_hessian_leaves_the_weight() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    factor = factorize(hessian)
    assert factor.failed
    weight = normal(3, 2)
    assert torch.equal(propagated_target(weight, factor, normal(2, 2), share=1), weight)


@pytest.mark.parametrize("width", [1, 7])
def test_a_rank_deficient_hessian_is_solved(width: int) -> None:
    """Fewer tokens than inputs: the damping decides, and the target stays finite."""
    original, rounded = streams(max(1, width // 2), width, 0.3)
    hessian, drift = moments(original, rounded)
    weight = normal(4, width)
    target = propagated_target(weight, factorize(hessian), drift, share=1)
    exact = ridge(weight, original, rounded, 0.01)
    assert (target - exact).norm() < 1e-3 * exact.norm()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.05, 0.6), share=st.floats(0.1, 1))
def test_the_target_is_nearer_on_calibration_before_rounding(
    seed: int, noise: float, share: float
) -> None:
    """‖W X - W' X̃‖ falls along the way to its minimum, in every case."""
    original, rounded = streams(400, 64, noise, seed)
    weight = normal(24, 64, seed=seed + 5)
    hessian, drift = moments(original, rounded)
    target = propagated_target(weight, factorize(hessian), drift, share=share)
    assert error(weight, target, original, rounded) < error(weight, weight, original, rounded)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_propagating_never_loses_on_calibration(noise: float, bits: int) -> None:
    """‖W X - Ŵ X̃‖, mean of many layers: lower with any share than with none.

    GPTQ is greedy, so that a few layers by chance prove nothing, one way or the other.
    """
    scheme = WeightScheme(bits, 16, "symmetric")
    errors = {0.0: 0.0, 0.5: 0.0, 1.0: 0.0}
    for layer in range(0, 320, 10):
        original, rounded = streams(400, 64, noise, layer)
        weight = normal(24, 64, seed=layer + 5)
        hessian, drift = moments(original, rounded)
        factor, importance = factorize(hessian), hessian.diagonal()
        for share in errors:
            target = propagated_target(weight, factor, drift, share=share)
            grid = fit_grid(target, scheme, search="imatrix", importance=importance)
            dense = gptq(target, factor, scheme, grid).quantized.dequantize()
            errors[share] += error(weight, dense, original, rounded)
    assert errors[0.5] < errors[0.0]
    assert errors[1.0] < errors[0.0]


def test_streams_that_do_not_pair_are_refused() -> None:
    drift = DriftAccumulator(4)
    with pytest.raises(NumericalError, match="no calibration token"):
        drift.matrix()
    with pytest.raises(ValueError, match=r"token by token: \[3, 4\] and \[2, 4\]"):
        drift.add(normal(3, 4), normal(2, 4))
    with pytest.raises(NumericalError, match="NaN, infinity"):
        drift.add(normal(3, 4), torch.full((3, 4), float("nan")))


def test_shrinking_keeps_the_diagonal() -> None:
    hessian, _ = moments(*streams(300, 8, 0.2))
    assert shrink(hessian, 0) is hessian
    third = shrink(hessian, 0.3)
    assert torch.equal(third.diagonal(), hessian.diagonal())
    off = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(third[off], 0.7 * hessian[off])
    assert torch.equal(shrink(hessian, 1), torch.diag(hessian.diagonal()))
    # GPTQ without correlations has nothing to compensate: it rounds to nearest.
    weight, scheme = normal(12, 8), WeightScheme(3, 8, "symmetric")
    grid = fit_grid(weight, scheme)
    solved = gptq(weight, factorize(shrink(hessian, 1)), scheme, grid, sweeps=2)
    nearest = (weight / grid.scale.float()).round().clamp(*scheme.code_range)
    assert torch.equal(solved.quantized.codes.float(), nearest)
