"""Batches of matrices: every member comes out as it would alone."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.gptq import Asymmetry, GPTQOutcome, HessianFactor, factorize, gptq
from compressor.numerics.grid import Search, fit_grid
from compressor.numerics.hessian import relative_loss, relative_losses, row_losses, shrink
from compressor.types import WeightScheme

SCHEMES = {
    "symmetric": WeightScheme(4, 16),
    "full-range": WeightScheme(3, 16, "full_range"),
    "asymmetric": WeightScheme(2, 32, "asymmetric"),
    "channels": WeightScheme(4, None, "asymmetric"),
    "mxfp4": WeightScheme(4, 32, number="float", scales="e8m0"),
    "nvfp4": WeightScheme(4, 16, number="float", scales="e4m3"),
    "fp8-blocks": WeightScheme(8, 32, number="float", rows=4),
}
MEMBERS, OUT, WIDTH = 5, 24, 96
RAISED, HOPELESS, PARTLY_DEAD, DEAD = 0, 1, 2, 3
"""Members whose Hessian needs more damping, or has too little with any, and some without inputs."""


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [members, out, in] and Hessians [members, in, in]; only the last is nothing special.

    Inputs are as correlated as in real layers, and of other strengths in every member.
    """
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(MEMBERS, OUT, WIDTH, generator=random)
    mixed = torch.randn(MEMBERS, WIDTH, WIDTH, generator=random) * torch.logspace(0, -2, WIDTH)
    inputs = torch.randn(MEMBERS, 4 * WIDTH, WIDTH, generator=random) @ mixed.mT
    hessian = inputs.mT @ inputs / len(inputs[0])
    for member, product in ((RAISED, 1.05), (HOPELESS, 5.0)):
        hessian[member] = torch.eye(WIDTH)
        hessian[member, 0, 1] = hessian[member, 1, 0] = product
    hessian[PARTLY_DEAD, 7] = hessian[PARTLY_DEAD, :, 7] = 0
    hessian[DEAD] = 0
    return weight, (hessian + hessian.mT) / 2


def solved(
    weight: Tensor,
    hessian: Tensor,
    scheme: WeightScheme,
    *,
    search: Search = "imatrix",
    act_order: bool = True,
    sweeps: int = 2,
) -> tuple[HessianFactor, GPTQOutcome]:
    """A matrix, or a batch."""
    factor = factorize(hessian, damping=0.01, act_order=act_order)
    grid = fit_grid(weight, scheme, search=search, importance=factor.curvature(), hessian=hessian)
    return factor, gptq(weight, factor, scheme, grid, sweeps=sweeps, block_size=16)


@pytest.mark.parametrize("act_order", [True, False])
def test_members_are_factorised_as_they_would_be_alone(act_order: bool) -> None:
    _, hessian = problem()
    together = factorize(hessian, damping=1e-6, act_order=act_order)
    for i, moment in enumerate(hessian):
        alone = factorize(moment, damping=1e-6, act_order=act_order)
        for name, value in vars(alone).items():
            assert torch.equal(getattr(together, name)[i], value), (i, name)
        assert torch.equal(together.curvature()[i], alone.curvature())
    assert together.failed.tolist() == [i == HOPELESS for i in range(MEMBERS)]
    assert together.attempts.tolist() == [5, 6, 1, 1, 1]
    assert together.damping_used.tolist() == pytest.approx([0.1, 1.0, 1e-6, 1e-6, 1e-6])


@pytest.mark.parametrize("search", get_args(Search))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_grids_of_members_are_those_that_they_get_alone(
    scheme: WeightScheme, search: Search
) -> None:
    if search == "neuqi" and scheme.symmetry != "asymmetric":
        return
    weight, hessian = problem()
    importance = hessian.diagonal(dim1=1, dim2=2)
    together = fit_grid(weight, scheme, search=search, importance=importance, hessian=hessian)
    members = together.tensor(torch.zeros_like(weight, dtype=torch.int8), scheme).members()
    for member, one, moment in zip(members, weight, hessian, strict=True):
        alone = fit_grid(
            one, scheme, search=search, importance=moment.diagonal(), hessian=moment
        )  # fmt: skip
        assert torch.equal(member.scale, alone.scale)
        for theirs, own in ((member.zero_point, alone.zero_point), (member.divisor, alone.divisor)):
            assert (theirs is None) == (own is None)
            assert theirs is None or own is None or torch.equal(theirs, own)


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_members_are_solved_as_they_would_be_alone(
    scheme: WeightScheme, act_order: bool, sweeps: int
) -> None:
    weight, hessian = problem()
    _, together = solved(weight, hessian, scheme, act_order=act_order, sweeps=sweeps)
    assert (together.row_loss <= together.nearest_row_loss).all()
    for i, member in enumerate(together.quantized.members()):
        _, alone = solved(weight[i], hessian[i], scheme, act_order=act_order, sweeps=sweeps)
        # Products sum in another order: a weight between two codes may go to the other one.
        rows = (member.codes == alone.quantized.codes).all(1)
        assert rows.float().mean() > 0.9, i
        torch.testing.assert_close(together.row_loss[i][rows], alone.row_loss[rows])
        torch.testing.assert_close(
            together.row_loss[i].sum(), alone.row_loss.sum(), rtol=0.01, atol=0
        )
        dense = member.dequantize()
        assert torch.equal(together.quantized.dequantize()[i], dense)
        assert torch.equal(dense[rows], alone.quantized.dequantize()[rows])


