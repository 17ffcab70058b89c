from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics import hessian as hessian_module
from compressor.numerics.hessian import (
    DiagonalAccumulator,
    HessianAccumulator,
    exact_products,
    full_precision,
    pieces,
    relative_loss,
    relative_losses,
    row_losses,
)


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing


def accumulated(*batches: Tensor) -> HessianAccumulator:
    accumulator = HessianAccumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.add(batch)
    return accumulator


@pytest.mark.parametrize("block", [16, 50, 64, 256])
def test_matrix_is_twice_the_second_moment(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "_BLOCK", block)
    x = inputs(300, 100)
    accumulator = accumulated(*x.split(70))
    expected = 2 / 300 * x.T @ x
    assert accumulator.tokens == 300
    assert accumulator.matrix().dtype == torch.float32
    torch.testing.assert_close(
        accumulator.matrix().double(), expected, rtol=0, atol=1e-6 * expected.max().item()
    )
    torch.testing.assert_close(
        accumulator.diagonal().double(), expected.diagonal(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("block", [32, 256])
def test_the_lower_half_mirrors_the_upper(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "_BLOCK", block)
    accumulator = accumulated(inputs(200, 300))
    upper = accumulator._sum.triu()
    assert torch.equal(accumulator.matrix(), (upper + upper.triu(1).T) * (2 / 200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_only_the_order_of_sums(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (inputs(2048, 96) / 10).to(dtype)
    assert [len(piece) for piece in pieces(x, torch.device("cpu"))] == [512] * 4
    assert [len(piece) for piece in pieces(x, torch.device("meta"))] == [2048]
    cut = accumulated(x)
    monkeypatch.setattr(hessian_module, "pieces", lambda rows, _: (rows,))
    whole = accumulated(x).matrix()
    assert cut.tokens == 2048
    torch.testing.assert_close(cut.matrix(), whole, rtol=0, atol=1e-6 * float(whole.max()))


def test_losses_of_one_weight_are_those_of_each() -> None:
    random = torch.Generator().manual_seed(3)
    weight, *others = torch.randn(3, 20, 32, generator=random)
    hessian = accumulated(inputs(100, 32)).matrix()
    for moment in (hessian, None):
        together = relative_losses(weight, others, moment)
        assert together == [relative_loss(weight, other, moment) for other in others]
        assert together[0] != together[1]
    nothing = torch.zeros(2, 32)
    assert relative_losses(nothing, [nothing, others[0][:2]], None) == [0.0, float("inf")]


def test_matrix_is_exactly_symmetric_and_repeatable() -> None:
    x = inputs(500, 300)
    first, second = (accumulated(*x.split(128)).matrix() for _ in range(2))
    assert torch.equal(first, first.T)
    assert torch.equal(first, second)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    x = inputs(4096, 16).bfloat16()
    expected = 2 / 4096 * x.double().T @ x.double()
    error = (accumulated(*x.split(64)).matrix().double() - expected).abs().max() / expected.max()
    assert error < 1e-6


@pytest.mark.parametrize("kind", [HessianAccumulator, DiagonalAccumulator])
def test_merged_domains_equal_one_pass(kind: type) -> None:
    x = inputs(200, 32)
    one, left, right = kind(32), kind(32), kind(32)
    one.add(x)
    left.add(x[:50])
    right.add(x[50:])
    left.merge(right)
    assert left.tokens == 200
    torch.testing.assert_close(left.diagonal(), one.diagonal())


def test_diagonal_alone_is_the_diagonal_of_the_matrix() -> None:
    x = inputs(200, 32)
    alone = DiagonalAccumulator(32)
    alone.add(x)
    torch.testing.assert_close(alone.diagonal(), accumulated(x).matrix().diagonal())


@pytest.mark.parametrize("kind", [HessianAccumulator, DiagonalAccumulator])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e25])
def test_inputs_that_are_no_numbers_are_refused(kind: type, poison: float) -> None:
    x = inputs(20, 8)
    x[3, 5] = poison
    with pytest.raises(NumericalError, match="inputs"):
        kind(8).add(x)


@pytest.mark.parametrize("kind", [HessianAccumulator, DiagonalAccumulator])
def test_statistics_of_nothing_are_refused(kind: type) -> None:
    with pytest.raises(NumericalError, match="no calibration token"):
        kind(8).diagonal()


@pytest.mark.parametrize(
    ("context", "inside"),
    [
        (full_precision, "highest"),
        (lambda: exact_products(torch.bfloat16), "medium"),
        (lambda: exact_products(torch.float16), "highest"),
        (lambda: exact_products(torch.float32), "highest"),
    ],
)
def test_precision_is_restored(context: Callable[[], Any], inside: str) -> None:
    def fail_inside() -> None:
        with context():
            assert torch.get_float32_matmul_precision() == inside
            raise RuntimeError("inside")

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("width", [40, 256, 300])
def test_losses_are_squared_output_errors(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = inputs(400, width)
    weight = torch.randn(24, width, generator=generator)
    rounded = (weight * 4).round() / 4
    hessian = accumulated(x).matrix()
    lost = ((weight - rounded).double() @ x.T).square().sum(1)
    kept = (weight.double() @ x.T).square().sum()
    losses = row_losses(weight - rounded, hessian)
    torch.testing.assert_close(losses.double(), 2 / 400 * lost, rtol=1e-4, atol=0)
    ratio = relative_loss(weight, rounded.bfloat16(), hessian)
    assert ratio == pytest.approx((lost.sum() / kept).item(), rel=1e-4)


def test_relative_loss_of_edge_cases() -> None:
    weight, hessian = torch.ones(2, 3), torch.eye(3)
    assert relative_loss(weight, weight, hessian) == 0
    assert relative_loss(weight, torch.zeros(2, 3), hessian) == 1
    assert relative_loss(torch.zeros(2, 3), torch.zeros(2, 3), hessian) == 0
    assert relative_loss(torch.zeros(2, 3), weight, hessian) == float("inf")
