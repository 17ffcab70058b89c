"""The loop: rates, identical state after an interruption, a time box, a broken loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError, ResumeError
from compressor.progress import SilentObserver
from compressor.training import Fit, Schedule, cut_short, fit

SCHEDULE = Schedule(steps=30, learning_rate=0.05, every=7)


def problem() -> tuple[dict[str, Tensor], object]:
    """A least-squares problem whose data depends on the step."""
    weights = {
        "a": torch.zeros(3, requires_grad=True),
        "b": torch.zeros(1, requires_grad=True),
    }

    def loss(step: int) -> Tensor:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
        error = x @ weights["a"] + weights["b"] - y
        return (error * error).mean()

    return weights, loss


class Killed(Exception):
    pass


def train(folder: Path, stop: int | None = None, schedule: Schedule = SCHEDULE):  # type: ignore[no-untyped-def]
    weights, loss = problem()

    def watched(step: int) -> Tensor:
        if step == stop:
            raise Killed
        return loss(step)  # type: ignore[operator,no-any-return]

    return weights, fit(weights, watched, schedule, folder, SilentObserver())


def test_it_learns(tmp_path: Path) -> None:
    weights, done = train(tmp_path, schedule=Schedule(steps=400, learning_rate=0.05))
    assert done.steps == 400
    assert done.mean_loss() < 1e-3 < done.losses[0]
    torch.testing.assert_close(
        weights["a"].detach(), torch.tensor([1.0, -2.0, 0.5]), atol=0.03, rtol=0
    )


@pytest.mark.parametrize("stop", [3, 7, 8, 20])
def test_an_interrupted_run_ends_in_the_same_state(tmp_path: Path, stop: int) -> None:
    whole, through = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "cut", stop)
    resumed, after = train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert after.losses == through.losses


def test_a_time_box_ends_after_the_step_that_passes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still and then jumps; the state is saved, and stays that."""
    seconds = iter([0.0] * 10 + [100.0] * 1000)
    monkeypatch.setattr("compressor.training.time.monotonic", lambda: next(seconds))
    boxed = Schedule(steps=30, learning_rate=0.05, every=7, seconds=9.5)
    first, done = train(tmp_path, schedule=boxed)
    assert done.steps == 9  # neither a multiple of 7 nor all
    again, after = train(tmp_path, schedule=boxed)
    assert after.losses == done.losses
    assert all(torch.equal(first[name], again[name]) for name in first)
    whole, through = train(tmp_path / "whole")
    resumed, rest = train(tmp_path)
    assert rest.losses == through.losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_no_time_at_all_is_one_step(tmp_path: Path) -> None:
    _, done = train(tmp_path, schedule=Schedule(steps=30, learning_rate=0.05, every=7, seconds=0))
    assert done.steps == 1


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    schedule = Schedule(steps=100, learning_rate=2.0, warmup=0.1)
    assert schedule.rate(0) == pytest.approx(0.2)
    assert schedule.rate(9) == schedule.rate(10) == pytest.approx(2.0)
    assert schedule.rate(55) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert schedule.rate(99) == pytest.approx(0.2, rel=0.01)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    weights, _ = problem()
    with pytest.raises(NumericalError, match="step 0"):
        fit(weights, lambda _: weights["a"].sum() * math.nan, SCHEDULE, tmp_path, SilentObserver())


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, 8)
    other = {"c": torch.zeros(1, requires_grad=True)}
    with pytest.raises(ResumeError, match="other parameters"):
        fit(other, lambda _: other["c"].sum(), SCHEDULE, tmp_path, SilentObserver())


def test_rates_fall_with_the_time_if_that_ends_first() -> None:
    free = Schedule(steps=100, learning_rate=1.0)
    boxed = Schedule(steps=100, learning_rate=1.0, seconds=10.0)
    assert boxed.rate(50, 2.0) == free.rate(50)
    assert boxed.rate(2, 5.0) == free.rate(2)  # the rise counts steps
    assert boxed.rate(5, 0.1) == free.rate(5)  # the clock does not matter while it is behind
    assert boxed.rate(20, 5.0) == free.rate(50) < free.rate(20)
    assert boxed.rate(20, 10.0) == boxed.rate(20, 11.0) == pytest.approx(0.1)
    assert free.rate(20, 10.0) == free.rate(20)


def test_what_a_time_box_leaves_out_is_told() -> None:
    done = Fit(50, 121.0, (1.0,) * 50)
    (fallback,) = cut_short("draft", done, 100, 2.0)
    assert fallback.module == "draft"
    assert fallback.reason == "2 minutes were over after 50 of 100 updates"
    assert not cut_short("draft", done, 50, 2.0)
    assert not cut_short("draft", done, 100, None)


def matrix_problem(folder: Path, schedule: Schedule, stop: int | None = None):  # type: ignore[no-untyped-def]
    """A matrix and a vector that map inputs of very different sizes."""
    weights = {
        "matrix": torch.zeros(4, 6, requires_grad=True),
        "bias": torch.zeros(4, requires_grad=True),
    }
    truth = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))

    def loss(step: int) -> Tensor:
        if step == stop:
            raise Killed
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        x = x * torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 0.5])
        return (x @ weights["matrix"].T + weights["bias"] - x @ truth.T).square().mean()

    done = fit(weights, loss, schedule, folder, SilentObserver(), matrices=["matrix"])
    return weights, done


MUON = Schedule(steps=20, learning_rate=0.01, matrix_rate=0.2, clip=1e9, every=7)


def test_muon_moves_along_all_directions_alike(tmp_path: Path) -> None:
    """After one step the update is U Vᵀ of the gradient, to within its iteration's tolerance."""
    once = replace(MUON, steps=1, warmup=1.0)
    moved, _ = matrix_problem(tmp_path / "muon", once)
    plain, _ = matrix_problem(tmp_path / "adamw", replace(once, matrix_rate=None))
    size = 0.2 * 0.2 * math.sqrt(6)  # rate, and what makes its root mean square that of AdamW
    found = torch.linalg.svdvals(moved["matrix"].detach()) / size
    assert found.min() > 0.6
    assert found.max() < 1.3
    assert torch.equal(moved["bias"], plain["bias"])
    spread = torch.linalg.svdvals(plain["matrix"].detach())
    assert spread.max() > 5 * spread.min()


@pytest.mark.parametrize("stop", [3, 8, 20])
def test_muon_too_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    whole, through = matrix_problem(tmp_path / "whole", MUON)
    if stop < MUON.steps:
        with pytest.raises(Killed):
            matrix_problem(tmp_path / "cut", MUON, stop)
    resumed, after = matrix_problem(tmp_path / "cut", MUON)
    assert after.losses == through.losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        matrix_problem(tmp_path, MUON, 8)
    with pytest.raises(ResumeError, match="other parameters"):
        matrix_problem(tmp_path, replace(MUON, matrix_rate=None))
