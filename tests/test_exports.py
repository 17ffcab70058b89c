"""Deliverables of a run: several at once, added later, and looked at again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.engine import RunOutcome, export_run, run_recipe
from compressor.errors import PlanError, ResourceError, ResumeError, UsageError
from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_bytes
from compressor.journal import Journal
from compressor.plan import make_plan
from compressor.recheck import verify_folder
from compressor.recipe import load_recipe
from compressor.reload import form_of
from compressor.report.text import to_text
from compressor.resources import builtin_model
from compressor.sections import ExportConfig
from tests import runs
from tests.place import hashes
from tests.runs import TINY, plan, refusals

RECIPE = """\
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
export:
  - {format: gguf, engines: [llama.cpp]}
  - {format: dense}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    return runs.run(tmp_path_factory.mktemp("run"), RECIPE)


def results(folder: Path) -> dict[tuple[str, str], bool | None]:
    return {(check.folder, check.name): check.passed for check in verify_folder(folder)}


def test_all_deliverables_are_in_the_report(finished: RunOutcome) -> None:
    report, folder = finished.report, finished.folder
    assert [item.format for item in report.deliverables] == ["gguf", "dense"]
    first, second = report.deliverables
    assert (first.max_weight_difference, first.max_logit_difference) == (0.0, None)
    assert (second.max_weight_difference, second.max_logit_difference) == (None, 0.0)
    assert first.bytes_on_disk == (folder / first.path / "model.gguf").stat().st_size
    assert report.variants[-1].size.bytes_on_disk == first.bytes_on_disk
    card = (folder / "README.md").read_text()
    assert "llama-server -m deliverable/gguf/model.gguf" in card
    assert "| dense | deliverable/dense |" in card
    assert "no engine loaded it here" in card
    for item in report.deliverables:
        assert f"\n{item.path} " in to_text(report)


