"""What norms become without some channels: exact where those are dead, the mean where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.numerics.stream import StreamSums, activation_worth


def norm(x: Tensor, weight: Tensor, eps: float = 0.0) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_dead_channels_are_made_up_for_exactly() -> None:
    """w' = w √(D / D'); with ε, what comes out is that of √(m + ε D' / D)."""
    x, weight, kept = drawn(0, 50, 12), drawn(1, 12), [0, 2, 3, 4, 7, 8, 9, 11]
    gone = [c for c in range(12) if c not in kept]
    x[:, gone] = 0
    sums = StreamSums(12)
    sums.add(x, norm(x, weight))
    factor = sums.factor(kept)
    assert factor == pytest.approx((12 / 8) ** 0.5, rel=1e-12)
    torch.testing.assert_close(norm(x[:, kept], factor * weight[kept]), norm(x, weight)[:, kept])
    eps = 0.3
    found = norm(x[:, kept], factor * weight[kept], eps)
    expected = weight * x / (x.square().mean(-1, keepdim=True) + eps * 8 / 12).sqrt()
    torch.testing.assert_close(found, expected[:, kept])


def test_the_factor_is_the_root_of_the_mean_of_both_means() -> None:
    x, kept = drawn(2, 40, 6) * torch.tensor([3.0, 1, 1, 1, 0.1, 1]), [0, 1, 5]
    sums = StreamSums(6)
    for part in x.split(7):
        sums.add(part, part)
    ratio = x[:, kept].square().mean(1) / x.square().mean(1)
    assert sums.factor(kept) == pytest.approx(float(ratio.mean()) ** 0.5, rel=1e-12)
    assert sums.factor(range(6)) == pytest.approx(1.0, rel=1e-12)


def test_worth_is_the_norm_over_windows_of_mean_sizes() -> None:
    first, second = StreamSums(2), StreamSums(2)
    first.add(torch.ones(2, 2), torch.tensor([[1.0, -2.0], [3.0, 0.0]]))  # means 2, 1
    first.add(torch.ones(1, 2), torch.tensor([[0.0, -1.0]]))  # means 0, 1
    second.add(torch.ones(1, 2), torch.tensor([[0.5, 4.0]]))
    assert activation_worth([first, second]).tolist() == pytest.approx([2.5, 2**0.5 + 4])
