from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.evaluation.results import Estimate
from compressor.report import numbers


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (111_722_332, "112 MB"),
        (4_830_000_000, "4.83 GB"),
        (-212_000_000, "−212 MB"),
    ],
)
def test_sizes_are_decimal(count: int, expected: str) -> None:
    assert numbers.size(count) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (2.748, "2.75"),
        (0.00253, "0.00253"),
        (2.4e-9, "2.40 × 10⁻⁹"),
        (-0.0312, "−0.0312"),
        (1843.0, "1843"),
        (3.2e7, "3.20 × 10⁷"),
    ],
)
def test_numbers_keep_three_digits(value: float, expected: str) -> None:
    assert numbers.number(value) == expected


def test_an_interval_sets_the_digits() -> None:
    delta = Estimate(value=0.052013, low=0.04681, high=0.05772)
    assert numbers.plus_minus(delta, signed=True) == "+0.0520 ± 0.0055"
    assert numbers.limits(delta, signed=True) == "+0.0468 to +0.0577"
    assert numbers.plus_minus(Estimate(value=12.8843, low=12.5, high=13.2)) == "12.88 ± 0.35"
    noise = Estimate(value=2.4e-9, low=2.2e-9, high=2.6e-9)
    assert numbers.plus_minus(noise) == "(2.40 ± 0.20) × 10⁻⁹"


def test_without_an_interval_none_is_shown() -> None:
    alone = Estimate(value=0.0118)
    assert numbers.plus_minus(alone, signed=True) == "+0.0118"
    assert numbers.limits(alone) == "–"
    assert numbers.with_limits(alone) == "0.0118"
    exact = Estimate(value=0.0, low=0.0, high=0.0)
    assert numbers.plus_minus(exact, signed=True) == "0.00"


def test_durations_and_shares() -> None:
    assert numbers.duration(0.83) == "0.8 s"
    assert numbers.duration(508.2) == "8 min 28 s"
    assert numbers.duration(7385) == "2 h 3 min"
    assert numbers.share(0.90222) == "90.2\u00a0%"
    assert numbers.count(134_515_008) == "134\u202f515\u202f008"
    assert numbers.moment("2026-11-21T07:12:09Z") == "2026-11-21 07:12 UTC"
    assert numbers.plain(2.0) == "2"


@given(st.floats(-1e12, 1e12), st.floats(0, 1e3))
def test_every_value_can_be_shown(value: float, half: float) -> None:
    estimate = Estimate(value=value, low=value - half, high=value + half)
    for text in (numbers.number(value), numbers.plus_minus(estimate), numbers.limits(estimate)):
        assert text
        assert "e" not in text
        assert "-" not in text


@given(st.floats(1e-3, 1e5))
def test_shown_numbers_are_near_the_value(value: float) -> None:
    assert float(numbers.number(value)) == pytest.approx(value, rel=0.006)


def test_ticks_are_printed_exactly_and_alike() -> None:
    ticks = [0.0, 0.0025, 0.005]
    assert [numbers.level_digits(ticks)(tick) for tick in ticks] == ["0.0000", "0.0025", "0.0050"]
    assert [numbers.round_size(b) for b in (5e6, 7.5e6, 12.5e6, 200e6)] == [
        "5 MB",
        "7.5 MB",
        "12.5 MB",
        "200 MB",
    ]
