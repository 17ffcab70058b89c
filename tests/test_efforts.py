"""Efforts: a part of a recipe merged over the rest, checked whether it is chosen or not."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from click.testing import CliRunner

from compressor import Pipeline
from compressor.cli import Settings, cli
from compressor.commands.running import default_out
from compressor.efforts import apart
from compressor.engine import resume_run, run_recipe
from compressor.errors import RecipeError, ResumeError
from compressor.model.files import read_config
from compressor.plan import make_plan
from compressor.recipe import (
    Recipe,
    budget_overrides,
    load_efforts,
    load_recipe,
    shipped_recipes,
)
from compressor.report.render import load_report
from compressor.resources import builtin_model
from compressor.source import Source

TINY = read_config(builtin_model("tiny"))
QUANTIZING = {"transform", "allocate", "quantize"}

RECIPE = """\
calibration:
  samples: 8
  length: 64
stages:
  - method: quantize.rtn
    group_size: 64
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
efforts:
  light:
    calibration: {samples: 4}
  best:
    calibration:
      length: 128
    stages:
      - method: transform.awq
        group_size: 64
      - method: quantize.gptq
        group_size: 64
    gates: {max_kl: 5.0}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides, **options)
    return [f"{p.line}:{p.column} {p.message}" for p in caught.value.problems]


def methods(recipe: Recipe) -> list[str]:
    return [stage.method for stage in recipe.stages]


def text_of(recipe: Recipe) -> tuple[int, int]:
    assert recipe.calibration is not None
    return recipe.calibration.samples, recipe.calibration.length


# ---------------------------------------------------------------------- merging


def test_mappings_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    light, plain, best = (load_recipe(path, effort=e) for e in ("light", "default", "best"))
    assert [text_of(recipe) for recipe in (light, plain, best)] == [(4, 64), (8, 64), (8, 128)]
    assert [methods(recipe) for recipe in (light, plain)] == [["quantize.rtn"]] * 2
    assert methods(best) == ["transform.awq", "quantize.gptq"]
    assert (plain.gates.max_kl, best.gates.max_kl) == (None, 5.0)
    assert [recipe.effort for recipe in (light, plain, best)] == ["light", "default", "best"]
    assert light.name == plain.name == "recipe"


def test_the_default_effort_is_the_recipe_without_any(tmp_path: Path) -> None:
    with_efforts = load_recipe(write(tmp_path, RECIPE))
    without = load_recipe(write(tmp_path, RECIPE.partition("efforts:")[0]))
    assert with_efforts.fingerprint() == without.fingerprint()
    assert with_efforts.model_dump() == without.model_dump()


def test_null_takes_a_key_away(tmp_path: Path) -> None:
    text = RECIPE.replace("light:\n    calibration: {samples: 4}", "light: {export: null}")
    path = write(tmp_path, text + "export: [{format: dense}]\n")
    formats = [load_recipe(path, effort=effort).export[0].format for effort in ("default", "light")]
    assert formats == ["dense", "compressed-tensors"]


# Original, patch, result: the cases of RFC 7396, appendix A, in which all three are objects.
MERGE_PATCHES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("base", "patch", "result"), MERGE_PATCHES)
def test_merging_is_json_merge_patch(
    base: dict[str, Any], patch: dict[str, Any], result: dict[str, Any]
) -> None:
    source = Source("f", "", {**base, "efforts": {"best": patch}}, {}, {}, {})
    before = deepcopy(source.data)
    choices = apart(source)
    assert choices["best"].data == result
    assert choices["default"].data == source.data == before
    choices["best"].data["x"] = choices["default"].data["x"] = 1
    assert source.data == before


