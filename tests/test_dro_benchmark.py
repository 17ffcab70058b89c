"""The arms of benchmarks/dro_arms.py on two seeds and little text: they differ, and they resume."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, as it is imported when run, with less text."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("dro_arms")
    for name, value in (("TEXT", 400), ("HELD", 4), ("BATCH", 4)):
        monkeypatch.setattr(script, name, value)
    yield script
    for name in ("dro_arms", "bench"):
        sys.modules.pop(name, None)


def test_all_arms_run_and_are_not_run_again(
    arms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = arms.Size(steps=40, radius=1.0)
    lines = arms.run(tmp_path, range(2), size)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(arms.ARMS)
    assert lines[3].count("–") == 2  # static against itself
    kept = (tmp_path / "cells.jsonl").read_text()
    assert len(kept.splitlines()) == 2 * (len(arms.ARMS) + len(arms.SHARES))
    monkeypatch.setattr(arms, "train", lambda *_: pytest.fail("run again"))
    assert arms.run(tmp_path, range(2), size) == lines
    assert (tmp_path / "cells.jsonl").read_text() == kept


def test_arms_lean_as_they_say(arms: ModuleType) -> None:
    """Static shares are the text's; those that lean by the loss leave what falls first: noise."""
    size = arms.Size(steps=40, radius=1.0)
    shares = {arm: arms.train(arm, 0, size, None)["shares"] for arm in ("static", "dro-none")}
    assert shares["static"] == pytest.approx(arms.SHARES)
    assert shares["dro-none"]["noise"] < 0.15
    assert arms.train("uniform", 0, size, None)["shares"]["rare"] == pytest.approx(0.25)
    given = {"easy": 0.1, "noise": 0.2, "rare": 0.3, "slow": 0.4}
    assert arms.train("replay", 0, size, given)["loss"].keys() == given.keys()


def test_parts_of_the_text_do_not_meet(arms: ModuleType) -> None:
    text = arms.Text(3)
    rows = [{tuple(row) for row in text.windows("slow", 50, part).tolist()} for part in range(3)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    assert torch.equal(text.windows("rare", 5, 1), arms.Text(3).windows("rare", 5, 1))
    assert not torch.equal(text.windows("rare", 5, 1), arms.Text(4).windows("rare", 5, 1))
