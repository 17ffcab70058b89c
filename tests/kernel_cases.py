"""Kernels beside the loops that they stand for, by Triton's interpreter or on CUDA.

Run by tests/numerics/test_kernels.py in a process of its own: Triton is told to interpret before
it is imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compressor.numerics import columns as loops
from compressor.numerics import kernels
from compressor.numerics.grid import fit_grid
from compressor.types import WeightScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = {
    "symmetric": WeightScheme(4, 16, "symmetric"),
    "full-range": WeightScheme(3, 16, "full_range"),
    "asymmetric": WeightScheme(2, 16, "asymmetric"),
    "wide": WeightScheme(8, 16, "symmetric"),
    "fp4": WeightScheme(4, 16, number="float"),
    "fp8": WeightScheme(8, 16, number="float"),
}


def leaves(
    scheme: WeightScheme, stored: torch.dtype, shape: tuple[int, ...], count: int
) -> tuple[loops.Leaf, loops.Points]:
    """The same columns, in the order that permutations give, for the loop and for the kernel."""
    torch.manual_seed(shape[-1] + count)
    weight = torch.randn(*shape, 128)
    grid = fit_grid(weight, scheme, search="minmax", scale_dtype=stored)
    order = torch.rand(*shape[:-1], 128).argsort()
    loop = loops.GridColumns(grid, scheme, order).leaf(8, 8 + count)
    there = loop.points()
    return loop, replace(
        there,
        scale=there.scale.to(DEVICE),
        zero=None if there.zero is None else there.zero.to(DEVICE),
        steps=torch.full_like(there.scale, torch.nan, device=DEVICE),
    )


def settled(
    points: loops.Points, columns: torch.Tensor, pull: torch.Tensor, **others: torch.Tensor | None
) -> torch.Tensor:
    """What the kernel makes of tensors that are on the processor; `met` is filled."""
    names = ("aim", "old", "drift", "met")
    given = {name: others.get(name) for name in names}
    moved = {name: None if one is None else one.to(DEVICE) for name, one in given.items()}
    errors = kernels.settle(columns.to(DEVICE, copy=True), pull.to(DEVICE), points, **moved).cpu()
    met = given["met"]
    if met is not None and moved["met"] is not None:
        met.copy_(moved["met"])
    return errors


@pytest.mark.parametrize("variant", ["plain", "revisited", "drifted"])
@pytest.mark.parametrize(
    ("shape", "count"), [((64,), 16), ((100,), 5), ((3,), 33), ((3, 70), 9)], ids=str
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_kernel_rounds_like_the_loop(
    scheme: WeightScheme, stored: torch.dtype, shape: tuple[int, ...], count: int, variant: str
) -> None:
    loop, points = leaves(scheme, stored, shape, count)
    square = *shape[:-1], count, count
    columns, pull = torch.randn(count, *shape), torch.randn(square) / count
    others: dict[str, torch.Tensor] = {}
    if variant == "revisited":
        others = {"aim": torch.randn(count, *shape), "old": torch.randn(count, *shape)}
    if variant == "drifted":
        drift = torch.randn(square) / count
        others = {"drift": drift, "met": torch.full((count, *shape), torch.nan)}
    theirs = {name: tensor.clone() for name, tensor in others.items()}
    found = settled(points, columns, pull, **theirs)
    expected = loop.settle(columns, pull, **others)
    # Sums in another order: a column that lies between two codes may go to the other one, and all
    # after it in that row then differ as well.
    same = (points.steps.cpu() == loop.points().steps).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(found[:, same], expected[:, same], atol=1e-5, rtol=1e-5)
    if variant == "drifted":
        met = theirs["met"]
        torch.testing.assert_close(met[:, same], others["met"][:, same], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["symmetric", "fp4", "fp8"])
def test_ties_go_to_the_even_number_and_the_ends_hold(name: str) -> None:
    wanted = torch.tensor([-500.0, -100, -8.5, -7.5, -6.5, -5, -3.5, -2.5, -1.75, -1.5, -1.25,
                           -0.75, -0.5, -0.25, 0, 2**-10, 3 * 2**-10, 0.25, 0.5, 0.75, 1.25, 1.5,
                           1.75, 2.5, 3.5, 5, 7.5, 17, 19, 100, 460, 500])  # fmt: skip
    loop, points = leaves(SCHEMES[name], torch.float32, (len(wanted),), 1)
    columns, scale = wanted[None].clone(), torch.ones(1, len(wanted))
    points.scale.copy_(scale)
    loop.points().scale.copy_(scale)
    settled(points, columns, torch.zeros(1, 1))
    loop.settle(columns, torch.zeros(1, 1))
    assert torch.equal(points.steps.cpu(), loop.points().steps)
