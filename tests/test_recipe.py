"""Recipes: every mistake is reported with its place, its rule and the nearest right word."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import jsonschema
import pytest
from ruamel.yaml import YAML

from compressor import Pipeline, resources
from compressor.errors import PlanError, RecipeError
from compressor.formats.support import ENGINES
from compressor.recipe import Recipe, dump_lock, load_recipe, recipe_json_schema, shipped_recipes
from compressor.sections import EngineName, Lock
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.quantize_rtn import QuantizeRtn

GOOD = """\
calibration:
  samples: 4
stages:
  - method: quantize.gptq
    bits: 4
    group_size: 64
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[tuple[int, int, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return [(p.line, p.column, f"{p.message} {p.hint}") for p in caught.value.problems]


def stage(line: str, method: str = "quantize.gptq") -> str:
    """A recipe whose stage has one more line: line 4, keys in column 5."""
    return f"calibration: {{}}\nstages:\n  - method: {method}\n    {line}\n"


# text, line, column, words that the message must hold
BROKEN = {
    "empty file": ("", 1, 1, "not empty"),
    "only a comment": ("# nothing\n", 1, 1, "not empty"),
    "a list on top": ("- method: quantize.rtn\n", 1, 1, "not a list"),
    "a word on top": ("quantize\n", 1, 1, "'quantize'"),
    "syntax": ("stages: [\n", 2, 1, "not valid YAML"),
    "open quote": ("name: 'x\nstages: []\n", 3, 1, "not valid YAML"),
    "tab": ("stages:\n\t- method: quantize.rtn\n", 2, 1, "tab"),
    "duplicate key": (stage("bits: 4\n    bits: 3"), 5, 5, "'bits' stands twice"),
    "tag": (stage("bits: !!python/name:os.system 4"), 4, 11, "tags"),
    "two documents": ("---\nname: a\n---\nname: b\n", 3, 1, "another document"),
    "alias into itself": ("&a [*a]\n", 1, 1, "alias"),
    "number as key": ("1: 2\n", 1, 1, "quote it"),
    "date": ("name: 2020-01-01\n", 1, 7, "quote it"),
    "no stages": ("name: x\n", 1, 1, "needs the key 'stages'"),
    "stages empty": ("stages: []\n", 1, 9, "at least one entry"),
    "stages a word": ("stages: quantize.rtn\n", 1, 9, "must be a list"),
    "stage a word": ("stages:\n  - quantize.rtn\n", 2, 5, "must be a mapping"),
    "method missing": ("stages:\n  - bits: 4\n", 2, 5, "needs the key 'method'"),
    "method misspelt": (
        "stages:\n  - method: quantize.gtpq\n",
        2,
        13,
        "did you mean 'quantize.gptq'? compress ls methods",
    ),
    "method without family": ("stages:\n  - method: rtn\n", 2, 13, "did you mean 'quantize.rtn'"),
    "unknown option": (
        stage("groupsize: 64"),
        4,
        5,
        "unknown key 'groupsize' in quantize.gptq; did you mean 'group_size'? "
        "compress explain quantize.gptq.group_size",
    ),
    "option of another method": (
        stage("damping: 0.1", "quantize.rtn"),
        4,
        5,
        "unknown key 'damping' in quantize.rtn",
    ),
    "unknown section": ("evalute: {}\nstages:\n  - method: quantize.rtn\n", 1, 1, "'evaluate'"),
    "unknown key in a section": (
        "evaluate:\n  lenght: 512\nstages:\n  - method: quantize.rtn\n",
        2,
        3,
        "unknown key 'lenght' in evaluate; did you mean 'length'? compress explain evaluate.length",
    ),
    "text for a number": (stage("bits: four"), 4, 11, "must be an integer, not 'four'"),
    "quoted number": (stage("bits: '4'"), 4, 11, "must be an integer, not '4'"),
    "true for a number": (stage("bits: true"), 4, 11, "must be an integer, not true"),
    "fraction for an integer": (stage("bits: 4.5"), 4, 11, "must be an integer, not 4.5"),
    "YAML 1.1 boolean": (stage("act_order: no"), 4, 16, "must be true or false, not 'no'"),
    "empty value": (stage("bits:"), 4, 5, "must be an integer, not empty"),
    "too many bits": (stage("bits: 9"), 4, 11, "at most 8, not 9"),
    "too few bits": (stage("bits: 1"), 4, 11, "at least 2, not 1"),
    "zero damping": (stage("damping: 0"), 4, 14, "above 0"),
    "group too small": (stage("group_size: 8"), 4, 17, "at least 16, not 8"),
    "group misspelt": (stage("group_size: chanel"), 4, 17, "did you mean 'channel'"),
    "literal misspelt": (stage("symmetry: symetric"), 4, 15, "did you mean 'symmetric'"),
    "a word for a list": (stage("targets: linear"), 4, 14, "must be a list, not 'linear'"),
    "an empty list": (stage("targets: []"), 4, 14, "at least one entry"),
    "a number in a list": (stage("targets: [linear, 7]"), 4, 23, "must be text, not 7"),
    "negative seed": ("seed: -1\nstages:\n  - method: quantize.rtn\n", 1, 7, "at least 0"),
    "bad name": ("name: a b\nstages:\n  - method: quantize.rtn\n", 1, 7, "name"),
    "unknown export": (
        "stages:\n  - method: quantize.rtn\nexport:\n  - format: coreml\n",
        4,
        13,
        "'onnx' or 'openvino', not 'coreml'",
    ),
    "export a word": (
        "stages:\n  - method: quantize.rtn\nexport: dense\n",
        3,
        9,
        "export must be a list",
    ),
    "gate out of range": (
        "stages:\n  - method: quantize.rtn\ngates:\n  max_kl: -1\n",
        4,
        11,
        "at least 0.0, not -1",
    ),
    "rule across keys": (
        "evaluate:\n  protocol: llama.cpp\n  length: 511\nstages:\n  - method: quantize.rtn\n",
        2,
        3,
        "even",
    ),
    "gptq without text": ("stages:\n  - method: quantize.gptq\n", 2, 13, "no `calibration`"),
    "imatrix without text": (
        "stages:\n  - method: quantize.rtn\n    grid: imatrix\n",
        3,
        11,
        "no `calibration`",
    ),
    "path upwards": (
        "evaluate:\n  text: {a: ../a.txt}\nstages:\n  - method: quantize.rtn\n",
        2,
        13,
        "leaves the recipe's folder",
    ),
    "absolute path": (
        "calibration:\n  source: /etc/passwd\nstages:\n  - method: quantize.rtn\n",
        2,
        11,
        "leaves the recipe's folder",
    ),
    "half a lock": (
        "stages:\n  - method: quantize.rtn\nlock: {model: m, config_sha256: x, packages: {}}\n",
        3,
        7,
        "lock needs the key 'weights'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_mistake_is_found_where_it_is(tmp_path: Path, case: str) -> None:
    text, line, column, words = BROKEN[case]
    found = problems_of(tmp_path, text)
    assert len(found) == 1, found
    assert found[0][:2] == (line, column), found
    assert words in found[0][2]


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
        seed: x
        evaluate: {suit: quick}
        stages:
          - method: quantize.gptq
            bits: 11
            groupsize: 64
          - method: quantize.rtm
        """
    found = problems_of(tmp_path, text)
    assert [place[:2] for place in found] == [(1, 7), (2, 12), (5, 11), (6, 5), (7, 13)]


def test_mistakes_of_form_hide_no_others(tmp_path: Path) -> None:
    """The order of stages, and text that does not exist, are told of beside them."""
    text = """\
        calibration: {mix: defalt}
        evaluate: {suite: quik}
        stages:
          - {method: quantize.gptq, bitz: 4}
          - {method: transform.rotate}
          - {methd: transform.awq}
          - 7
        """
    found = problems_of(tmp_path, text)
    words = [(1, "calibration mix"), (2, "evaluation suite"), (4, "did you mean 'bits'"),
             (5, "cannot follow quantize.gptq")]  # fmt: skip
    for (line, _, message), (expected, part) in zip(found, words, strict=False):
        assert line == expected
        assert part in message
    assert {line for line, _, _ in found[4:]} == {6, 7}


def test_the_message_starts_like_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, stage("groupsize: 64")))
    first, hint = str(caught.value).splitlines()
    assert first.endswith(
        "recipe.yaml:4:5: unknown key 'groupsize' in quantize.gptq; did you mean 'group_size'?"
    )
    assert hint == "  → compress explain quantize.gptq.group_size"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)


def test_a_huge_file_is_refused_before_parsing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# " + "x" * (1 << 20), encoding="utf-8")
    with pytest.raises(RecipeError, match="1 MiB"):
        load_recipe(path)


def test_aliases_cannot_multiply_without_bound(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="20000 values"):
        load_recipe(write(tmp_path, "\n".join(levels)))


def test_unknown_recipe_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")


# ---------------------------------------------------------------------- what loads


def test_types_of_yaml_1_2(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, stage("damping: 1e-4")))
    assert isinstance(recipe.stages[0], QuantizeGptq)
    assert recipe.stages[0].damping == 1e-4
    assert recipe.name == "recipe"
    assert recipe.export[0].format == "compressed-tensors"


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = """\
        stages:
          - &low {method: quantize.rtn, targets: [attention], act: &t true}
        """
    assert problems_of(tmp_path, text)[0][2].startswith("unknown key 'act'")
    text = """\
        stages:
          - &first {method: quantize.rtn, bits: 8, targets: [attention]}
          - <<: *first
            targets: [mlp]
        """
    first, second = load_recipe(write(tmp_path, text)).stages
    assert first.model_copy(update={"targets": ("mlp",)}) == second


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_text_is_verbatim_and_names_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path).text() == GOOD
    assert load_recipe(path, ["seed=3"]).text() == f"# replaced by --set seed\n{GOOD}"


def test_the_fingerprint_follows_what_decides_the_result(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    plain = load_recipe(path).fingerprint()
    assert load_recipe(path, ["name=other", "description=words"]).fingerprint() == plain
    assert load_recipe(path, ["stages.0.bits=4"]).fingerprint() == plain
    assert load_recipe(path, ["stages.0.bits=3"]).fingerprint() != plain
    assert load_recipe(path, ["seed=1"]).fingerprint() != plain


# ---------------------------------------------------------------------- --set


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["stages.0.bits=3", "stages.0.targets=[q, down]", "evaluate.documents=2"]
    recipe = load_recipe(path, [*overrides, "stages.0.damping=1e-3", "name=no"])
    first = recipe.stages[0]
    assert isinstance(first, QuantizeGptq)
    assert (first.bits, first.targets, first.damping) == (3, ("q", "down"), 1e-3)
    assert (recipe.evaluate.documents, recipe.name) == (2, "no")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.bits=9", "--set stages.0.bits: bits in quantize.gptq must be at most 8"),
        ("stages.0.bit=3", "--set stages.0.bit: unknown key 'bit' in quantize.gptq"),
        ("stages.0.method=quantize.gtpq", "--set stages.0.method: unknown method"),
        ("stages.1.bits=3", "--set stages.1.bits: stages is a list of 1"),
        ("stages.x.bits=3", "--set stages.x.bits: stages is a list of 1"),
        ("evalute.length=3", "--set evalute.length: unknown key 'evalute'"),
        ("evaluate.length=[", "--set evaluate.length: '[' is not valid YAML"),
        ("stages.0.bits.deep=1", "--set stages.0.bits.deep: stages.0.bits has nothing named"),
        ("seed", "--set seed: not of the form"),
        ("=3", "--set =3: not of the form"),
    ],
)
def test_a_bad_override_is_blamed_on_the_command_line(
    tmp_path: Path, override: str, words: str
) -> None:
    found = problems_of(tmp_path, GOOD, override)
    assert len(found) == 1
    assert found[0][:2] == (0, 0)
    assert found[0][2].startswith(words)


def test_an_override_repairs_a_broken_value(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, stage("bits: 11")), ["stages.0.bits=3"])
    assert recipe.stages[0].model_dump()["bits"] == 3


# ---------------------------------------------------------------------- paths


def test_paths_start_from_the_recipes_folder(tmp_path: Path) -> None:
    text = "evaluate:\n  text: {a: text/a.txt}\nstages:\n  - method: quantize.rtn\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.evaluate.text == {"a": str(tmp_path.resolve() / "text" / "a.txt")}


def test_a_link_out_of_the_folder_is_a_path_out_of_it(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.txt").write_text("x", encoding="utf-8")
    (inside / "a.txt").symlink_to(tmp_path / "secret.txt")
    text = "evaluate:\n  text: {a: a.txt}\nstages:\n  - method: quantize.rtn\n"
    assert "leaves" in problems_of(inside, text)[0][2]


def test_the_command_line_may_name_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(inside, GOOD)
    recipe = load_recipe(path, ["evaluate.text.a=mine.txt", "calibration.source=../up.txt"])
    assert recipe.evaluate.text == {"a": str(tmp_path.resolve() / "mine.txt")}
    assert recipe.calibration is not None
    assert recipe.calibration.source == str(tmp_path.resolve().parent / "up.txt")
    text = "evaluate:\n  text: {a: ../a.txt}\nstages:\n  - method: quantize.rtn\n"
    assert load_recipe(write(inside, text), allow_outside=True).evaluate.text["a"].endswith("a.txt")


def test_a_hub_name_is_not_a_path(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["calibration.source=org/dataset"])
    assert recipe.calibration is not None
    assert recipe.calibration.source == "org/dataset"


# ---------------------------------------------------------------------- lock and schema

FACTS = Lock(
    model="builtin:tiny",
    revision=None,
    config_sha256="c" * 64,
    weights={"model.safetensors": "d" * 64},
    calibration_sha256="e" * 64,
    packages={"torch": "2.13.0"},
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_lock_is_a_recipe_that_means_the_same(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, ["seed=5"])
    path = tmp_path / "recipe.lock.yaml"
    path.write_text(dump_lock(recipe, FACTS, tmp_path), encoding="utf-8")
    locked = load_recipe(path)
    assert locked.fingerprint() == recipe.fingerprint()
    assert locked.name == recipe.name
    assert locked.lock == FACTS
    text = dump_lock(locked, FACTS, tmp_path)
    assert text == path.read_text(encoding="utf-8")


def test_a_lock_spells_out_every_default(tmp_path: Path) -> None:
    text = dump_lock(load_recipe(write(tmp_path, GOOD)), FACTS, tmp_path)
    for key in (*QuantizeGptq.model_fields, "resamples", "max_kl", "form", "seed"):
        assert f"{key}:" in text


def test_a_lock_reads_the_text_that_the_recipe_read(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    text = GOOD.replace("samples: 4", "source: mine.txt")
    recipe = load_recipe(write(tmp_path, text))
    lock = tmp_path / "runs" / "recipe.lock.yaml"
    lock.write_text(dump_lock(recipe, FACTS, lock.parent), encoding="utf-8")
    assert "source: ../mine.txt" in lock.read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="leaves"):
        load_recipe(lock)
    assert load_recipe(lock, allow_outside=True).calibration == recipe.calibration


def test_the_shipped_schema_is_current() -> None:
    shipped = json.loads((resources.recipes() / "schema.json").read_text(encoding="utf-8"))
    assert shipped == recipe_json_schema(), "compress schema > recipes/schema.json"


def test_the_schema_accepts_what_loads_and_refuses_what_does_not(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(recipe_json_schema())
    for name in shipped_recipes():
        text = shipped_recipes()[name].read_text(encoding="utf-8")
        validator.validate(YAML(typ="safe").load(text))
    stage_of = {"method": "quantize.gptq", "bits": 4}
    for wrong in (
        {},
        {"stages": []},
        {"stages": [{"bits": 4}]},
        {"stages": [stage_of | {"bits": 9}]},
        {"stages": [stage_of | {"groupsize": 9}]},
        {"stages": [stage_of], "evalute": {}},
        {"stages": [stage_of], "efforts": {"fast": {}}},
        {"stages": [stage_of], "efforts": {"best": {"stages": [stage_of | {"bits": 9}]}}},
        {"stages": [stage_of], "efforts": {"best": {"calibration": {"sample": 9}}}},
    ):
        assert not validator.is_valid(wrong), wrong
    assert validator.is_valid({"stages": [stage_of]})


def test_a_format_is_exported_once(tmp_path: Path) -> None:
    packed = "{format: compressed-tensors}"
    bytewise = "{format: compressed-tensors, form: int-quantized}"
    ((line, _, message),) = problems_of(tmp_path, GOOD + f"export: [{packed}, {bytewise}]\n")
    assert line == GOOD.count("\n") + 1
    assert "compressed-tensors is named twice" in message


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_explain_themselves(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert recipe.description
    assert recipe.name == name
    first = recipe.text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=./schema.json"


def test_every_engine_that_a_recipe_can_name_has_known_limits() -> None:
    assert set(EngineName.__args__) == set(ENGINES)


def test_a_wrong_key_does_not_hide_names_in_its_section(tmp_path: Path) -> None:
    text = GOOD.replace("samples: 4", "samples: many\n  lengt: 9\n  mix: defualt")
    found = problems_of(tmp_path, text + "evaluate: {length: 3, suite: quik}\n")
    assert [problem[0] for problem in found] == [2, 3, 4, 9, 9]
    assert "there is no calibration mix 'defualt'" in found[2][2]
    assert "no evaluation suite 'quik'" in found[4][2]


# ---------------------------------------------------------------------- from Python


def test_what_is_wrong_in_python_is_told_like_a_file() -> None:
    stages = [QuantizeGptq(), {"method": "quantize.gptq", "bits": 9}, {"method": "gptq"}]
    with pytest.raises(RecipeError) as caught:
        Pipeline(stages, calibration={"sample": 2}, export=({"format": "dense", "typ": 1},))
    assert sorted(str(problem).partition("\n")[0] for problem in caught.value.problems) == [
        "calibration: unknown key 'sample' in calibration; did you mean 'samples'?",
        "export: unknown key 'typ' in export; did you mean 'type'?",
        "stages.1: bits in quantize.gptq must be at most 8, not 9",
        "stages.2: unknown method 'gptq'; did you mean 'quantize.gptq'?",
    ]


def test_python_cannot_skip_what_a_file_is_checked_for() -> None:
    unread = {"method": "quantize.rtn", "group_size": 64, "embedding_bits": 4}
    with pytest.raises(PlanError) as caught:
        Pipeline([unread, QuantizeGptq(group_size=64)]).plan("builtin:tiny")
    told = "\n".join(problem.message for problem in caught.value.problems)
    assert "stages.0.embedding_bits: quantize.rtn.embedding_bits has no effect" in told
    assert "stages.1.method: quantize.gptq measures its Hessians on calibration text" in told


def test_a_stage_may_be_a_mapping() -> None:
    stage = {"method": "quantize.rtn", "bits": 3, "group_size": 64}
    recipe = Pipeline([stage]).recipe
    assert recipe.stages == Pipeline([QuantizeRtn(bits=3, group_size=64)]).recipe.stages
    assert recipe.model_dump()["stages"][0]["bits"] == 3
