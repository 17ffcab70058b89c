"""The sampler on losses that are made up: what tilts the mixture, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.robust import chi_square_weights, divergence
from compressor.progress import SilentObserver
from compressor.stages.sampling import Leaning, Rows, Sampler, Source
from compressor.stages.train_base import largest_share
from compressor.types import TokenBatch

STEPS, EVERY, LENGTH = 200, 4, 16
COUNTS = {"easy": 45, "noise": 25, "rare": 5, "slow": 25}


def rows() -> Rows:
    names = tuple(name for name, count in COUNTS.items() for _ in range(count))
    ids = torch.zeros(len(names), LENGTH, dtype=torch.int64)
    return Rows([TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), names)])


def options(**changes: object) -> Leaning:
    known = {"sampler": "dro", "radius": 0.1, "reference": "original", "drift": False}
    return Leaning(**{**known, "every": EVERY, "batch": 8, **changes})


def sampler(
    path: Path, measure: Callable[[], dict[str, Tensor]], *, steps: int = STEPS, **changes: object
) -> Sampler:
    source = Source(measure)
    return Sampler(options(**changes), rows(), source, steps, path, SilentObserver())


def steady(means: dict[str, float], spread: float = 0.01) -> Callable[[], dict[str, Tensor]]:
    around = spread * torch.tensor([-1.0, 1.0, -1.0, 1.0]).double()
    return lambda: {name: around + mean for name, mean in means.items()}


class Learner:
    """Losses that fall as laws of the tokens that every domain was given."""

    laws: ClassVar = {
        "easy": (0.01, 0.1),
        "noise": (0.0, 3.0),
        "rare": (30, 0.1),
        "slow": (60, 0.5),
    }

    def __init__(self) -> None:
        self.of: Sampler | None = None

    def __call__(self) -> dict[str, Tensor]:
        seen = self.of.history[-1]["tokens"] if self.of and self.of.history else {}
        found = {}
        for name, (scale, floor) in self.laws.items():
            tokens = 100.0 + seen.get(name, 0.0)
            found[name] = steady({name: scale * tokens**-0.6 + floor}, 0.002)()[name]
        return found


def walk(made: Sampler, steps: int = STEPS) -> list[Tensor]:
    return [made.shares(step) for step in range(steps)]


def test_static_shares_are_those_of_the_text(tmp_path: Path) -> None:
    made = sampler(tmp_path / "dro.jsonl", steady({"easy": 1.0, "slow": 9.0}), sampler="static")
    assert all(torch.equal(shares, made._rows.shares) for shares in walk(made))
    assert [entry["update"] for entry in made.history] == [0]


def test_pure_noise_does_not_tilt_the_mixture(tmp_path: Path) -> None:
    """Placebo: one distribution for all domains, fifty measurements, forecasts and drift on."""
    generator = torch.Generator().manual_seed(5)

    def noise() -> dict[str, Tensor]:
        return {name: torch.rand(8, generator=generator).double() for name in COUNTS}

    made = sampler(tmp_path / "dro.jsonl", noise, reference="forecast", drift=True)
    walk(made)
    trusted = [entry["radius"] for entry in made.history if entry["radius"]]
    assert len(trusted) <= 1
    shares = [made._vector(entry["shares"]) for entry in made.history]
    assert max(divergence(one, made._rows.shares) for one in shares) < 0.02
    assert torch.equal(shares[0], made._rows.shares)


def test_a_forecast_does_not_chase_what_cannot_be_learned(tmp_path: Path) -> None:
    """By its loss, noise is the worst domain; by what is left to learn, it is the best."""
    shares = {}
    for reference in ("original", "forecast"):
        learner = Learner()
        made = sampler(tmp_path / reference, learner, reference=reference, drift=True, radius=0.3)
        learner.of = made
        walk(made)
        later = [entry["shares"] for entry in made.history[len(made.history) // 2 :]]
        shares[reference] = {n: sum(one[n] for one in later) / len(later) for n in COUNTS}
    assert shares["original"]["noise"] > 0.5
    assert shares["forecast"]["noise"] < 0.2
    assert shares["forecast"]["slow"] + shares["forecast"]["rare"] > 0.5


def test_forecasts_wait_and_need_forty_measurements(tmp_path: Path) -> None:
    learner = Learner()
    made = sampler(tmp_path / "a", learner, reference="forecast")
    learner.of = made
    walk(made)
    began = [e["update"] for e in made.history if any(e["reference"].values())]
    assert began[0] == 11 * EVERY  # ten measurements after the first two percent
    assert made.fallbacks("x") == ()
    few = sampler(tmp_path / "b", Learner(), reference="forecast", steps=39 * EVERY)
    walk(few, 39 * EVERY)
    assert not any(any(e["reference"].values()) for e in few.history)
    (fallback,) = few.fallbacks("recover.distill")
    assert fallback.reason == "39 measurements are too few for a forecast, which needs 40"
    assert sampler(tmp_path / "c", Learner()).fallbacks("x") == ()


def test_a_sampler_taken_up_again_gives_the_same_shares(tmp_path: Path) -> None:
    """Killed behind a checkpoint: later lines are made again, from the file alone."""
    learner = Learner()
    whole = sampler(tmp_path / "whole", learner, reference="forecast", drift=True)
    learner.of = whole
    expected = walk(whole)
    other = Learner()
    first = sampler(tmp_path / "parts", other, reference="forecast", drift=True)
    other.of = first
    walk(first, 150)
    second = sampler(tmp_path / "parts", other, reference="forecast", drift=True)
    other.of = second
    found = [second.shares(step) for step in range(120, STEPS)]
    assert all(torch.equal(*pair) for pair in zip(found, expected[120:], strict=True))
    assert (tmp_path / "whole").read_text() == (tmp_path / "parts").read_text()


def test_the_centre_drifts_after_a_fifth_and_stays_in_bounds(tmp_path: Path) -> None:
    means = {"easy": 0.1, "noise": 0.1, "rare": 2.0, "slow": 0.1}
    made = sampler(tmp_path / "dro.jsonl", steady(means), drift=True)
    walk(made)
    bases = {entry["update"]: entry["base"]["rare"] for entry in made.history}
    assert bases[STEPS // 5] == pytest.approx(0.05)
    assert bases[STEPS // 5 + EVERY] > 0.05
    assert max(bases.values()) == pytest.approx(0.1, abs=1e-6)
    assert all(entry["shares"]["rare"] <= largest_share(0.1, 0.1) for entry in made.history)


def test_tokens_and_lines_are_counted(tmp_path: Path) -> None:
    made = sampler(tmp_path / "dro.jsonl", steady(dict.fromkeys(COUNTS, 1.0)))
    walk(made)
    made.finish(STEPS)
    lines = [json.loads(line) for line in (tmp_path / "dro.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(0, STEPS + 1, EVERY))
    assert lines[-1]["tokens"]["easy"] == pytest.approx(0.45 * STEPS * 8 * LENGTH)
    assert [point.at for point in made.mixture()] == [line["update"] for line in lines]


def test_a_loss_that_is_no_number_names_its_domain(tmp_path: Path) -> None:
    made = sampler(
        tmp_path / "dro.jsonl", steady({**dict.fromkeys(COUNTS, 1.0), "slow": float("nan")})
    )
    with pytest.raises(NumericalError, match="domain 'slow' before update 0 is no number"):
        made.shares(0)
    assert not (tmp_path / "dro.jsonl").exists()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_no_domain_gets_more_than_its_largest_share(share: float) -> None:
    base = torch.tensor([share, 1 - share]).double()
    excess = torch.tensor([1.0, 0.0]).double()
    found = chi_square_weights(base, excess, 0.1, floor=0)
    assert float(found[0]) == pytest.approx(largest_share(share, 0.1), rel=1e-3)
    assert float(found[0]) <= largest_share(share, 0.1) + 1e-9
