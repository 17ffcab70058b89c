"""Mistakes of users, typed or in files they bring: told in a sentence, never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Compress

RECIPE = """\
calibration: {samples: 2, length: 64, batch_size: 2}
stages: [{method: quantize.rtn, bits: 4, group_size: 64}]
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
"""
FILES = {
    "r.yaml": RECIPE.encode(),
    "latin.yaml": b"description: caf\xe9",
    "suite.yaml": b"domains: [prose]\nprotokol: gptq\nlength: 4\n",
    "suite2.yaml": b"description: x\ndomains: [prosa, code, docz]\n",
    "half.jsonl": b'{"text": "whole"}\n{"text": "half \\ud800"}\n',
}
DEEP, LONG = "[" * 900 + "]" * 900, "9" * 5000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("loop").symlink_to("loop")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("calibration.source=./loop", "calibration source"),
        ("evaluate.text.mine=loop", "no file"),
        ("evaluate.suite=./loop", "no evaluation suite"),
        ("calibration.mix=./loop", "no calibration mix"),
        ("evaluate.suite=./latin.yaml", "latin.yaml is not UTF-8 text"),
        ("calibration.mix=./latin.yaml", "latin.yaml is not UTF-8 text"),
        ("stages.².bits=4", "--set stages.².bits: stages is a list of 1"),
        (f"seed={LONG}", "...' is not valid YAML"),
        (f"seed={DEEP}", "...' is not valid YAML"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_where_it_is(
    compress: Compress, setting: str, says: str
) -> None:
    result = compress("plan", "r.yaml", "builtin:tiny", "--set", setting)
    assert (result.code, says in result.err) == (2, True), result.err
    assert len(result.err) < 500


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (f"seed: {LONG}", "bad.yaml:1:1: a number has thousands of digits"),
        (f"seed: {DEEP}", "bad.yaml:1:1: nested deeper than 50 levels"),
        (f"seed: {'[' * 60}{']' * 60}", "nested deeper than 50 levels"),
        ("seed:\t4", "bad.yaml:1:6: a tab stands where YAML allows spaces only"),
    ],
    ids=["digits", "deep", "less deep", "tab"],
)
def test_yaml_beyond_reason_is_no_crash(compress: Compress, value: str, says: str) -> None:
    Path("bad.yaml").write_text(f"{value}\n{RECIPE}", encoding="utf-8")
    result = compress("plan", "bad.yaml", "builtin:tiny")
    assert (result.code, says in result.err) == (2, True), result.err


def test_a_suite_is_told_of_like_a_recipe_and_beside_it(compress: Compress) -> None:
    """Every problem with its place: of the file that the recipe names, and of the recipe."""
    lines = ["--set", "evaluate.suite=./suite.yaml", "--set", "calibration.mix=./suite2.yaml"]
    result = compress("plan", "r.yaml", "builtin:tiny", *lines)
    assert result.code == 2
    for says in (
        "suite.yaml:1:1: the suite needs the key 'description'",
        "suite.yaml:2:1: unknown key 'protokol' in the suite; did you mean 'protocol'?\n"
        "  → known keys: description, domains,",
        "suite.yaml:3:9: length must be at least 8, not 4",
        "suite2.yaml:2:10: domains must be a mapping, not a list",
    ):
        assert says in result.err
    result = compress("plan", "r.yaml", "builtin:tiny", "--set", "evaluate.suite=./suite2.yaml")
    assert "suite2.yaml:2:11: there is no domain 'prosa'" in result.err
    assert "suite2.yaml:2:24: there is no domain 'docz'" in result.err
    assert "did you mean 'prose'? domains: code, " in result.err


@pytest.mark.parametrize("key", ["calibration.source", "evaluate.text.mine"])
def test_half_of_a_surrogate_pair_is_no_text(compress: Compress, key: str) -> None:
    setting = f"{key}=half.jsonl"
    result = compress("r.yaml", "builtin:tiny", "-o", "out", "-q", "--set", setting)
    assert (result.code, "half.jsonl:2 is not" in result.err) == (2, True), result.err
    assert "surrogates not allowed" in result.err
    assert not Path("out").exists()


def test_a_folder_that_is_a_link_to_itself_is_no_place_for_a_run(compress: Compress) -> None:
    result = compress("r.yaml", "builtin:tiny", "-o", "loop", "-q")
    assert (result.code, result.err) == (3, "error: cannot write loop: File exists\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("plan", "r.yaml", "m", "--set", "seed=1", "--set", "seed=2"), "--set seed: given twice"),
        (
            ("plan", "r.yaml", "m", "--set", "evaluate.seed=1", "--set", "evaluate={}"),
            "--set evaluate: it replaces what --set evaluate.seed wrote",
        ),
        (("plan", "mixed-3.5", "m", "--target-bpw", "nan"), "must be a finite number, not nan"),
        (("compare", "m", "m", "--gate", "max_kl"), "--gate max_kl: neither NAME=LIMIT nor a file"),
        (("compare", "m", "m", "--gate", "max_lk"), "--gate max_kl=LIMIT"),
        (
            ("compare", "m", "m", "--gate", "max_kl=1", "--gate", "max_kl=2"),
            "--gate max_kl: given twice",
        ),
        (("eval", "m", "--text", "a=x", "--text", "a=y"), "the domain 'a' twice: x and y"),
        (("eval", "m", "--text", "=x"), "not of the form DOMAIN=FILE"),
    ],
)
def test_an_option_without_effect_is_a_mistake(
    compress: Compress, line: tuple[str, ...], says: str
) -> None:
    result = compress(*line)
    assert (result.code, says in result.err) == (2, True), result.err


def test_what_is_no_run_is_not_verified(compress: Compress) -> None:
    Path("empty").mkdir()
    result = compress("verify", "empty")
    assert result.code == 2
    assert "empty is neither a run, which has a report.json, nor a checkpoint" in result.err
    Path("begun").mkdir()
    Path("begun/recipe.lock.yaml").write_text(RECIPE, encoding="utf-8")
    begun = compress("verify", "begun")
    assert (begun.code, "→ compress resume begun" in begun.err) == (2, True)


def test_a_lock_without_its_section_is_no_run(compress: Compress) -> None:
    Path("begun").mkdir()
    Path("begun/recipe.lock.yaml").write_text(RECIPE, encoding="utf-8")
    for line in (["resume", "begun"], ["export", "begun", "--as", "gptq"]):
        result = compress(*line, "-q")
        assert (result.code, "recipe.lock.yaml has no `lock`" in result.err) == (2, True)
    result = compress("r.yaml", "builtin:tiny", "-o", "begun", "-q")
    assert (result.code, "recipe.lock.yaml has no `lock`" in result.err) == (2, True)
