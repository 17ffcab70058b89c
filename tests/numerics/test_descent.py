from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.numerics.descent import coordinate_descent
from compressor.numerics.gptq import factorize, gptq
from compressor.numerics.grid import fit_grid
from compressor.numerics.rtn import rtn
from compressor.types import QTensor, WeightScheme

SYMMETRIES = ("symmetric", "full_range", "asymmetric")


def problem(symmetry: str = "symmetric", width: int = 48) -> tuple[Tensor, Tensor, QTensor]:
    """A matrix, a damped Hessian and where to start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, width, generator=generator)
    spread = torch.logspace(0, -1.5, width)
    inputs = torch.randn(300, width, generator=generator) * spread
    inputs = inputs @ torch.randn(width, width, generator=generator)
    hessian = 2 / 300 * inputs.T @ inputs
    hessian = (hessian + hessian.T) / 2 + 0.01 * hessian.diagonal().mean() * torch.eye(width)
    scheme = WeightScheme(3, 16, symmetry)  # type: ignore[arg-type]
    return weight, hessian, rtn(weight, scheme, search="mse")


def losses(weight: Tensor, quantized: QTensor, hessian: Tensor) -> Tensor:
    d = weight.double() - quantized.dequantize().double()
    return ((d @ hessian.double()) * d).sum(1)


def one_by_one(weight: Tensor, start: QTensor, hessian: Tensor, order: list[int]) -> QTensor:
    """One sweep in fp64: each code becomes the best one for its row, found by trying them all."""
    codes, (lowest, highest) = start.codes.clone(), start.scheme.code_range
    for j in order:
        trials = []
        for code in range(lowest, highest + 1):
            trial = codes.clone()
            trial[:, j] = code
            trials.append(losses(weight, with_codes(start, trial), hessian))
        codes[:, j] = (torch.stack(trials).argmin(0) + lowest).to(torch.int8)
    return with_codes(start, codes)


def with_codes(quantized: QTensor, codes: Tensor) -> QTensor:
    return QTensor(codes, quantized.scale, quantized.zero_point, quantized.scheme)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("block_size", [1, 10, 64])
def test_a_sweep_makes_every_code_the_best_for_its_row(symmetry: str, block_size: int) -> None:
    weight, hessian, start = problem(symmetry)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    expected = one_by_one(weight, start, hessian, order.tolist())
    swept = coordinate_descent(weight, start, hessian, order=order, sweeps=1, block_size=block_size)
    assert torch.equal(swept.codes, expected.codes)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_no_sweep_raises_the_loss_of_a_row(symmetry: str) -> None:
    weight, hessian, start = problem(symmetry)
    order, before = torch.arange(48), losses(weight, start, hessian)
    for sweeps in range(1, 6):
        swept = coordinate_descent(weight, start, hessian, order=order, sweeps=sweeps)
        after = losses(weight, swept, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.6 * losses(weight, start, hessian).sum()


def test_the_end_is_a_fixed_point() -> None:
    weight, hessian, start = problem()
    order = torch.arange(48)
    end = coordinate_descent(weight, start, hessian, order=order, sweeps=50)
    again = coordinate_descent(weight, end, hessian, order=order, sweeps=1)
    assert torch.equal(end.codes, again.codes)
    assert torch.equal(end.codes, one_by_one(weight, end, hessian, order.tolist()).codes)


def test_the_start_is_left_as_it_was() -> None:
    weight, hessian, start = problem()
    before = start.codes.clone(), hessian.clone()
    coordinate_descent(weight, start, hessian, order=torch.arange(48), sweeps=1)
    assert torch.equal(start.codes, before[0])
    assert torch.equal(hessian, before[1])


def test_sweeps_improve_on_gptq() -> None:
    weight, hessian, _ = problem(width=128)
    scheme = WeightScheme(3, 32, "full_range")
    factor, grid = factorize(hessian), fit_grid(weight, scheme)
    plain, swept = (gptq(weight, factor, scheme, grid, sweeps=n) for n in (0, 2))
    assert swept.row_loss.sum() < 0.97 * plain.row_loss.sum()
    assert (swept.row_loss <= swept.nearest_row_loss).all()


def test_sweeps_leave_dead_inputs_at_the_nearest_code() -> None:
    weight, hessian, _ = problem()
    hessian[[3, 40]] = 0
    hessian[:, [3, 40]] = 0
    scheme = WeightScheme(3, None, "symmetric")
    grid = fit_grid(weight, scheme)
    codes = gptq(weight, factorize(hessian), scheme, grid, sweeps=3).quantized.codes
    assert torch.equal(codes[:, [3, 40]], rtn(weight, scheme, search="mse").codes[:, [3, 40]])


def test_sweeps_do_not_touch_a_failed_factorisation() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 5.0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(4, 16, "symmetric")
    grid, factor = fit_grid(weight, scheme), factorize(hessian)
    outcome = gptq(weight, factor, scheme, grid, sweeps=2)
    assert factor.failed
    assert torch.equal(outcome.quantized.codes, rtn(weight, scheme, search="mse").codes)
