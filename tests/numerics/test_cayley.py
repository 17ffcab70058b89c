"""Descent over orthogonal matrices."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.cayley import by_blocks, descent, through_grid, turned
from compressor.numerics.rtn import rtn
from compressor.types import WeightScheme


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_steps_stay_orthogonal_and_turn_by_the_angle() -> None:
    rotation = torch.linalg.qr(matrix(3, 8, 8))[0]
    direction = descent(rotation, matrix(3, 8, 8, seed=1))
    assert torch.allclose(direction, -direction.mT)
    after = turned(rotation, direction, 0.01)
    unit = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    assert (after @ after.mT - unit).abs().max() < 1e-14
    moved = (after - rotation).square().sum() / 24  # mean over channels of the squared arc
    assert float(moved.sqrt()) == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(turned(rotation, torch.zeros_like(rotation), 0.1), rotation)


def test_descent_finds_the_procrustes_rotation() -> None:
    """The orthogonal R nearest to M is U Vᵀ of its singular value decomposition."""
    wanted = torch.linalg.qr(matrix(6, 6))[0]
    wanted[0] *= wanted.det().sign()  # the Cayley transform reaches rotations only
    rotation = torch.eye(6, dtype=torch.float64)
    losses = []
    for step in range(400):
        free = rotation.clone().requires_grad_()
        loss = (free - wanted).square().sum()
        (gradient,) = torch.autograd.grad(loss, free)
        rotation = turned(rotation, descent(rotation, gradient), 0.05 * (1 - step / 400))
        losses.append(loss.item())
    assert losses[-1] < 1e-3 < losses[0]
    worse = turned(torch.eye(6).double(), -descent(torch.eye(6).double(), -2 * wanted), 0.05)
    assert (worse - wanted).square().sum() > losses[0]


def test_blocks_are_the_dense_block_diagonal_matrix() -> None:
    blocks, values = matrix(3, 4, 4), matrix(2, 5, 12, seed=1)
    assert torch.allclose(by_blocks(values, blocks), values @ torch.block_diag(*blocks))


def test_the_grid_is_that_of_the_rounder_and_its_gradient_that_of_the_scale() -> None:
    weight, scheme = matrix(6, 32).float(), WeightScheme(4, 16)
    free = weight.clone().requires_grad_()
    rounded = through_grid(free, scheme)
    plain = rtn(weight, scheme, search="minmax", scale_dtype=torch.float32).dequantize()
    assert torch.allclose(rounded, plain, atol=1e-6)
    (gradient,) = torch.autograd.grad(rounded.sum(), free)
    groups = weight.view(6, 2, 16)
    peaks = groups.abs().argmax(-1, keepdim=True)
    inner = torch.ones_like(groups).scatter(-1, peaks, 0.0).bool()
    assert torch.allclose(gradient.view(6, 2, 16)[inner], torch.tensor(1.0))
    # d ŵ / d s = code - w / s, and s follows the largest magnitude.
    steps = groups / (groups.abs().amax(-1, keepdim=True) / 7.5)
    codes = steps.round().clamp(-8, 7)
    slope = 1 + (codes - steps).sum(-1, keepdim=True) / 7.5 * groups.gather(-1, peaks).sign()
    assert torch.allclose(gradient.view(6, 2, 16).gather(-1, peaks), slope, atol=1e-4)
