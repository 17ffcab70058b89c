"""GPTQ against brute force, closed forms and an independent fp64 implementation of OBQ."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.gptq import GPTQOutcome, _inverse_lower, damped, factorize, gptq
from compressor.numerics.grid import Grid, fit_grid, round_to_grid
from compressor.numerics.hessian import relative_loss
from compressor.types import QTensor, WeightScheme

SYMMETRIES = ("symmetric", "full_range", "asymmetric")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int, width: int, seed: int = 0, decay: float = 2.0) -> Tensor:
    """Inputs with a spectrum over `decay` decades, as in real layers."""
    spread = torch.logspace(0, -decay, width)
    basis = torch.linalg.qr(normal(width, width, seed=seed + 1))[0]
    return normal(tokens, width, seed=seed) * spread @ basis


def second_moment(inputs: Tensor) -> Tensor:
    return (2 / len(inputs) * inputs.double().T @ inputs.double()).float()


def exact_losses(
    weight: Tensor, codes: Tensor, grid: Grid, scheme: WeightScheme, h: Tensor
) -> Tensor:
    """d H dᵀ per row in fp64."""
    dense = QTensor(codes.to(torch.int8), grid.scale, grid.zero_point, scheme).dequantize()
    d = weight.double() - dense.double()
    return ((d @ h.double()) * d).sum(1)


def optimal_brain_quantization(
    weight: Tensor,
    hessian: Tensor,
    scheme: WeightScheme,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    sign: float = -1.0,
) -> Tensor:
    """Codes by Frantar & Alistarh's OBQ in a fixed order: fp64, one fresh inverse per column.

    Shares nothing with the solver: no Cholesky factor, no blocks, no transposition.
    """
    h = hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = list(range(len(h)))
    if act_order:
        order.sort(key=lambda j: -hessian[j, j].item())
    work, size = weight.double().clone(), weight.shape[1] // grid.scale.shape[1]
    codes = torch.zeros(weight.shape)
    for position, j in enumerate(order):
        remaining = order[position:]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        scale = grid.scale[:, j // size]
        zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point[:, j // size]
        raw = (work[:, j] / scale.double()).round() + zero.double()
        codes[:, j] = raw.clamp(*scheme.code_range)
        dense = (codes[:, j].to(scale.dtype) - zero.to(scale.dtype)) * scale
        error = (work[:, j] - dense.double()) / inverse[0, 0]
        work[:, remaining] += sign * error.unsqueeze(1) * inverse[0]
    return codes.to(torch.int8)


def solve(
    weight: Tensor, hessian: Tensor, scheme: WeightScheme, grid: Grid, **options: float
) -> GPTQOutcome:
    block = int(options.pop("block_size", 32))
    return gptq(weight, factorize(hessian, **options), scheme, grid, block_size=block)  # type: ignore[arg-type]


def all_codes(width: int, scheme: WeightScheme) -> Tensor:
    lowest, highest = scheme.code_range
    return torch.tensor(list(itertools.product(range(lowest, highest + 1), repeat=width)))


# ---------------------------------------------------------------- the algorithm itself


@pytest.mark.parametrize("block_size", [1, 7, 32, 128])
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_equal_optimal_brain_quantization(block_size: int, act_order: bool) -> None:
    weight, hessian = normal(24, 96), second_moment(correlated_inputs(400, 96))
    scheme = WeightScheme(3, 32, "symmetric")
    grid = fit_grid(weight, scheme, search="mse")
    expected = optimal_brain_quantization(weight, hessian, scheme, grid, act_order=act_order)
    outcome = solve(weight, hessian, scheme, grid, act_order=act_order, block_size=block_size)
    assert outcome.nearest_rows == 0
    assert torch.equal(outcome.quantized.codes, expected)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [None, 16])
def test_codes_equal_optimal_brain_quantization_on_every_grid(
    symmetry: str, bits: int, dtype: torch.dtype, group_size: int | None
) -> None:
    weight, hessian = normal(16, 48) + 0.5, second_moment(correlated_inputs(200, 48, decay=1.0))
    scheme = WeightScheme(bits, group_size, symmetry)  # type: ignore[arg-type]
    grid = fit_grid(weight, scheme, search="mse", scale_dtype=dtype)
    expected = optimal_brain_quantization(weight, hessian, scheme, grid)
    nearest = round_to_grid(weight, grid, scheme).codes
    ours, simple = (
        exact_losses(weight, codes, grid, scheme, hessian) for codes in (expected, nearest)
    )
    keep = simple < ours
    outcome = solve(weight, hessian, scheme, grid, block_size=10)
    assert outcome.nearest_rows == keep.sum() < 4
    assert torch.equal(outcome.quantized.codes, torch.where(keep.unsqueeze(1), nearest, expected))
    assert outcome.quantized.scale.dtype == dtype


def test_the_reference_tells_mutants_apart() -> None:
    """The equality above is worth something: wrong sign, damping or order change the codes."""
    weight, hessian = normal(24, 96), second_moment(correlated_inputs(400, 96))
    scheme = WeightScheme(3, 32, "symmetric")
    grid = fit_grid(weight, scheme, search="mse")
    factor = factorize(hessian)
    right = gptq(weight, factor, scheme, grid)
    mutants = {
        "sign": replace(factor, upper=2 * torch.diag(factor.upper.diagonal()) - factor.upper),
        "damping": factorize(hessian, damping=0.0),
        "order": factorize(hessian, act_order=False),
        "transposed": replace(factor, upper=factor.upper.T.contiguous()),
        "unpermuted": replace(factor, permutation=torch.arange(96)),
        "factor of H": replace(factor, upper=torch.linalg.cholesky(hessian, upper=True)),
    }
    for name, mutant in mutants.items():
        wrong = gptq(weight, mutant, scheme, grid)
        assert not torch.equal(wrong.quantized.codes, right.quantized.codes), name
    for name in ("sign", "transposed", "unpermuted", "factor of H"):
        wrong = gptq(weight, mutants[name], scheme, grid)
        assert wrong.row_loss.sum() > 1.3 * right.row_loss.sum(), name


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_factor_inverts_the_damped_hessian(act_order: bool, damping: float) -> None:
    hessian = second_moment(correlated_inputs(300, 64))
    factor = factorize(hessian, damping=damping, act_order=act_order)
    upper, order = factor.upper.double(), factor.permutation
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(64)
    product = upper.T @ upper @ damped[order][:, order]
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    assert (product - torch.eye(64)).norm() / 8 < (1e-5 if damping == 0.01 else 1e-2)
    assert (factor.damping_used, factor.attempts, factor.failed) == (damping, 1, False)
    if act_order:
        assert (hessian.diagonal()[order].diff() <= 0).all()
    else:
        assert torch.equal(order, torch.arange(64))


def test_equally_active_inputs_keep_their_order() -> None:
    hessian = torch.diag(torch.arange(300) // 100 + 1.0)
    expected = torch.arange(300).view(3, 100).flip(0).flatten()
    assert torch.equal(factorize(hessian).permutation, expected)


def test_second_column_makes_up_for_the_first() -> None:
    """Closed form: min over w₂ of d H dᵀ given d₁ is w₂ + (H₁₂/H₂₂)·d₁."""
    weight = torch.tensor([[0.4, 0.3], [-1.45, 0.45], [1.2, -0.9]])
    hessian = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    scheme = WeightScheme(4, None, "full_range")
    grid = Grid(torch.ones(3, 1), None)
    outcome = solve(weight, hessian, scheme, grid, damping=0.0)
    first = weight[:, 0].round()
    second = (weight[:, 1] + 1.2 * (weight[:, 0] - first)).round()
    assert torch.equal(outcome.quantized.codes.float(), torch.stack([first, second], 1))
    assert not torch.equal(second, weight[:, 1].round())


# ---------------------------------------------------------------- distance to the optimum


def test_codes_lie_between_rounding_and_the_optimum() -> None:
    """300 least-squares problems over 4 integers of 2 bits, all 256 answers tried."""
    scheme = WeightScheme(2, None, "full_range")
    candidates = all_codes(4, scheme)
    weight = normal(300, 4, seed=3)
    grid = fit_grid(weight, scheme, search="mse", scale_dtype=torch.float32)
    hessian = second_moment(correlated_inputs(50, 4, seed=5, decay=1.0))
    every = torch.stack(
        [exact_losses(weight, c.expand(300, 4), grid, scheme, hessian) for c in candidates]
    )
    best = every.amin(0)
    outcome = solve(weight, hessian, scheme, grid, damping=1e-6)
    ours = exact_losses(weight, outcome.quantized.codes, grid, scheme, hessian)
    nearest = round_to_grid(weight, grid, scheme).codes
    simple = exact_losses(weight, nearest, grid, scheme, hessian)
    assert (ours >= best * (1 - 1e-6)).all()
    assert (ours <= simple * (1 + 1e-4)).all()
    print(
        (ours <= best * (1 + 1e-4)).double().mean(),
        (ours.sum() - best.sum()) / (simple.sum() - best.sum()),
    )
    assert ours.sum() - best.sum() < 0.15 * (simple.sum() - best.sum())


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_uncorrelated_inputs_leave_nothing_to_make_up(symmetry: str) -> None:
    scheme = WeightScheme(2, None, symmetry)  # type: ignore[arg-type]
    weight, hessian = normal(40, 4), torch.diag(torch.tensor([3.0, 0.5, 7.0, 1.0]))
    grid = fit_grid(weight, scheme, search="mse", scale_dtype=torch.float32)
    codes = solve(weight, hessian, scheme, grid).quantized.codes
    every = torch.stack(
        [exact_losses(weight, c.expand(40, 4), grid, scheme, hessian) for c in all_codes(4, scheme)]
    )
    ours = exact_losses(weight, codes, grid, scheme, hessian)
    torch.testing.assert_close(ours, every.amin(0), rtol=1e-6, atol=1e-12)
    assert torch.equal(codes, round_to_grid(weight, grid, scheme).codes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    symmetry=st.sampled_from(SYMMETRIES),
    group_size=st.sampled_from([None, 8, 16]),
    tokens=st.integers(1, 200),
    decay=st.floats(0, 4),
    damping=st.sampled_from([1e-6, 0.01, 0.1]),
    act_order=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_row_is_worse_than_rounding(
    bits: int,
    symmetry: str,
    group_size: int | None,
    tokens: int,
    decay: float,
    damping: float,
    act_order: bool,
    seed: int,
) -> None:
    weight = normal(12, 48, seed=seed)
    hessian = second_moment(correlated_inputs(tokens, 48, seed, decay))
    scheme = WeightScheme(bits, group_size, symmetry)  # type: ignore[arg-type]
    grid = fit_grid(weight, scheme, search="imatrix", importance=hessian.diagonal())
    outcome = solve(weight, hessian, scheme, grid, damping=damping, act_order=act_order)
    nearest = round_to_grid(weight, grid, scheme)
    ours = exact_losses(weight, outcome.quantized.codes, grid, scheme, hessian)
    simple = exact_losses(weight, nearest.codes, grid, scheme, hessian)
    noise = 1e-5 * simple + 1e-6 * hessian.diagonal().max() * weight.square().sum(1) * 2.0**-bits
    assert (ours <= simple + noise).all()
    assert (outcome.row_loss <= outcome.nearest_row_loss).all()


def test_unseen_inputs_gain_too() -> None:
    inputs = correlated_inputs(4000, 128, decay=1.5)
    weight, scheme = normal(64, 128), WeightScheme(3, 64, "symmetric")
    hessian, unseen = second_moment(inputs[:2000]), second_moment(inputs[2000:])
    grid = fit_grid(weight, scheme, search="imatrix", importance=hessian.diagonal())
    dense = solve(weight, hessian, scheme, grid).quantized.dequantize()
    nearest = round_to_grid(weight, grid, scheme).dequantize()
    assert relative_loss(weight, dense, unseen) < 0.5 * relative_loss(weight, nearest, unseen)


# ---------------------------------------------------------------- invariances


def test_order_of_the_inputs_does_not_matter() -> None:
    weight, hessian = normal(16, 64), second_moment(correlated_inputs(300, 64))
    scheme = WeightScheme(3, None, "asymmetric")
    grid = fit_grid(weight, scheme, search="mse")
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    plain = solve(weight, hessian, scheme, grid).quantized.codes
    shuffled = solve(weight[:, shuffle], hessian[shuffle][:, shuffle], scheme, grid).quantized.codes
    assert torch.equal(plain[:, shuffle], shuffled)


def test_units_do_not_matter() -> None:
    weight, hessian = normal(16, 64), second_moment(correlated_inputs(300, 64))
    hessian[:, 5] = hessian[5] = 0  # a dead input must not break it
    scheme = WeightScheme(3, 16, "full_range")
    plain = solve(weight, hessian, scheme, fit_grid(weight, scheme)).quantized
    large = solve(8 * weight, hessian / 1024, scheme, fit_grid(8 * weight, scheme)).quantized
    assert torch.equal(plain.codes, large.codes)
    assert torch.equal(8 * plain.scale, large.scale)


def test_rows_are_solved_independently() -> None:
    """So q, k and v, or gate and up, may be stacked and solved as one."""
    weight, hessian = normal(40, 64), second_moment(correlated_inputs(300, 64))
    scheme, factor = WeightScheme(4, 16, "symmetric"), factorize(hessian)
    whole = gptq(weight, factor, scheme, fit_grid(weight, scheme)).quantized.codes
    parts = [gptq(w, factor, scheme, fit_grid(w, scheme)).quantized.codes for w in weight.split(16)]
    assert torch.equal(whole, torch.cat(parts))


def test_same_inputs_give_the_same_bits() -> None:
    weight, inputs = normal(64, 160), correlated_inputs(500, 160)
    scheme = WeightScheme(4, 32, "asymmetric")
    runs = [
        solve(weight, second_moment(inputs), scheme, fit_grid(weight, scheme)) for _ in range(2)
    ]
    assert torch.equal(runs[0].quantized.codes, runs[1].quantized.codes)
    assert torch.equal(runs[0].quantized.scale, runs[1].quantized.scale)


def test_arguments_are_left_as_they_were() -> None:
    weight, hessian = normal(8, 32), second_moment(correlated_inputs(100, 32))
    before = weight.clone(), hessian.clone()
    scheme = WeightScheme(4, 16, "symmetric")
    solve(weight, hessian, scheme, fit_grid(weight, scheme), act_order=False)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_target_may_differ_from_the_matrix_the_grid_fits() -> None:
    weight, hessian = normal(16, 64), second_moment(correlated_inputs(300, 64))
    scheme = WeightScheme(4, 16, "symmetric")
    grid = fit_grid(weight, scheme)
    target = weight + 0.1 * normal(16, 64, seed=9)
    outcome = solve(target, hessian, scheme, grid)
    assert torch.equal(outcome.quantized.scale, grid.scale)
    assert torch.equal(
        outcome.quantized.codes, optimal_brain_quantization(target, hessian, scheme, grid)
    )


# ---------------------------------------------------------------- hard cases


def test_dead_inputs_round_to_nearest_and_disturb_nobody() -> None:
    inputs = correlated_inputs(300, 48)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[0, 7, 31, 47]] = True
    inputs[:, dead] = 0
    weight, scheme = normal(16, 48), WeightScheme(3, None, "symmetric")
    grid = fit_grid(weight, scheme)
    factor = factorize(second_moment(inputs))
    codes = gptq(weight, factor, scheme, grid).quantized.codes
    alive = solve(weight[:, ~dead], second_moment(inputs[:, ~dead]), scheme, grid).quantized.codes
    assert torch.equal(factor.dead, dead)
    assert not factor.failed
    assert torch.equal(codes[:, dead], round_to_grid(weight, grid, scheme).codes[:, dead])
    assert torch.equal(codes[:, ~dead], alive)


def test_inputs_that_are_all_dead_round_to_nearest() -> None:
    weight, scheme = normal(8, 32), WeightScheme(4, 16, "asymmetric")
    grid = fit_grid(weight, scheme)
    outcome = solve(weight, torch.zeros(32, 32), scheme, grid)
    assert torch.equal(outcome.quantized.codes, round_to_grid(weight, grid, scheme).codes)


@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_fewer_tokens_than_inputs(damping: float) -> None:
    hessian = second_moment(correlated_inputs(20, 128, decay=1.0))
    weight, scheme = normal(32, 128), WeightScheme(3, 64, "symmetric")
    factor = factorize(hessian, damping=damping)
    outcome = gptq(weight, factor, scheme, fit_grid(weight, scheme))
    assert not factor.failed
    assert outcome.row_loss.sum() < 0.2 * outcome.nearest_row_loss.sum()


def test_damping_rises_until_the_factorisation_succeeds() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = factorize(hessian, damping=1e-6)
    assert not factor.failed
    assert factor.damping_used == pytest.approx(0.1)
    assert factor.attempts == 5  # 1e-6, 1e-4, 1e-3, 1e-2, 1e-1


def test_hessian_beyond_repair_degenerates_to_rounding() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 5.0
    weight, scheme = normal(8, 32), WeightScheme(4, 16, "symmetric")
    factor = factorize(hessian)
    grid = fit_grid(weight, scheme)
    outcome = gptq(weight, factor, scheme, grid)
    assert factor.failed
    assert (factor.damping_used, factor.attempts) == (1.0, 3)
    assert torch.equal(outcome.quantized.codes, round_to_grid(weight, grid, scheme).codes)


def test_pruned_weights_of_an_empty_group_stay_zero() -> None:
    weight, hessian = normal(8, 64), second_moment(correlated_inputs(300, 64))
    weight[:, 16:32] = 0
    scheme = WeightScheme(4, 16, "symmetric")
    dense = solve(weight, hessian, scheme, fit_grid(weight, scheme)).quantized.dequantize()
    assert (dense[:, 16:32] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(poison: float) -> None:
    weight, hessian = normal(4, 32), second_moment(correlated_inputs(100, 32))
    scheme = WeightScheme(4, 16, "symmetric")
    grid, factor = fit_grid(weight, scheme), factorize(hessian)
    weight[1, 2] = poison
    with pytest.raises(NumericalError, match="weight"):
        gptq(weight, factor, scheme, grid)
    hessian[3, 4] = poison
    with pytest.raises(NumericalError, match="Hessian"):
        factorize(hessian)


def test_hessians_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        factorize(torch.ones(3, 4))
    with pytest.raises(ValueError, match="at least 0"):
        factorize(torch.eye(3), damping=-0.1)


def forced_error(hessian: Tensor, column: int) -> float:
    """Least d H dᵀ with d[column] = 1 and everything else free, by least squares in fp64."""
    others = [i for i in range(len(hessian)) if i != column]
    h = hessian.double()
    best = -torch.linalg.solve(h[others][:, others], h[others, column])
    d = torch.zeros(len(h), dtype=torch.float64)
    d[column], d[others] = 1.0, best
    return float(d @ h @ d)


@pytest.mark.parametrize("act_order", [True, False])
def test_curvature_is_the_error_that_the_others_cannot_make_up_for(act_order: bool) -> None:
    hessian = second_moment(correlated_inputs(256, 24))
    hessian[5] = hessian[:, 5] = 0
    factor = factorize(hessian, damping=0.05, act_order=act_order)
    damped_hessian = damped(factor)
    found = factor.curvature()
    for column in (c for c in range(24) if c != 5):
        assert float(found[column]) == pytest.approx(forced_error(damped_hessian, column), rel=1e-4)
        assert found[column] <= damped_hessian[column, column] * (1 + 1e-5)  # alone it costs more
    assert found[5] == 0


def test_curvature_of_a_hessian_that_cannot_be_factorised_weighs_all_inputs_alike() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])) - 3 * torch.ones(4, 4)
    indefinite.diagonal().fill_(1.0)
    factor = factorize(indefinite)
    assert factor.failed
    assert torch.equal(factor.curvature(), torch.ones(4))


@pytest.mark.parametrize("width", [1, 255, 256, 600])
def test_a_triangle_is_inverted_panel_by_panel(width: int) -> None:
    lower = normal(width, width, seed=9).double().tril() / width**0.5
    lower.diagonal().add_(2)
    inverse = _inverse_lower(lower, torch.zeros_like(lower))
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse, torch.linalg.inv(lower), rtol=0, atol=1e-13)
    wrong = _inverse_lower(lower.T.contiguous(), torch.zeros_like(lower))
    assert width == 1 or (wrong - torch.linalg.inv(lower)).abs().max() > 1e-3