def test_a_deliverable_is_added_and_nothing_is_done_again(
    finished: RunOutcome, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = len(Journal(run / "journal.jsonl").events)
    outcome = export_run(run, [ExportConfig(format="gptq"), ExportConfig(format="awq")])
    events = [event["event"] for event in Journal(run / "journal.jsonl").events[before:]]
    assert events == ["run_started", "exported", "exported", "exports_added", "report_written"]
    formats = ["gguf", "dense", "gptq", "awq"]
    assert [item.format for item in outcome.report.deliverables] == formats
    assert "# added by `compress export`: awq" in (run / "recipe.yaml").read_text()
    assert [e.format for e in load_recipe(run / "recipe.lock.yaml").export] == formats
    assert False not in results(run).values()
    with pytest.raises(UsageError, match="gptq already"):
        export_run(run, [ExportConfig(format="gptq")])


def test_the_command_that_began_a_run_goes_on_after_an_export(
    finished: RunOutcome, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    added = export_run(run, [ExportConfig(format="gptq")]).report.deliverables
    lock = (run / "recipe.lock.yaml").read_bytes()
    outcome = run_recipe(runs.load(tmp_path, RECIPE), "builtin:tiny", run)
    assert outcome.report.deliverables == added
    assert (run / "recipe.lock.yaml").read_bytes() == lock
    fewer = runs.load(tmp_path, RECIPE.replace("  - {format: dense}\n", ""))
    with pytest.raises(ResumeError, match=r"export\.1\.format: dense then, absent now"):
        run_recipe(fewer, "builtin:tiny", run)


@pytest.mark.parametrize("error", [ResourceError("no room"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_no_trace(
    finished: RunOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = hashes(run)

    def fail(*_: object) -> None:
        raise error

    found, failing = exporters.exporter, replace(exporters.exporter("awq"), write=fail)
    monkeypatch.setattr(exporters, "exporter", lambda n: failing if n == "awq" else found(n))
    with pytest.raises(type(error)):
        export_run(run, [ExportConfig(format="gptq"), ExportConfig(format="awq")])
    after = hashes(run)
    for files in (before, after):
        files.pop("journal.jsonl")
    assert after == before
    monkeypatch.undo()
    run_recipe(runs.load(tmp_path, RECIPE), "builtin:tiny", run)
    again = export_run(run, [ExportConfig(format="gptq"), ExportConfig(format="awq")])
    assert len(again.report.deliverables) == 4


def test_what_cannot_be_exported_leaves_the_run_as_it_was(finished: RunOutcome) -> None:
    lock = (finished.folder / "recipe.lock.yaml").read_bytes()
    refused = ExportConfig(format="compressed-tensors", form="int-quantized")
    with pytest.raises(PlanError, match="8-bit codes"):
        export_run(finished.folder, [refused])
    with pytest.raises(PlanError, match=r"llama\.cpp does not load gptq"):
        export_run(finished.folder, [ExportConfig(format="gptq", engines=("llama.cpp",))])
    with pytest.raises(UsageError, match="awq already"):
        export_run(finished.folder, [ExportConfig(format="awq"), ExportConfig(format="awq")])
    assert (finished.folder / "recipe.lock.yaml").read_bytes() == lock
    with pytest.raises(ResumeError, match="holds no run"):
        export_run(finished.folder / "deliverable", [ExportConfig(format="gptq")])


def test_codes_that_are_gone_are_not_packed_dense(finished: RunOutcome, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    next(run.glob("stages/*/codes-block-00001*")).unlink()
    with pytest.raises(ResumeError, match=r"no codes of model\.layers\.1\."):
        export_run(run, [ExportConfig(format="gptq")])


def test_a_finished_run_passes_every_check(finished: RunOutcome) -> None:
    found = results(finished.folder)
    assert False not in found.values()
    assert found["gguf", "hash"]
    assert found["gguf", "weights"]
    assert found["gguf", "generation"]  # in transformers, from the file alone
    assert found["dense", "generation"]


def test_a_bare_checkpoint_is_checked_too() -> None:
    found = results(builtin_model("tiny"))
    assert found["tiny", "generation"]
    assert found["tiny", "hash"] is None
    assert found["tiny", "weights"] is None
    assert form_of(builtin_model("tiny")) == "dense"


@pytest.mark.parametrize(
    ("file", "place", "fails"),
    [
        ("gguf/model.gguf", -5000, {"hash", "weights"}),
        ("dense/model-block-00001.safetensors", -5000, {"hash", "weights"}),
        ("dense/tokenizer.json", -2, {"hash", "generation"}),
    ],
)
def test_a_changed_byte_is_found(
    finished: RunOutcome, tmp_path: Path, file: str, place: int, fails: set[str]
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    data = bytearray((run / "deliverable" / file).read_bytes())
    data[place] ^= 0x55
    atomic_write_bytes(run / "deliverable" / file, bytes(data))
    failed = {name for (_, name), passed in results(run).items() if passed is False}
    assert failed == fails


def test_a_truncated_file_ends_the_checks(finished: RunOutcome, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    path = run / "deliverable" / "dense" / "model-block-00002.safetensors"
    atomic_write_bytes(path, path.read_bytes()[:-10])
    found = results(run)
    assert found["dense", "files"] is False
    assert ("dense", "values") not in found


def compress(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_tells(finished: RunOutcome, tmp_path: Path) -> None:
    done = compress("verify", finished.folder, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert {check["name"] for check in json.loads(done.stdout)} >= {"hash", "weights"}
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (run / "deliverable" / "gguf" / "model.gguf").unlink()
    failed = compress("verify", run)
    assert failed.returncode == 1
    assert "gguf: files" in failed.stderr
    unknown = compress("export", run, "--as", "coreml")
    assert unknown.returncode == 2
    assert "compress ls formats" in unknown.stderr


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("{format: gguf, engines: [vllm]}", "vllm does not load gguf"),
        ("{format: gptq, engines: [transformers, llama.cpp]}", "llama.cpp does not load gptq"),
        ("{format: compressed-tensors, engines: [vllm, llama.cpp]}", "does not load pack"),
    ],
)
def test_the_plan_refuses_engines_that_cannot(tmp_path: Path, export: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"stages:\n  - {{method: quantize.rtn, group_size: 64}}\nexport:\n  - {export}\n"
    )
    config = json.loads((builtin_model("tiny") / "config.json").read_text())
    with pytest.raises(PlanError, match=says):
        make_plan(load_recipe(path), config, "builtin:tiny")


SERVED = """\
engines: [{engines}]
stages:
  - {{method: quantize.rtn, group_size: {group}}}
export: [{exports}]
"""
BOTH = "{format: compressed-tensors}, {format: gguf}"


@pytest.mark.parametrize(
    ("engines", "group", "exports", "says"),
    [
        ("vllm, llama.cpp", 64, BOTH, None),
        ("vllm", 64, BOTH, None),
        ("vllm, llama.cpp", 64, "{format: compressed-tensors}", r"^llama\.cpp would load none"),
        ("vllm, llama.cpp", 64, "{format: gguf}", r"^vllm would load none of the deliverables \(g"),
        ("sglang", 64, BOTH, None),
        ("transformers", 64, "", "there are none"),
        ("vllm", 64, "{format: dense}", None),
    ],
)
def test_every_engine_of_a_recipe_is_served(
    tmp_path: Path, engines: str, group: int, exports: str, says: str | None
) -> None:
    text = SERVED.format(engines=engines, group=group, exports=exports)
    if says is None:
        plan(tmp_path, text, TINY)
        return
    (problem,) = refusals(tmp_path, text, TINY)
    assert re.search(says, problem.message)
    assert (problem.line, problem.column) == (1, 10)
    assert "out of `engines`" in problem.hint


def test_the_grid_of_a_chain_decides_whom_it_serves(tmp_path: Path) -> None:
    """Mutants of one recipe: 3 bits, rounded embeddings and a rounded cache serve fewer engines."""
    text = SERVED.format(engines="vllm-cpu", group=64, exports="{format: compressed-tensors}")
    plan(tmp_path, text, TINY)
    for change, says in (
        ("stages.0.bits=3", "3-bit codes"),
        ("stages.0.embeddings=quantize", "quantized embedding"),
    ):
        (problem,) = refusals(tmp_path, text, TINY, change)
        assert says in problem.message
    cached = text.replace("export:", "  - {method: quantize.kv}\nexport:")
    (problem,) = refusals(tmp_path, "calibration: {samples: 2, length: 64}\n" + cached, TINY)
    assert "cut keys and values" in problem.message


def test_a_model_that_gguf_cannot_hold_is_refused_before_work(tmp_path: Path) -> None:
    model = Path(shutil.copytree(builtin_model("tiny"), tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match="cutting words"):
        run_recipe(load_recipe(tmp_path / "recipe.yaml"), str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
