"""The command line: what it prints where, with which exit code, and how little it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from compressor import __version__, console, resources
from compressor.cli import INTERRUPTED, Settings, cli, main
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
from compressor.progress import PlainObserver, RichObserver, SilentObserver, observer
from compressor.recipe import recipe_json_schema, shipped_recipes
from compressor.registry import methods
from compressor.report.schema import json_schema

GOOD = "stages:\n  - method: quantize.rtn\n    group_size: 64\n"


class Result:
    """Exit code and both streams of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `main` in this process."""

    def call(*args: str) -> Result:
        hook = sys.excepthook
        try:
            with pytest.raises(SystemExit) as caught:
                main(list(args))
        finally:
            sys.excepthook = hook
        streams = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, streams.out, streams.err)

    return call


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


# ---------------------------------------------------------------------- light

LIGHT = [
    ["--help"],
    ["--version"],
    ["run", "--help"],
    ["ls", "methods"],
    ["ls", "recipes"],
    ["ls", "suites"],
    ["ls", "mixes"],
    ["ls", "models"],
    ["show", "quickstart"],
    ["schema"],
    ["explain", "quantize.gptq"],
    ["run", "no-such-recipe", "builtin:tiny"],
]


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_commands_that_compute_nothing_load_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from compressor.cli import main
try:
    main({args!r})
except SystemExit as exit:
    print("code", exit.code, file=sys.stderr)
heavy = {{"torch", "transformers", "datasets", "scipy", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert f"code {2 if 'no-such-recipe' in args else 0}" in done.stderr


def test_help_needs_neither_pydantic_nor_yaml() -> None:
    done = python(
        "import sys, compressor.cli\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "assert not {'pydantic', 'ruamel', 'rich', 'numpy'} & roots"
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- what there is


def test_every_command_has_a_sentence_of_help() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        result = CliRunner().invoke(cli, [name, "--help"], obj=Settings())
        assert result.exit_code == 0
        assert command.help.split()[0] in result.output


def test_version(compress: Any) -> None:
    assert compress("--version").out == f"compress {__version__}\n"
    assert compress("version", "--format", "json").json == {"version": __version__}


def test_lists(compress: Any) -> None:
    names = [row["name"] for row in compress("ls", "methods", "--format", "json").json]
    assert names == [method.name for method in methods()]
    rows = compress("--format", "json", "ls", "recipes").json
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(len(row["description"]) > 20 for row in rows)
    assert "quick" in compress("ls", "suites").out
    assert "default" in compress("ls", "mixes").out
    assert "builtin:tiny" in compress("ls", "models").out


def test_show_and_copy(compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = compress("show", "quickstart")
    assert compress("copy", "quickstart").code == 0
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == shown.out
    again = compress("copy", "quickstart")
    assert again.code == 2
    assert "exists already" in again.err
    (tmp_path / "deep").mkdir()
    assert compress("copy", "w4-gptq", "deep").code == 0
    assert (tmp_path / "deep" / "w4-gptq.yaml").is_file()
    rules = json.loads((tmp_path / "deep" / "schema.json").read_text(encoding="utf-8"))
    assert rules == compress("schema").json, "the modeline of a recipe points at its schema"
    missed = compress("show", "quickstrat")
    assert (missed.code, "did you mean 'quickstart'" in missed.err) == (2, True)


def test_schema_is_the_schema(compress: Any) -> None:
    assert compress("schema").json == recipe_json_schema()
    assert compress("schema", "report", "--format", "json").json == json_schema()


@pytest.mark.parametrize("method", [method.name for method in methods()])
def test_explain_has_words_for_every_option(compress: Any, method: str) -> None:
    topic = compress("explain", method, "--format", "json").json
    assert topic["source"]
    of_family = {"quantize": {"bits", "group_size", "targets"}}.get(method.partition(".")[0], set())
    if method == "quantize.kv":  # it rounds no weight
        of_family = {"format", "headroom"}
    assert {option["name"] for option in topic["options"]} >= of_family
    for option in topic["options"]:
        assert option["what"].endswith("."), option
        assert option["accepts"], option
        one = compress("explain", f"{method}.{option['name']}", "--format", "json").json
        assert one["options"] == [option]


@pytest.mark.parametrize("section", ["calibration", "evaluate", "gates", "export", "lock"])
def test_explain_has_words_for_every_section(compress: Any, section: str) -> None:
    topic = compress("explain", section, "--format", "json").json
    assert topic["options"]
    assert all(option["what"] for option in topic["options"]), topic


def test_explain_takes_places_of_a_recipe(compress: Any) -> None:
    bits = compress("explain", "stages.0.bits").out
    own = bits.count("quantize.bnb.bits  (4 | 8")
    assert own == 1
    assert bits.count("quantize.") - own == 1, "rounders share the option: say it once"
    both = compress("explain", "stages.1.grid").out
    assert "quantize.rtn.grid  (" in both
    assert "quantize.gptq.grid  (" in both
    assert "export.format" in compress("explain", "export.0.format").out
    assert compress("explain", "stages.0.bitz").code == 2


def test_explain_lists_and_suggests(compress: Any) -> None:
    overview = compress("explain").out
    assert "quantize.gptq" in overview
    assert "calibration" in overview
    missed = compress("explain", "quantize.gptq.groupsize")
    assert (missed.code, "'quantize.gptq.group_size'" in missed.err) == (2, True)
    assert compress("explain", "seed", "--format", "json").json["options"][0]["default"] == "0"


def test_doctor_never_tells_a_token(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecretToken")
    result = compress("doctor", "--format", "json")
    assert result.json["hub"]["token"] == "present"
    assert "hf_this" not in result.out + result.err
    assert set(result.json["packages"]) >= {"torch", "transformers"}
    assert compress("doctor").code == 0


# ---------------------------------------------------------------------- plan


def test_plan_for_people_and_programs(compress: Any) -> None:
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


def test_a_broken_recipe_is_reported_with_its_place(compress: Any, tmp_path: Path) -> None:
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


def test_an_impossible_chain_is_refused_by_the_plan(compress: Any, tmp_path: Path) -> None:
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
    compress: Any, routed: list[dict[str, Any]], args: list[str]
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
def test_usage_errors(compress: Any, args: list[str], words: str) -> None:
    result = compress(*args)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_no_arguments_show_help(compress: Any) -> None:
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
    compress: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
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


def test_no_color(monkeypatch: pytest.MonkeyPatch, compress: Any) -> None:
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
def test_a_usage_error_is_json_too(compress: Any, args: list[str]) -> None:
    result = compress("--format", "json", *args)
    assert result.code == 2
    assert result.json["error"] == "UsageError"
    assert result.json["exit_code"] == 2


def test_a_path_that_cannot_be_written_is_one_sentence(compress: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text", encoding="utf-8")
    result = compress("copy", "quickstart", str(tmp_path / "file" / "below.yaml"))
    assert result.code == 3
    assert result.err == f"error: {tmp_path / 'file' / 'below.yaml'}: Not a directory\n"


def test_no_memory(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---------------------------------------------------------------------- gates, numbers


def test_gates_from_options_and_files(tmp_path: Path) -> None:
    from compressor.compare import read_gates

    path = tmp_path / "margins.yaml"
    path.write_text("max_kl: 0.5\nmin_top1_agreement: 0.9\n", encoding="utf-8")
    limits = read_gates([str(path), "max_kl=0.1"])
    assert (limits.max_kl, limits.min_top1_agreement, limits.max_bytes) == (0.1, 0.9, None)
    with pytest.raises(RecipeError, match="--gate max_k: unknown key 'max_k' in gates"):
        read_gates(["max_k=0.1"])
    path.write_text("max_kl: -1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"margins\.yaml:1:9: max_kl in gates|margins"):
        read_gates([str(path)])


def test_bad_evaluation_options(compress: Any) -> None:
    result = compress("eval", "builtin:tiny", "--length", "3", "--documents", "0")
    assert result.code == 2
    assert "--length" in result.err
    assert "--documents" in result.err
    assert "greater than or equal to" not in result.err, "the validator's words are not ours"
    result = compress("eval", "builtin:tiny", "--text", "mine.txt")
    assert (result.code, "DOMAIN=FILE" in result.err) == (2, True)


def test_models_with_different_tokenizers_are_not_compared(compress: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(resources.builtin_model("tiny"), other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    result = compress("compare", "builtin:tiny", str(other), "--documents", "1", "--length", "64")
    assert result.code == 2
    assert "different tokenizers" in result.err


def test_comparing_a_model_with_itself(compress: Any, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    args = ["compare", "builtin:tiny", "builtin:tiny", "--text", f"words={text}", "--length", "64"]
    result = compress(*args, "--gate", "max_kl=0.001", "--format", "json", "-q")
    assert result.code == 0, result.err
    assert result.json["verdict"] == "PASS"
    base, same = result.json["evaluations"]
    assert base["overall"]["perplexity"] == same["overall"]["perplexity"]
    assert abs(same["overall"]["divergence"]["mean"]["value"]) < 1e-6
    assert result.err == ""
    human = compress(*args, "-q")
    assert "builtin:tiny" in human.out
    assert "worst: words, KL " in human.out
    assert human.out.count("100.0%") == 2  # the model and its domain choose the same tokens


def test_a_run_from_the_first_line_to_the_report(compress: Any, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    out = tmp_path / "run"
    line = ["w4-rtn", "builtin:tiny", "-o", str(out), "-q", "--set", "evaluate.length=64"]
    line += ["--set", f"evaluate.text.words={text}", "--set", "evaluate.noise_floor=false"]
    failed = compress(*line, "--set", "gates.max_kl=0", "--format", "json")
    assert failed.code == 4, failed.err
    assert failed.json["verdict"] == "FAIL"
    assert failed.json["report"]["run"]["command"].startswith("compress w4-rtn builtin:tiny")
    assert "a quality gate failed" in failed.err
    assert str(out / "report.html") in failed.err
    assert compress("resume", str(out), "-q").code == 4  # nothing left to do, the same verdict
    other = compress(*line, "--set", "stages.0.bits=3")
    assert other.code == 2
    assert "Traceback" not in other.err
    page = compress("report", str(out), "--as", "html").out
    assert page.rstrip() == (out / "report.html").read_text(encoding="utf-8").rstrip()
    assert compress("report", str(out), "--format", "json").json["verdict"] == "FAIL"
    assert compress("report", str(tmp_path)).code == 2
    assert compress("resume", str(tmp_path)).code == 2


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (4.85e6, "4.85 MB"), (2e15, "2e+03 TB")],
)
def test_sizes_in_words(number: float, text: str) -> None:
    assert console.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


# ---------------------------------------------------------------------- progress


def test_observers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with observer(quiet=True) as silent:
        assert isinstance(silent, SilentObserver)
        silent.event("stage", stage="x")
    with observer(quiet=False) as plain:
        assert isinstance(plain, PlainObserver)
        plain.event("stage", stage="01")
        with plain.task("blocks", 2) as task:
            task.advance()
            task.advance()
    streams = capsys.readouterr()
    assert streams.out == ""
    first, last = streams.err.splitlines()
    assert first == "stage  stage=01"
    assert last.startswith("blocks  2/2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with observer(quiet=False) as bars:
        assert isinstance(bars, RichObserver)
        bars.event("stage", stage="01")
        with bars.task("blocks", 2) as task:
            task.advance(2)


def test_the_runner_sees_the_same_group() -> None:
    assert isinstance(cli, click.Group)
