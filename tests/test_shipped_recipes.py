"""Every shipped recipe, at every effort it has, on the built-in model and little text."""

from __future__ import annotations

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


EFFORTS = [
    pytest.param(name, effort, id=name if effort == "default" else f"{name}-{effort}")
    for name in shipped_recipes()
    for effort in load_efforts(name)
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
        if stage.method == "quantize.autoround" and effort != "default":
            options += ["--set", f"stages.{index}.steps=20"]
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
