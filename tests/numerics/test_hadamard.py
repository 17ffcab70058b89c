"""Rotations against their definition, scipy's Hadamard matrices and dense products."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from compressor.numerics.hadamard import Rotation, hadamard_factors, paley, random_rotation
from compressor.numerics.hadamard_orders import field_order, hadamard_block, hadamard_split

PALEY = (12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 140, 180)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def require_orthogonal(matrix: Tensor) -> None:
    unit = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", PALEY)
def test_paley_matrices_have_entries_of_one_and_orthogonal_rows(order: int) -> None:
    matrix = paley(order)
    assert set(matrix.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_both_constructions_and_fields_of_squared_order_are_used() -> None:
    assert field_order(12) == (11, 1)
    assert field_order(36) == (17, 2)
    assert field_order(52) == (25, 2)
    assert field_order(100) == (49, 2)
    assert field_order(92) is None  # exists (Baumert 1962), but not by Paley


@pytest.mark.parametrize("order", [2, 6, 30, 92, 116, 7])
def test_an_order_that_cannot_be_built_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=str(order)):
        paley(order)


@pytest.mark.parametrize("size", [1, 2, 4, 64, 256])
def test_powers_of_two_are_sylvesters(size: int) -> None:
    ours = Rotation(torch.ones(size, dtype=torch.float64), hadamard_factors(size)).dense()
    expected = torch.from_numpy(hadamard(size)).double() / sqrt(size)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "split"),
    [
        (64, (1, 64)),
        (40, (20, 2)),
        (320, (20, 16)),
        (576, (36, 16)),
        (896, (28, 32)),
        (960, (60, 16)),
        (2880, (180, 16)),
        (3584, (28, 128)),
        (5120, (20, 256)),
        (5376, (84, 64)),
        (92, None),
        (6, None),
    ],
)
def test_sizes_split_into_a_known_order_and_a_power_of_two(size, split) -> None:
    assert hadamard_split(size) == split


@pytest.mark.parametrize(
    ("size", "block"), [(576, 576), (320, 320), (184, 8), (92, 4), (48, 48), (6, 2), (7, 1)]
)
def test_the_largest_hadamard_size_that_divides_is_chosen(size: int, block: int) -> None:
    assert hadamard_block(size) == block
    rotation = random_rotation(size, 0)
    assert (rotation.size, rotation.block) == (size, block)
    dense = rotation.dense()
    require_orthogonal(dense)
    inside = torch.block_diag(*[torch.ones(block, block)] * (size // block)).bool()
    torch.testing.assert_close(
        dense.abs()[inside], torch.full_like(dense[inside], 1 / sqrt(block)), rtol=1e-12, atol=0
    )
    assert not dense[~inside].any()


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        hadamard_block(0)
    with pytest.raises(ValueError, match="order 6"):
        hadamard_factors(6)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 400),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(["hadamard", "orthogonal"]),
)
def test_fast_products_are_the_dense_ones(size, seed, kind) -> None:
    rotation = random_rotation(size, seed, kind)
    dense = torch.block_diag(
        *[_kronecker(rotation.factors)] * (size // rotation.block)
    ) * rotation.signs.unsqueeze(1)
    require_orthogonal(dense)
    x, y = normal(3, 2, size), normal(2, size, 3)
    torch.testing.assert_close(rotation.right(x), x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.left(y), dense.T @ y, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.right(x.float()), x.float().double() @ dense)
    assert rotation.right(x[0, 0]).shape == (size,)


def _kronecker(factors: tuple[Tensor, ...]) -> Tensor:
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_seed_decides(kind) -> None:
    first, again, other = (random_rotation(96, seed, kind).dense() for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.05


def test_uniform_rotations_have_the_moments_of_haar_measure() -> None:
    # E[Q_ij²] = 1/n, E[tr Q] = 0 and E[(tr Q)²] = 1 for Haar-distributed Q; LAPACK's Q without
    # the sign correction has a diagonal of one sign.
    draws = torch.stack([random_rotation(4, seed, "orthogonal").dense() for seed in range(2000)])
    traces = draws.diagonal(dim1=1, dim2=2).sum(1)
    assert float(traces.mean()) == pytest.approx(0, abs=0.1)
    assert float(traces.square().mean()) == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(
        draws.square().mean(0), torch.full((4, 4), 0.25).double(), rtol=0, atol=0.03
    )


@pytest.mark.parametrize("size", [64, 320, 576])
def test_one_outlier_is_spread_perfectly_evenly(size: int) -> None:
    spike = torch.zeros(size, dtype=torch.float64)
    spike[3] = 100.0
    spread = random_rotation(size, 1).right(spike).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, 100 / sqrt(size)))
