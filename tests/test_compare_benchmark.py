"""The table of benchmarks/compare_recipes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.report import example

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_every_recipe_shows_its_worst_domain_and_what_it_was_not_calibrated_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "compare_recipes", raising=False)
    import compare_recipes

    monkeypatch.setattr(compare_recipes, "gemm_rate", lambda: 1e11)
    reports = {"w4": example.report().model_dump(mode="json")}
    lines = compare_recipes.table(reports, {"w4": {"stages": [{"flops": 1e12}]}})
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines[2:])
    assert rows["worst domain's KL, nats"].endswith("| 0.0832 ± 0.0070 (french)")
    assert rows["perplexity, french"].endswith("(KL 0.0832 ± 0.0070, not in calibration)")
    assert rows["perplexity, code"].endswith("(KL 0.0608 ± 0.0051)")
