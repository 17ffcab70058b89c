"""What the command line lists and explains, and how little it loads for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor import __version__
from compressor.cli import Settings, cli
from compressor.recipe import recipe_json_schema, shipped_recipes
from compressor.registry import methods
from compressor.report.schema import json_schema
from tests.command import Compress, python

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


def test_version(compress: Compress) -> None:
    assert compress("--version").out == f"compress {__version__}\n"
    assert compress("version", "--format", "json").json == {"version": __version__}


def test_lists(compress: Compress) -> None:
    names = [row["name"] for row in compress("ls", "methods", "--format", "json").json]
    assert names == [method.name for method in methods()]
    rows = compress("--format", "json", "ls", "recipes").json
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(len(row["description"]) > 20 for row in rows)
    assert "quick" in compress("ls", "suites").out
    assert "default" in compress("ls", "mixes").out
    assert "builtin:tiny" in compress("ls", "models").out


def test_show_and_copy(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_schema_is_the_schema(compress: Compress) -> None:
    assert compress("schema").json == recipe_json_schema()
    assert compress("schema", "report", "--format", "json").json == json_schema()


@pytest.mark.parametrize("method", [method.name for method in methods()])
def test_explain_has_words_for_every_option(compress: Compress, method: str) -> None:
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
def test_explain_has_words_for_every_section(compress: Compress, section: str) -> None:
    topic = compress("explain", section, "--format", "json").json
    assert topic["options"]
    assert all(option["what"] for option in topic["options"]), topic


def test_explain_takes_places_of_a_recipe(compress: Compress) -> None:
    bits = compress("explain", "stages.0.bits").out
    own = bits.count("quantize.bnb.bits  (4 | 8")
    assert own == 1
    assert bits.count("quantize.") - own == 1, "rounders share the option: say it once"
    both = compress("explain", "stages.1.grid").out
    assert "quantize.rtn.grid  (" in both
    assert "quantize.gptq.grid  (" in both
    assert "export.format" in compress("explain", "export.0.format").out
    assert compress("explain", "stages.0.bitz").code == 2


def test_explain_knows_families_and_bare_words(compress: Compress) -> None:
    family = compress("explain", "quantize").out
    assert "quantize.hqq  (a stage)" in family
    assert "prune" not in family
    assert compress("explain", "target_bpw").out.startswith("target_bpw: A key of allocate.bits.\n")
    assert compress("explain", "gptq").out == compress("explain", "quantize.gptq").out
    several = compress("explain", "bits").out
    for candidate in ("allocate.bits  (a stage)", "transform.awq.bits  (", "quantize.bnb.bits  ("):
        assert candidate in several
    assert "did you mean 'target_bpw'" in compress("explain", "targt_bpw").err


def test_explain_says_what_a_mapping_is_of(compress: Compress) -> None:
    overview = compress("explain").out
    assert "stages  (list of stage; " in overview
    assert "publish  (mapping of repo, public, pr; " in overview
    assert "text  (mapping of text to text; " in compress("explain", "evaluate").out
    assert "list of mapping of pattern, " in compress("explain", "quantize.rtn.overrides").out


def test_marks_in_a_listing_are_explained(compress: Compress) -> None:
    engines = compress("ls", "engines")
    assert "dense*" in engines.out
    assert "\n* our own tests load such files there" in engines.out
    assert compress("ls", "engines", "--format", "json").json[0]["name"] == "transformers"


def test_explain_lists_and_suggests(compress: Compress) -> None:
    overview = compress("explain").out
    assert "quantize.gptq" in overview
    assert "calibration" in overview
    missed = compress("explain", "quantize.gptq.groupsize")
    assert (missed.code, "'quantize.gptq.group_size'" in missed.err) == (2, True)
    assert compress("explain", "seed", "--format", "json").json["options"][0]["default"] == "0"


def test_doctor_never_tells_a_token(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecretToken")
    result = compress("doctor", "--format", "json")
    assert result.json["hub"]["token"] == "present"
    assert "hf_this" not in result.out + result.err
    assert set(result.json["packages"]) >= {"torch", "transformers"}
    assert compress("doctor").code == 0
