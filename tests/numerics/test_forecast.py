"""The scaling law finds what made the data, and never promises more than it may."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.forecast import forecast


@pytest.mark.parametrize(("alpha", "floor"), [(0.3, 1.3), (0.5, 0.2), (1.0, 2.0), (0.5, 0.0)])
def test_a_power_law_is_continued_to_one_percent(alpha: float, floor: float) -> None:
    tokens = torch.linspace(1e4, 1e6, 30).double()
    noise = 1e-4 * torch.randn(30, generator=torch.Generator().manual_seed(1)).double()
    losses = 40 * tokens**-alpha + floor + noise
    end = 4e6
    found = forecast(tokens, torch.ones(30), losses, (end, 1.0))
    assert found == pytest.approx(40 * end**-alpha + floor, rel=0.01)


def test_a_model_that_shrinks_meanwhile_is_told_apart_from_learning() -> None:
    tokens = torch.linspace(1e4, 1e6, 40).double()
    kept = torch.linspace(1.0, 0.75, 40).double()
    losses = 20 * tokens**-0.4 * kept**-2 + 0.5
    found = forecast(tokens, kept, losses, (2e6, 0.7))
    assert found == pytest.approx(
        min(20 * 2e6**-0.4 * 0.7**-2 + 0.5, float(losses.min())), rel=0.01
    )


def test_outliers_do_not_decide() -> None:
    tokens = torch.linspace(1e4, 1e6, 30).double()
    losses = 40 * tokens**-0.5 + 1.0
    losses[[3, 17]] += 0.5
    found = forecast(tokens, torch.ones(30), losses, (4e6, 1.0))
    assert found == pytest.approx(40 * 4e6**-0.5 + 1.0, rel=0.01)


def test_the_forecast_is_between_zero_and_the_lowest_measured() -> None:
    tokens, ones = torch.linspace(1, 10, 10), torch.ones(10)
    rising = torch.linspace(1, 2, 10)
    assert forecast(tokens, ones, rising, (100, 1)) == pytest.approx(1.0)
    level = torch.full((10,), 0.7)
    assert forecast(tokens, ones, level, (100, 1)) == pytest.approx(0.7)
    plunging = torch.linspace(1, 0.01, 10)
    assert forecast(tokens, ones, plunging, (1e6, 1)) >= 0


def test_too_little_and_impossible_data_are_refused() -> None:
    with pytest.raises(ValueError, match="2 measurements"):
        forecast(torch.ones(2), torch.ones(2), torch.ones(2), (1, 1))
    with pytest.raises(ValueError, match="positive"):
        forecast(torch.tensor([0.0, 1, 2]), torch.ones(3), torch.ones(3), (1, 1))
