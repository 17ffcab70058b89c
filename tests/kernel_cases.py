"""Kernels beside the loops that they stand for, by Triton's interpreter or on CUDA.

Run by tests/numerics/test_kernels.py in a process of its own: Triton is told to interpret before
it is imported.
"""

from __future__ import annotations

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
}


def leaves(
    scheme: WeightScheme, stored: torch.dtype, out: int, count: int
) -> tuple[loops.IntLeaf, kernels.IntColumns]:
    """The same columns, in the order that a permutation gives, for the loop and for the kernel."""
    torch.manual_seed(out + count)
    weight = torch.randn(out, 128)
    grid = fit_grid(weight, scheme, search="minmax", scale_dtype=stored)
    made = loops.GridColumns(grid, scheme, torch.randperm(128))
    loop = made.leaf(8, 8 + count)
    assert isinstance(loop, loops.IntLeaf)
    zero = None if loop._zero is None else loop._zero.to(DEVICE)
    scale = loop._all_scale.to(DEVICE)
    steps = torch.full_like(scale, torch.nan)
    return loop, kernels.IntColumns(scale, zero, scheme.code_range, stored, steps)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("out", "count"), [(64, 32), (100, 5), (3, 64), (130, 33)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_kernel_rounds_like_the_loop(
    scheme: WeightScheme, stored: torch.dtype, out: int, count: int, offset: bool
) -> None:
    loop, leaf = leaves(scheme, stored, out, count)
    open_columns = torch.randn(count, out)
    pull = torch.randn(count, count) / count
    aim, old = (torch.randn(count, out), torch.randn(count, out)) if offset else (None, None)
    there = [one if one is None else one.to(DEVICE) for one in (aim, old)]
    found = kernels.settle(
        open_columns.to(DEVICE, copy=True), pull.to(DEVICE), leaf, aim=there[0], old=there[1]
    ).cpu()
    expected = loop.settle(open_columns.clone(), pull, aim=aim, old=old)
    # Sums in another order: a column that lies between two codes may go to the other one, and all
    # after it in that row then differ as well.
    same = (leaf.steps.cpu() == loop._all_steps).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(found[:, same], expected[:, same], atol=1e-5, rtol=1e-5)


def test_ties_go_to_the_even_code_and_the_ends_hold() -> None:
    loop, leaf = leaves(SCHEMES["symmetric"], torch.float32, 12, 1)
    wanted = [-100.0, -8.5, -7.5, -6.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 7.5, 100.0]
    columns = (torch.tensor([wanted]) * loop._all_scale).to(DEVICE)
    expected = (columns.cpu() / loop._all_scale).round().clamp(*SCHEMES["symmetric"].code_range)
    kernels.settle(columns, torch.zeros(1, 1, device=DEVICE), leaf, aim=None, old=None)
    assert torch.equal(leaf.steps.cpu(), expected)
