"""What the benchmark of vLLM makes of its answers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.recipe import load_recipe
from compressor.registry import registry

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name, as when they are started from their folder."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def cell(speed: float, counters: dict[str, float] | None = None, **other: Any) -> dict[str, Any]:
    facts = {"version": "0", "verdict": "PASS", "difference": 0.01, "allowed": 0.04}
    facts |= {"same_text": 3, "prompts": 3, "speed": speed, "counters": counters or {}}
    return facts | other


def test_speeds_are_medians_and_drafts_are_counted_over_all_rounds(tmp_path: Path) -> None:
    from engines_vllm import Row, report, table

    (tmp_path / "w4").mkdir()
    (tmp_path / "w4" / "model.safetensors").write_bytes(bytes(2_000_000))
    draft = {"model": str(tmp_path / "w4")}
    rows = [
        Row("dense", tmp_path, tmp_path),
        Row("W4", tmp_path / "w4", tmp_path),
        Row("W4 + standalone", tmp_path / "w4", tmp_path, draft),
    ]
    counted = [{"drafts": 10, "draft_tokens": 30, "accepted_tokens": right} for right in (5, 10)]
    cells = {
        "dense": [cell(10), cell(30), cell(20)],
        "W4": [cell(30), cell(50)],
        "W4 + standalone": [cell(8, counted[0]), cell(12, counted[1])],
    }
    dense, packed, drafted = table(rows, cells)[2:]
    assert dense == (
        "| dense | 0.0 | 20.0 | 10.0, 30.0 | 1.00 | – | 1 | 0.0100 | 0.0400 | 3 of 3 |"
    )
    assert "| 2.0 | 40.0 | 30.0, 50.0 | 2.00 | – | 1 |" in packed
    assert "| 4.0 | 10.0 | 8.0, 12.0 | 0.50 | 15 of 60 | 1.75 |" in drafted
    options = argparse.Namespace(
        model="m",
        kinds=["standalone"],
        minutes=1,
        drafted=3,
        timed=32,
        rounds=2,
        threads=1,
        clock="wall",
    )
    assert "Outside" not in "\n".join(report(options, rows, cells))
    cells["W4"][0]["verdict"] = "FAIL"
    assert "Outside what is allowed: W4." in "\n".join(report(options, rows, cells))


def test_a_draft_is_bounded_by_time_and_the_rounder_is_the_shipped_one() -> None:
    from engines_vllm import METHODS, ROUNDER, drafter

    options = argparse.Namespace(minutes=0.5, drafted=3)
    for kind in METHODS:
        stage = drafter(kind, options)
        assert (stage.method, stage.minutes, stage.writing_minutes) == (f"draft.{kind}", 0.5, 0.5)
    (shipped,) = load_recipe("w4-gptq").stages
    assert shipped == registry().get("quantize.gptq").model_validate(ROUNDER)
