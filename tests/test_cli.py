"""The command line: what it prints where, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor import console, resources
from compressor.cli import INTERRUPTED, cli
from compressor.commands.running import default_out
from compressor.errors import (
    AccessError,
    CompressorError,
    GateFailed,
    GateInconclusive,
    PlanError,
    RecipeError,
    ResourceError,
    UsageError,
    VerificationError,
)
from tests.command import Compress, python

GOOD = "stages:\n  - method: quantize.rtn\n    group_size: 64\n"


# ---------------------------------------------------------------------- plan


def test_plan_for_people_and_programs(compress: Compress) -> None:
    human = compress("plan", "quickstart", "builtin:tiny")
    assert human.code == 0
    assert "quantize.gptq" in human.out
    assert "4.250" in human.out
    assert "5,491,520" in human.out.splitlines()[0]
    assert "5,245,760" in human.out.splitlines()[3]
    data = compress("plan", "quickstart", "builtin:tiny", "--format", "json").json
    assert [stage["method"] for stage in data["stages"]] == [
        "prune.obs", "quantize.gptq", "draft.standalone",
    ]  # fmt: skip
    assert data["stages"][1]["bits_linear"] == 4.25
    low = compress("plan", "w4-rtn", "builtin:tiny", "--set", "stages.0.bits=3", "--format=json")
    assert low.json["stages"][0]["bits_nominal"] == 3


def test_a_broken_recipe_is_reported_with_its_place(compress: Compress, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(GOOD.replace("group_size", "groupsize"), encoding="utf-8")
    result = compress("plan", str(path), "builtin:tiny")
    assert result.code == 2
    assert result.out == ""
    assert f"{path}:3:5: unknown key 'groupsize' in quantize.rtn" in result.err
    assert "Traceback" not in result.err
    data = compress("plan", str(path), "builtin:tiny", "--format", "json").json
    assert (data["error"], data["exit_code"]) == ("RecipeError", 2)
    assert [(p["line"], p["column"]) for p in data["problems"]] == [(3, 5)]


def test_mistakes_that_were_taken_for_ours(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{method: quantize.bnb, bits: 3, group_size: 48}]\n")
    result = compress("plan", recipe, "builtin:tiny")
    assert result.code == 2
    assert "4 or 8" in result.err
    assert "32, 64, 128, 256 or 512" in result.err
    file = compress("plan", "w4-rtn", str(recipe))
    assert file.code == 2
    assert "is a file" in file.err
    (tmp_path / "mine.gguf").write_text("mine")
    taken = compress("imatrix", "builtin:tiny", "-o", tmp_path / "mine.gguf")
    assert taken.code == 2
    assert "exists already" in taken.err


def test_a_folder_is_no_recipe(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for words in (["plan", "folder"], ["plan", "./folder"], ["folder"]):
        result = compress(*words, "builtin:tiny", *(["-o", "out"] if len(words) == 1 else []))
        assert result.code == 2
        assert "'folder' is a folder; a recipe is a YAML file" in result.err
        assert "compress ls recipes" in result.err
    (tmp_path / "folder" / "recipe.lock.yaml").touch()  # of a run, which has one inside
    assert "compress resume folder" in compress("plan", "folder", "builtin:tiny").err
    assert not (tmp_path / "out").exists()


def test_a_stage_without_a_method_is_told_where_to_find_one(
    compress: Compress, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  - bits: 4\n", encoding="utf-8")
    result = compress("plan", str(path), "builtin:tiny")
    assert result.code == 2
    assert f"{path}:2:5: an entry of stages needs the key 'method'" in result.err
    assert "compress ls methods" in result.err


def test_a_file_is_no_place_for_a_run(compress: Compress, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    result = compress("quickstart", "builtin:tiny", "-o", str(file))
    assert (result.code, "is a file" in result.err) == (2, True)
    below = compress("quickstart", "builtin:tiny", "-o", str(file / "below"))
    assert (below.code, f"cannot write {file}/below: Not a directory" in below.err) == (3, True)
    assert file.read_text(encoding="utf-8") == "mine"


def test_an_impossible_chain_is_refused_by_the_plan(compress: Compress, tmp_path: Path) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text(GOOD.replace("64", "256"), encoding="utf-8")
    result = compress("plan", str(path), "builtin:tiny")
    assert result.code == 2
    assert f"{path}:3:17: quantize.rtn.group_size: groups of 256 do not divide" in result.err
    assert compress("plan", "quickstart", "builtin:huge").code == 2


# ---------------------------------------------------------------------- routing


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of `run`, recorded instead of carried out."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(cli.commands["run"], "callback", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    "args",
    [
        ["quickstart", "builtin:tiny"],
        ["run", "quickstart", "builtin:tiny"],
        ["recipes/quickstart.yaml", "builtin:tiny"],
        ["./anything.yml", "builtin:tiny"],
    ],
)
def test_a_recipe_in_first_place_means_run(
    compress: Compress, routed: list[dict[str, Any]], args: list[str]
) -> None:
    result = compress(*args, "--set", "stages.0.bits=3", "--set", "seed=1", "-o", "out")
    assert result.code == 0, result.err
    assert routed[0]["recipe"] == args[-2]
    assert routed[0]["model"] == "builtin:tiny"
    assert routed[0]["overrides"] == ("stages.0.bits=3", "seed=1")
    assert routed[0]["out"] == Path("out")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["paln", "a", "b"], "Did you mean 'plan'?"),
        (["quickstrat", "builtin:tiny"], "Did you mean 'quickstart'?"),
        (["zzz"], "No command and no recipe is called 'zzz'."),
        (["plan"], "Missing argument 'RECIPE'"),
        (["quickstart"], "Missing argument 'MODEL'"),
        (["ls", "method"], "'methods'"),
        (["--nope"], "No such option"),
        (["plan", "quickstart", "builtin:tiny", "--sett", "a=1"], "--set"),
        (["resume", "no/such/folder"], "does not exist"),
    ],
)
def test_usage_errors(compress: Compress, args: list[str], words: str) -> None:
    result = compress(*args)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_no_arguments_show_help(compress: Compress) -> None:
    result = compress()
    assert result.code == 2
    assert "compress RECIPE MODEL" in result.out + result.err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin:tiny", "r-tiny"),
        ("org/Name-1B@main", "r-Name-1B"),
        ("./some/folder/", "r-folder"),
        (".", "r-."),
    ],
)
def test_the_default_directory_follows_from_the_command(model: str, name: str) -> None:
    assert default_out("r", model) == Path("runs") / name


# ---------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CompressorError("m", "h"), 1),
        (VerificationError("m", "h"), 1),
        (UsageError("m", "h"), 2),
        (RecipeError([]), 2),
        (PlanError([]), 2),
        (ResourceError("m", "h"), 3),
        (GateFailed("m", "h"), 4),
        (GateInconclusive("m", "h"), 5),
        (AccessError("m", "h"), 6),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_exit_code(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli.commands["run"], "callback", fail)
    result = compress("quickstart", "builtin:tiny")
    assert result.code == code
    assert "Traceback" not in result.err
    if isinstance(error, CompressorError) and error.hint:
        assert "→ h" in result.err


@pytest.mark.parametrize("flag", ["", "-v"])
def test_a_crash_is_one_line_and_a_log(tmp_path: Path, flag: str) -> None:
    code = f"""