def test_a_member_that_fails_is_rounded_to_nearest_and_its_neighbours_are_not() -> None:
    weight, hessian = problem()
    scheme = SCHEMES["symmetric"]
    factor, outcome = solved(weight, hessian, scheme)
    near = outcome.row_loss == outcome.nearest_row_loss
    assert factor.failed.nonzero().flatten().tolist() == [HOPELESS]
    assert near[HOPELESS].all()
    assert not near[-1].any()
    good = [i for i in range(MEMBERS) if i != HOPELESS]
    _, without = solved(weight[good], hessian[good], scheme)
    assert torch.equal(outcome.quantized.codes[good], without.quantized.codes)


def test_a_batch_answers_drift_too() -> None:
    weight, hessian = problem()
    scheme, factor = SCHEMES["symmetric"], factorize(hessian)
    random = torch.Generator().manual_seed(1)
    pull = torch.randn(hessian.shape, generator=random).triu(1) / WIDTH
    target = weight + 0.1 * torch.randn(weight.shape, generator=random)
    grid = fit_grid(weight, scheme)
    together = gptq(weight, factor, scheme, grid, sweeps=1, asymmetry=Asymmetry(pull, target))
    for i, member in enumerate(together.quantized.members()):
        alone = gptq(
            weight[i],
            factorize(hessian[i]),
            scheme,
            fit_grid(weight[i], scheme),
            sweeps=1,
            asymmetry=Asymmetry(pull[i], target[i]),
        )
        assert (member.codes == alone.quantized.codes).all(1).float().mean() > 0.9


def test_the_same_batch_gives_the_same_bits() -> None:
    weight, hessian = problem()
    first, second = (solved(weight, hessian, SCHEMES["asymmetric"])[1] for _ in range(2))
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(first.quantized, name), getattr(second.quantized, name))
    assert torch.equal(first.row_loss, second.row_loss)


def test_losses_of_members_are_their_own() -> None:
    weight, hessian = problem()
    rounded = weight.round()
    (together,) = relative_losses(weight, [rounded], hessian)
    for i in range(MEMBERS):
        rows = row_losses((weight - rounded)[i], hessian[i])
        torch.testing.assert_close(row_losses(weight - rounded, hessian)[i], rows)
        assert float(together[i]) == pytest.approx(relative_loss(weight[i], rounded[i], hessian[i]))
        assert torch.equal(shrink(hessian, 0.3)[i], shrink(hessian[i], 0.3))
    assert together[DEAD] == 0


def test_rows_of_a_batch_are_rows_of_its_members() -> None:
    weight, hessian = problem()
    for scheme in (SCHEMES["fp8-blocks"], SCHEMES["nvfp4"], SCHEMES["asymmetric"]):
        whole = solved(weight, hessian, scheme, sweeps=0)[1].quantized
        dense = whole.dequantize()
        for start, stop in ((0, 8), (8, OUT)):
            part = whole.rows(start, stop)
            assert torch.equal(part.dequantize(), dense[:, start:stop])
            parts = [member.rows(start, stop).dequantize() for member in whole.members()]
            assert torch.equal(part.dequantize(), torch.stack(parts))
        (only,) = whole.members()[0].members()
        assert torch.equal(only.codes, whole.codes[0])


def test_numbers_that_are_not_finite_are_refused_in_any_member() -> None:
    weight, hessian = problem()
    factor, scheme = factorize(hessian), SCHEMES["symmetric"]
    grid = fit_grid(weight, scheme)
    hessian[2, 3, 4] = float("nan")
    with pytest.raises(NumericalError, match="Hessian"):
        factorize(hessian)
    weight[4, 1, 2] = float("inf")
    with pytest.raises(NumericalError, match="weight"):
        gptq(weight, replace(factor, hessian=hessian), scheme, grid)
