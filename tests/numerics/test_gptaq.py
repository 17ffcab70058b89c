"""GPTAQ against column-by-column least squares on the inputs themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.numerics.gptq import Asymmetry, GPTQOutcome, factorize, gptq
from compressor.numerics.grid import Grid, fit_grid
from compressor.numerics.propagation import forward_pull, propagated_target
from compressor.types import WeightScheme
from tests.numerics.test_gptq import normal
from tests.numerics.test_propagation import error, moments, streams

SCHEME = WeightScheme(3, 16)


def solve(
    weight: Tensor,
    original: Tensor,
    rounded: Tensor,
    share: float,
    *,
    damping: float = 0.05,
    sweeps: int = 0,
    block_size: int = 32,
) -> GPTQOutcome:
    hessian, drift = moments(original, rounded)
    factor = factorize(hessian, damping=damping)
    asymmetry = Asymmetry(
        forward_pull(factor, drift, share=share),
        propagated_target(weight, factor, drift, share=share),
    )
    grid = fit_grid(weight, SCHEME, search="minmax", scale_dtype=torch.float32)
    return gptq(
        weight,
        factor,
        SCHEME,
        grid,
        asymmetry=asymmetry,
        sweeps=sweeps,
        block_size=block_size,
    )


def column_by_column(
    weight: Tensor, grid: Grid, original: Tensor, rounded: Tensor, share: float, damping: float
) -> Tensor:
    """Codes by definition, fp64: round a column, refit all open ones, go on.

    Each refit is one orthogonal factorisation: no moment, no inverse, no Cholesky factor.
    """
    x, y, w = original.double(), rounded.double(), weight.double().clone()
    energy = y.square().sum(0)
    pull = (damping * energy.mean()).sqrt()
    scale = grid.scale.double().repeat_interleave(16, 1)
    codes = torch.zeros_like(w)
    open_columns = torch.argsort(energy, descending=True, stable=True).tolist()
    while open_columns:
        q = open_columns.pop(0)
        codes[:, q] = (w[:, q] / scale[:, q]).round().clamp(-4, 3)
        if not open_columns:
            break
        lost = w[:, q] - codes[:, q] * scale[:, q]
        wanted = torch.outer(y[:, q], lost) + share * torch.outer(x[:, q] - y[:, q], w[:, q])
        rows = torch.cat([y[:, open_columns], pull * torch.eye(len(open_columns)).double()])
        wanted = torch.cat([wanted, torch.zeros(len(open_columns), len(w)).double()])
        w[:, open_columns] += torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    return codes.to(torch.int8)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_codes_are_those_of_the_definition(share: float, block_size: int) -> None:
    weight = normal(12, 48)
    original, rounded = streams(300, 48, 0.2)
    grid = fit_grid(weight, SCHEME, search="minmax", scale_dtype=torch.float32)
    outcome = solve(weight, original, rounded, share, block_size=block_size)
    expected = column_by_column(weight, grid, original, rounded, share, 0.05)
    assert outcome.nearest_rows == 0
    assert torch.equal(outcome.quantized.codes, expected)
    without = column_by_column(weight, grid, original, rounded, 0.0, 0.05)
    assert (without != expected).float().mean() > 0.02


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_pull_is_least_squares_over_the_open_columns(damping: float) -> None:
    hessian, drift = moments(*streams(200, 24, 0.3))
    factor = factorize(hessian, damping=damping)
    order = factor.permutation
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(24)
    pull = forward_pull(factor, drift, share=0.5).double()
    assert (pull.tril() == 0).all()
    for q in range(23):
        still_open = order[q + 1 :]
        block = damped[still_open][:, still_open]
        exact = torch.linalg.solve(block, 0.5 * drift.double()[order[q], still_open])
        torch.testing.assert_close(pull[q, q + 1 :], exact, rtol=1e-3, atol=1e-5)


def test_streams_that_agree_leave_plain_gptq() -> None:
    weight = normal(8, 48)
    _, rounded = streams(200, 48, 0.2)
    plain = gptq(
        weight,
        factorize(moments(rounded, rounded)[0], damping=0.05),
        SCHEME,
        fit_grid(weight, SCHEME, search="minmax", scale_dtype=torch.float32),
    )
    outcome = solve(weight, rounded, rounded, 1.0)
    assert torch.equal(outcome.quantized.codes, plain.quantized.codes)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_it_comes_closer_to_the_outputs_of_the_original(sweeps: int) -> None:
    """‖W X - Ŵ X̃‖² on the text and on other text, and sweeps go on from there."""
    weight = normal(32, 64)
    original, rounded = (stream.split(400) for stream in streams(800, 64, 0.3))
    errors = {}
    for share in (0.0, 1.0):
        outcome = solve(weight, original[0], rounded[0], share, sweeps=sweeps)
        dense = outcome.quantized.dequantize()
        errors[share] = [error(weight, dense, x, y) for x, y in zip(original, rounded, strict=True)]
    assert errors[1.0][0] < 0.8 * errors[0.0][0]
    assert errors[1.0][1] < 0.9 * errors[0.0][1]


def test_sweeps_lower_the_loss_about_the_target() -> None:
    weight = normal(16, 64)
    original, rounded = streams(300, 64, 0.3)
    losses = [
        float(solve(weight, original, rounded, 0.5, sweeps=sweeps).row_loss.sum())
        for sweeps in (0, 1, 3)
    ]
    assert losses[2] <= losses[1] < losses[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_row_is_worse_than_rounded_to_nearest(seed: int) -> None:
    """Under the loss about its own target, few tokens and large drifts included."""
    outcome = solve(normal(24, 48, seed=seed), *streams(30, 48, 1.0, seed), 1.0)
    assert (outcome.row_loss <= outcome.nearest_row_loss).all()


def test_a_failed_factor_rounds_to_nearest() -> None:
    weight = normal(4, 32)
    hessian, drift = moments(*streams(100, 32, 0.2))
    factor = replace(factorize(hessian), failed=True)
    assert not forward_pull(factor, drift, share=1.0).any()
    assert torch.equal(propagated_target(weight, factor, drift, share=1.0), weight)


def test_the_same_twice() -> None:
    weight, (original, rounded) = normal(8, 48), streams(100, 48, 0.2)
    one, other = (solve(weight, original, rounded, 0.25, sweeps=1) for _ in range(2))
    assert torch.equal(one.quantized.codes, other.quantized.codes)
