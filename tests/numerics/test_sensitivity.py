"""Predicted losses: exact where the theory is, and close to what GPTQ then does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.numerics.gptq import factorize, gptq
from compressor.numerics.grid import fit_grid
from compressor.numerics.hessian import row_losses
from compressor.numerics.rtn import rtn
from compressor.numerics.sensitivity import (
    Metric,
    compensated,
    head_losses,
    lookup_losses,
    proportional_rows,
    rounding_errors,
    rounding_losses,
    token_shares,
)
from compressor.types import WeightScheme

GRIDS = (WeightScheme(2, 32), WeightScheme(3, 32), WeightScheme(4, 64), WeightScheme(8, None))


def layer(out: int = 48, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the second moment of correlated inputs, and weights of the rows."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=random) / 8 + torch.eye(width)
    inputs = torch.randn(4000, width, generator=random) @ mix * torch.linspace(0.2, 3, width)
    weight = torch.randn(out, width, generator=random)
    return weight, inputs.T @ inputs / 4000, torch.rand(out, generator=random) ** 3


def test_all_rows_and_nearest_codes_give_the_exact_quadratic_form() -> None:
    weight, moment, gamma = layer()
    found = rounding_losses(
        weight, GRIDS, gamma, Metric(moment), rows=48, scale_dtype=torch.float32
    )
    for scheme, loss in zip(GRIDS, found, strict=True):
        rounded = rtn(weight, scheme, search="mse", scale_dtype=torch.float32).dequantize()
        error = (weight - rounded).double()
        exact = 0.5 * (gamma.double() * ((error @ moment.double()) * error).sum(1)).sum()
        assert loss == pytest.approx(float(exact), rel=1e-4)
    assert found == sorted(found, reverse=True)


def test_the_form_is_the_divergence_of_a_softmax_to_second_order() -> None:
    """A model that is one linear layer: KL(p ‖ q) of its outputs against ½ Σ γ_r e_r H e_rᵀ."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 16, generator=random).double() / 8
    inputs = torch.randn(20_000, 16, generator=random).double()
    before = torch.log_softmax(inputs @ weight.T, -1)
    gamma = (before.exp() * (1 - before.exp())).mean(0)  # E[(∂ log p(y) / ∂ o)²]
    moment = inputs.T @ inputs / len(inputs)
    scheme = WeightScheme(5, 16)
    (loss,) = rounding_losses(
        weight, [scheme], gamma, Metric(moment), rows=40, scale_dtype=torch.float32
    )
    rounded = rtn(weight, scheme, search="mse", scale_dtype=torch.float32).dequantize().double()
    after = torch.log_softmax(inputs @ rounded.T, -1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert loss == pytest.approx(divergence, rel=0.1)


def test_costs_of_columns_are_those_of_the_ldl_decomposition() -> None:
    _, moment, _ = layer()
    order = factorize(moment, damping=1e-6).permutation
    reverse = moment.double()[order][:, order].flip(0, 1)  # H = L D Lᵀ from the last column up
    lower = torch.linalg.cholesky(reverse)
    diagonal = lower.diagonal().square().flip(0)
    found = compensated(moment, damping=1e-6).cost
    assert torch.allclose(found[order].double(), diagonal, rtol=1e-3)
    assert (found <= moment.diagonal() * (1 + 1e-5)).all()


def test_dead_inputs_cost_nothing() -> None:
    """Nor does an error that only damping makes up for."""
    _, moment, _ = layer()
    moment[7] = moment[:, 7] = 0
    found = compensated(moment, damping=0.1).cost
    assert found[7] == 0
    assert (found[torch.arange(64) != 7] > 0).all()


@pytest.mark.parametrize("damping", [0.01, 0.1])
@pytest.mark.parametrize("inputs", ["even", "log-normal", "outliers"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_compensation_is_predicted_within_a_fifth(bits: int, inputs: str, damping: float) -> None:
    """Also where some inputs are far larger than others, and damping far more than the least."""
    weight, moment, _ = layer(out=256)
    random = torch.Generator().manual_seed(3)
    sizes = {
        "even": torch.ones(64),
        "log-normal": torch.exp(1.2 * torch.randn(64, generator=random)),
        "outliers": torch.where(torch.arange(64) % 16 == 0, 30.0, 1.0),
    }[inputs]
    moment = sizes[:, None] * moment * sizes
    scheme = WeightScheme(bits, 32)
    nearest, expected = (
        rounding_losses(
            weight, [scheme], torch.ones(256), metric, rows=256, scale_dtype=torch.float32
        )[0]
        for metric in (Metric(moment), compensated(moment, damping=damping))
    )
    factor = factorize(moment, damping=damping)
    importance = factor.curvature()
    grid = fit_grid(
        weight, scheme, search="imatrix", importance=importance, scale_dtype=torch.float32
    )
    solved = gptq(weight, factor, scheme, grid).quantized.dequantize()
    actual = 0.5 * float(row_losses(weight - solved, moment).sum())
    assert expected == pytest.approx(actual, rel=0.2)
    assert actual < 0.75 * nearest


def test_some_rows_stand_for_all() -> None:
    weight, moment, _ = layer(out=2048)
    metric = Metric(moment)
    gamma = torch.linspace(0, 1, 2048) ** 2
    all_rows, some = (
        rounding_losses(weight, GRIDS, gamma, metric, rows=rows, scale_dtype=torch.bfloat16)
        for rows in (2048, 128)
    )
    assert some == pytest.approx(all_rows, rel=0.06)
    nothing = rounding_losses(weight, GRIDS, gamma * 0, metric, rows=128, scale_dtype=torch.float32)
    assert nothing == [0.0] * 4


def test_tokens_that_were_not_seen_share_what_those_seen_once_have() -> None:
    shares = token_shares(torch.tensor([5, 1, 1, 0, 0, 3]))
    assert float(shares.sum()) == pytest.approx(1)
    assert shares[3] == shares[4] == pytest.approx(2 / 11 / 2)
    assert float(shares[0] / shares[5]) == pytest.approx(5 / 3)
    assert torch.allclose(token_shares(torch.tensor([1, 3])), torch.tensor([0.25, 0.75]).double())
    assert (token_shares(torch.tensor([9, 0])) > 0).all()  # a floor also where nothing is rare


def test_rows_drawn_by_size_stand_for_all() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = 1 / torch.arange(1, 3001).double()  # Zipf
    drawn, stands_for = proportional_rows(sizes, 200)
    assert len(drawn) == 200
    assert torch.equal(drawn[:20], torch.arange(20))  # the frequent ones are sure
    assert (stands_for[:20] == 1).all()
    assert float((sizes[drawn] * stands_for).sum()) == pytest.approx(float(sizes.sum()), rel=0.01)
    other = sizes * (0.5 + torch.rand(3000, generator=random, dtype=torch.float64))
    assert float((other[drawn] * stands_for).sum()) == pytest.approx(float(other.sum()), rel=0.05)
    few, once = proportional_rows(sizes[:50], 200)
    assert torch.equal(few, torch.arange(50))
    assert (once == 1).all()


def test_losses_of_a_head_are_its_divergence_to_second_order() -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 16, generator=random) / 2
    inputs = torch.randn(5000, 16, generator=random)
    before = torch.log_softmax((inputs @ weight.T).double(), -1)
    scheme = WeightScheme(6, 16)
    (error,) = rounding_errors(weight, [scheme], torch.float32)
    rounded = rtn(weight, scheme, search="mse", scale_dtype=torch.float32).dequantize()
    assert torch.allclose(weight - rounded, error)
    loss = head_losses(error, inputs, before.exp()).sum() / len(inputs)
    after = torch.log_softmax((inputs @ rounded.T).double(), -1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert float(loss) == pytest.approx(float(divergence), rel=0.1)


def test_losses_of_lookups_are_the_quadratic_form_of_the_tokens_seen() -> None:
    """A table of which every token looks up one row; gradients do not depend on the token."""
    random = torch.Generator().manual_seed(2)
    error = torch.randn(12, 8, generator=random) / 10
    gradients = torch.randn(60_000, 8, generator=random) @ torch.randn(8, 8, generator=random)
    tokens = torch.multinomial(torch.arange(1.0, 13), 60_000, True, generator=random)
    exact = 0.5 * (gradients * error[tokens]).sum(1).double().square().mean()
    shares = tokens.bincount(minlength=12) / len(tokens)
    moment = gradients.T @ gradients / len(gradients)
    losses = lookup_losses(error, moment, shares)
    assert float(losses.sum()) == pytest.approx(float(exact), rel=0.03)
    alike = lookup_losses(error, moment, torch.full((12,), 1 / 12))
    assert float(alike.sum()) != pytest.approx(float(exact), rel=0.06)
