"""Sums over what experts answer, in closed form; the choice, ties and all."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.experts import ExpertSums, worthiest


def test_worth_is_counts_sums_and_means() -> None:
    sums = ExpertSums(3)
    sums.add(0, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.5, 0.25]))
    sums.add(2, torch.tensor([[6.0, 8.0]]), torch.tensor([0.9]))
    sums.add(0, torch.tensor([[0.0, 2.0]]), torch.tensor([1.0]))
    assert sums.worth("frequency").tolist() == [3, 0, 1]
    assert sums.worth("output").tolist() == pytest.approx([2.5 + 0.25 + 2, 0, 9])
    assert sums.worth("reap").tolist() == pytest.approx([4.75 / 3, 0, 9])


def test_the_worthiest_stay_in_order_and_of_equals_the_first() -> None:
    worth = torch.tensor([0.0, 5.0, 1.0, 5.0, 1.0])
    assert worthiest(worth, 3) == [1, 2, 3]
    assert worthiest(worth, 5) == [0, 1, 2, 3, 4]
    for count in (0, 6):
        with pytest.raises(ValueError, match="cannot be kept"):
            worthiest(worth, count)