import compressor.cli as cli
def crash(**_):
    raise RuntimeError("boom")
cli.cli.commands["run"].callback = crash
cli.main(["quickstart", "builtin:tiny", {flag!r}] if {flag!r} else ["quickstart", "builtin:tiny"])
"""
    done = python(code, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr
    assert "this is a bug" in done.stderr
    assert ("Traceback" in done.stderr) is bool(flag)
    (log,) = tmp_path.glob("compress-crash-*.log")
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert str(log) in done.stderr


def test_no_color(monkeypatch: pytest.MonkeyPatch, compress: Compress) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in compress("show", "nothing").err


def test_completion_script() -> None:
    code = "from compressor.cli import main; main([])"
    done = python(code, _COMPRESS_COMPLETE="bash_source")
    assert "_COMPRESS_COMPLETE=bash_complete" in done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compress pl", {"plan"}),
        ("compress qui", {"quickstart"}),
        ("compress plan w4-", {path.stem for path in resources.recipes().glob("w4-*.yaml")}),
        ("compress show quick", {"quick", "quickstart"}),
        ("compress explain quantize.gptq.b", {"quantize.gptq.bits", "quantize.gptq.block_size"}),
    ],
)
def test_completion(line: str, words: set[str]) -> None:
    code = "from compressor.cli import main; main([])"
    position = str(len(line.split()) - 1)
    done = python(code, _COMPRESS_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=position)
    found = [entry.split(",") for entry in done.stdout.splitlines()]
    assert {word for kind, word in found if kind == "plain"} == words


# ---------------------------------------------------------------------- the world outside


@pytest.mark.parametrize(
    "args", [["plan"], ["report", "nowhere"], ["ls", "nothing"], ["no-such-command"]], ids=" ".join
)
def test_a_usage_error_is_json_too(compress: Compress, args: list[str]) -> None:
    result = compress("--format", "json", *args)
    assert result.code == 2
    assert result.json["error"] == "UsageError"
    assert result.json["exit_code"] == 2


def test_a_path_that_cannot_be_written_is_one_sentence(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    result = compress("copy", "quickstart", str(tmp_path / "file" / "below.yaml"))
    assert result.code == 3
    assert result.err == f"error: {tmp_path / 'file' / 'below.yaml'}: Not a directory\n"


def test_no_memory(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: str) -> Path:
        raise MemoryError

    monkeypatch.setattr(console, "shipped_file", exhausted)
    assert compress("show", "quickstart").code == 3


def test_a_reader_that_leaves_early_hears_no_complaint() -> None:
    code = "from compressor.cli import main; main(['schema'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