def test_set_comes_after_the_effort(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    recipe = load_recipe(path, ["calibration.samples=2", "stages.1.bits=3"], effort="best")
    assert text_of(recipe) == (2, 128)
    assert recipe.stages[1].bits == 3  # type: ignore[attr-defined]
    assert recipe.text().startswith(
        "# at --effort best\n# replaced by --set calibration.samples\n# replaced by --set stages"
    )
    assert "list of 1" in problems_of(tmp_path, RECIPE, "stages.1.bits=3")[0]
    (found,) = problems_of(tmp_path, RECIPE, "efforts.best.seed=3", effort="best")
    assert "the effort is merged before" in found


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("effort", ["light", "default", "best"])
def test_all_problems_of_all_efforts_are_told_at_their_places(tmp_path: Path, effort: Any) -> None:
    text = """\
    stages:
      - method: quantize.gptq
        group_size: 64
        bits: 11
    calibration: {samples: 8}
    efforts:
      light:
        calibration: {sampels: 4}
      best:
        stages:
          - method: quantize.gptq
            damping: 2
        evaluate:
          length: 1
    """
    found = problems_of(tmp_path, text, effort=effort)
    assert [line.partition(" ")[0] for line in found] == ["4:11", "8:19", "12:18", "14:15"]
    assert found[0].startswith("4:11 bits in quantize.gptq must be at most 8")
    assert "at effort light: unknown key 'sampels' in calibration" in found[1]
    assert "at effort best: damping in quantize.gptq must be at most 1" in found[2]
    assert "at effort best: length in evaluate must be at least 8" in found[3]


def test_an_effort_that_only_fails_with_the_rest_is_refused(tmp_path: Path) -> None:
    text = RECIPE.replace("calibration: {samples: 4}", "calibration: null").replace(
        "quantize.rtn", "quantize.gptq"
    )
    (found,) = problems_of(tmp_path, text)
    assert found.startswith("5:13 at effort light: quantize.gptq measures its Hessians")


@pytest.mark.parametrize(
    ("efforts", "words"),
    [
        ("fast: {}", "unknown key 'fast' in efforts"),
        ("bets: {}", "did you mean 'best'?"),
        ("light: 3", "light in efforts must be"),
        ("light: {name: other}", "unknown key 'name' in efforts.light"),
        ("light: {efforts: {}}", "unknown key 'efforts' in efforts.light"),
        ("light: {calibration: 3}", "calibration must be a mapping"),
        ("light: {stages: []}", "stages in the recipe needs at least one entry"),
        ("light: {calibration: {mix: /etc/mix.yaml}}", "leaves the recipe's folder"),
    ],
)
def test_what_no_effort_can_be(tmp_path: Path, efforts: str, words: str) -> None:
    text = RECIPE.partition("efforts:")[0] + f"efforts:\n  {efforts}\n"
    found = problems_of(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith("9:")
    assert words in found[0]


def test_an_effort_that_a_recipe_lacks_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no effort 'best'; it has: light, default"):
        load_recipe(write(tmp_path, RECIPE.partition("  best:")[0]), effort="best")
    with pytest.raises(RecipeError, match=r"has no effort 'light'; it has: default"):
        load_recipe("w8-rtn", effort="light")


# ---------------------------------------------------------------------- plan, run, lock, report


def test_the_plan_tells_the_time_of_every_effort(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    runner = CliRunner()
    args = ["plan", str(path), "builtin:tiny", "--effort", "best"]
    result = runner.invoke(cli, args, obj=Settings())
    assert "best (this) ≈" in result.output
    assert "light ≈" in result.output
    result = runner.invoke(cli, [*args, "--format", "json"], obj=Settings())
    found = json.loads(result.output)
    assert list(found["efforts"]) == ["light", "default", "best"]
    assert found["efforts"]["best"] == found["seconds"]
    assert found["effort"] == "best"
    assert (
        "--effort"
        not in runner.invoke(cli, ["plan", "w8-rtn", "builtin:tiny"], obj=Settings()).output
    )
    # What another effort has no place for does not hide the rest.
    other = load_efforts(path, ["stages.1.bits=3"])
    assert list(other) == ["best"]


def test_the_plan_says_which_effort_cannot_work(tmp_path: Path) -> None:
    text = RECIPE.replace("  best:", "  best:\n    seed: 1").replace(
        "- method: quantize.gptq\n        group_size: 64",
        "- method: quantize.gptq\n        group_size: 48",
    )
    recipes = load_efforts(write(tmp_path, text))
    made = make_plan(recipes["default"], TINY, "tiny").beside(recipes, TINY)
    assert made.efforts["best"] is None
    from compressor.console import plan_text

    assert "best cannot work on this model" in plan_text(made)


def test_a_budget_finds_its_stage_in_the_effort(tmp_path: Path) -> None:
    text = RECIPE.replace("transform.awq\n        group_size: 64", "allocate.bits")
    path = write(tmp_path, text)
    found = budget_overrides(path, effort="best", target_bpw=4.0, target_size=None)
    assert found[0] == "stages.0.target_bpw=4.0"
    with pytest.raises(RecipeError, match=r"no allocate.bits"):
        budget_overrides(path, target_bpw=4.0)


def test_a_run_records_its_effort(tmp_path: Path) -> None:
    path, out = write(tmp_path, RECIPE), tmp_path / "run"
    outcome = run_recipe(load_recipe(path, effort="light"), "builtin:tiny", out)
    assert outcome.report.run.effort == "light"
    lock = load_recipe(out / "recipe.lock.yaml", allow_outside=True)
    assert lock.lock is not None
    assert (lock.lock.effort, lock.effort, text_of(lock)) == ("light", "light", (4, 64))
    assert "efforts" not in (out / "recipe.lock.yaml").read_text()
    assert (out / "recipe.yaml").read_text() == f"# at --effort light\n{RECIPE}"
    assert "Effort: light" in (out / "README.md").read_text()
    assert "effort: light" in (out / "report.html").read_text()
    assert resume_run(out).report.run.effort == "light"
    with pytest.raises(ResumeError, match=r"lock\.effort: light then, default now"):
        run_recipe(load_recipe(path), "builtin:tiny", out)
    assert load_report(out).run.effort == "light"
    # The lock is a recipe: it makes the same run elsewhere.
    again = run_recipe(lock, "builtin:tiny", tmp_path / "again")
    assert again.report.run.effort == "light"


def test_efforts_have_folders_of_their_own() -> None:
    assert default_out("r", "builtin:tiny", "best") == Path("runs/r-best-tiny")
    assert default_out("r", "builtin:tiny", "default") == Path("runs/r-tiny")


def test_from_python(tmp_path: Path) -> None:
    pipeline = Pipeline.from_recipe(write(tmp_path, RECIPE), effort="best")
    assert methods(pipeline.recipe) == ["transform.awq", "quantize.gptq"]
    with pytest.raises(RecipeError, match="efforts: unknown key"):
        Pipeline(stages=pipeline.recipe.stages, efforts={"best": {}})


def test_the_efforts_of_a_recipe_are_listed_and_explained() -> None:
    runner = CliRunner()
    assert "[--effort light | best]" in runner.invoke(cli, ["ls", "recipes"], obj=Settings()).output
    assert "--effort" in runner.invoke(cli, ["explain", "efforts"], obj=Settings()).output


def test_recipes_that_only_quantize_on_text_have_a_first_look_and_a_thorough_version() -> None:
    for name in shipped_recipes():
        efforts = load_efforts(name)
        used = methods(efforts["default"])
        families = {method.partition(".")[0] for method in used}
        rounds = any(method.startswith("quantize.") for method in set(used) - {"quantize.kv"})
        if efforts["default"].calibration and rounds and families <= QUANTIZING:
            assert list(efforts) == ["light", "default", "best"], name
            light, plain, best = (text_of(recipe)[0] for recipe in efforts.values())
            assert light < plain <= best, name


def test_set_may_repair_what_every_effort_inherits(tmp_path: Path) -> None:
    text = RECIPE.replace("samples: 8", "samples: 0").replace("samples: 4", "length: 32")
    path = write(tmp_path, text)
    found = problems_of(tmp_path, text)
    assert [line.partition(" ")[0] for line in found] == ["2:12"]  # told once
    assert text_of(load_recipe(path, ["calibration.samples=2"])) == (2, 64)


def test_a_grid_typed_for_another_stage_than_the_one_that_rounds_is_a_mistake(
    tmp_path: Path,
) -> None:
    """`stages.0` rounds in the recipe as written; at effort best it only foretells the grid."""
    path = write(tmp_path, RECIPE)
    assert load_recipe(path, ["stages.0.bits=3"]).stages[0].label == "RTN W3 g64"
    (found,) = problems_of(tmp_path, RECIPE, "stages.0.bits=3", effort="best")
    assert "--set stages.0.bits: transform.awq: `bits: 3` is not what follows" in found
    with pytest.raises(RecipeError, match=r"at place 1: --set stages\.1\.bits=3 too"):
        load_recipe(path, ["stages.0.bits=3"], effort="best")
    both = load_recipe(path, ["stages.0.bits=3", "stages.1.bits=3"], effort="best")
    assert both.stages[1].label == "GPTQ W3 g64"
