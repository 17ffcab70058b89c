"""Every shipped recipe, and every effort that runs something new, on the built-in model.

All other efforts are planned (tests/test_plan.py): they differ in amounts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.efforts import EffortName
from compressor.recipe import load_efforts, load_recipe, shipped_recipes
from tests.command import Compress
from tests.place import report

EVALUATION = ("documents=1", "length=64", "resamples=100", "noise_floor=false")
SMALL_DRAFT = ("tokens=256", "length=32", "prompt=8", "steps=2", "prompts=1", "new_tokens=6")
SMALL = [word for entry in EVALUATION for word in ("--set", f"evaluate.{entry}")]


CODES = {"PASS": 0, "NO GATES": 0, "FAIL": 4, "INCONCLUSIVE": 5}


def with_something_new() -> Iterator[tuple[str, EffortName]]:
    """All recipes as they stand, then efforts with a method or an option that none before has."""
    efforts = {(name, e): r for name in shipped_recipes() for e, r in load_efforts(name).items()}
    seen: set[tuple[str, str]] = set()
    for (name, effort), recipe in sorted(efforts.items(), key=lambda item: item[0][1] != "default"):
        options = {(s.method, option) for s in recipe.stages for option in s.model_fields_set}
        if effort == "default" or options - seen:
            yield name, effort
        seen |= options


EFFORTS = [
    pytest.param(name, effort, id=name if effort == "default" else f"{name}-{effort}")
    for name, effort in with_something_new()
]


@pytest.mark.parametrize(("name", "effort"), EFFORTS)
def test_every_shipped_recipe_runs(
    name: str, effort: EffortName, tmp_path: Path, compress: Compress
) -> None:
    options = [*SMALL, "--set", "evaluate.suite=quick", "--effort", effort]
    recipe = load_recipe(name, effort=effort)
    if recipe.calibration is not None:
        options += ["--set", "calibration.samples=4", "--set", "calibration.length=64"]
    for index, stage in enumerate(recipe.stages):
        known = type(stage).model_fields
        small = [o for o in SMALL_DRAFT if stage.beside and o.partition("=")[0] in known]
        options += [word for entry in small for word in ("--set", f"stages.{index}.{entry}")]
        if stage.method == "transform.rotate" and effort == "best":
            options += ["--set", f"stages.{index}.learn=2"]
    for index, stage in enumerate(recipe.stages):
        if stage.method in ("prune.dro", "recover.distill"):
            for option in ("tokens=1024", "windows=16", "length=64", "batch=4"):
                options += ["--set", f"stages.{index}.{option}"]
    result = compress(name, "builtin:tiny", "-o", tmp_path / "run", "-q", *options)
    found = report(tmp_path / "run")
    assert result.code == CODES[found["verdict"]]
    assert result.code in ((0,) if name == "quickstart" else (0, 4, 5))
    typed = sum(export.type is not None for export in recipe.export)
    artifact = found["variants"][-1]["artifact"]
    assert artifact["reload_ok"] if typed else artifact["max_logit_difference"] == 0
    assert (artifact["quantizer"] is not None) == (typed > 0)
    assert len(found["variants"]) == 1 + typed + sum(not one.beside for one in recipe.stages)
    assert len(found["drafts"]) == sum(stage.beside for stage in recipe.stages)
    assert found["run"]["effort"] == effort
