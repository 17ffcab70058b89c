"""Runs: refused, repeated, interrupted, corrupted, judged, and what their reports say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.evaluation import probe
from compressor.formats.sizes import measure
from compressor.journal import Journal
from compressor.model.load import read_config
from compressor.plan import make_plan
from compressor.provenance import file_sha256
from compressor.recipe import load_recipe
from compressor.report.numbers import size
from tests.command import Compress
from tests.helpers import files_end_at
from tests.place import (
    PARTS,
    RECIPE,
    STAGE,
    Place,
    finished,
    hashes,
    lines,
    place,
    products,
    report,
    rewind,
    spoil,
)

__all__ = ["finished", "place"]  # fixtures


# ---------------------------------------------------------------------- the same run again


def test_a_finished_run_does_nothing(place: Place, compress: Compress) -> None:
    files = [path for part in PARTS for path in (place.run / part).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    done, was = lines(place.run), report(place.run)
    assert compress(*place.line, "-q").code == 0
    assert lines(place.run) == [*done, "run_started", "report_written"]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    now = report(place.run)
    assert now["run"].pop("resumed") == was["run"].pop("resumed") + 1
    for varying in ("command", "seconds"):
        now["run"].pop(varying), was["run"].pop(varying)
    assert now["run"] == was["run"]
    assert now["variants"] == was["variants"]
    assert now["verdict"] == was["verdict"]


def test_a_changed_recipe_is_refused_by_what_changed(place: Place, compress: Compress) -> None:
    before = hashes(place.run)
    result = compress(*place.line, "--set", "stages.0.bits=3", "--set", "seed=7")
    assert result.code == 2
    assert "run holds a run of something else" in result.err
    assert "stages.0.bits: 4 then, 3 now" in result.err
    assert "seed: 0 then, 7 now" in result.err
    assert result.err.count(" then, ") == 2
    assert hashes(place.run) == before


def test_a_run_that_knows_nothing_of_a_gpu_goes_on(place: Place, compress: Compress) -> None:
    """Journals of before the memory of GPUs was measured."""
    journal = place.run / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in events:
        event.pop("device_peak_bytes", None)
    journal.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert compress(*place.line, "-q").code == 0
    (stage,) = [one["stage"] for one in report(place.run)["variants"] if one["stage"]]
    assert stage["device_peak_bytes"] == 0


def test_what_the_plan_remarks_is_said_as_the_stage_begins(
    compress: Compress, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "stages:\n"
        "  - {method: quantize.rtn, group_size: 64, overrides: [{pattern: mlp, bits: 8}]}\n"
        "evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}\n"
        "export: [{format: dense}]\n"
    )
    said = compress(recipe, "builtin:tiny", "-o", tmp_path / "run").err
    assert "stage=01-quantize.rtn  text=grids and their numbers of matrices: " in said


def test_a_folder_of_somebody_elses_is_left_alone(
    place: Place, compress: Compress, tmp_path: Path
) -> None:
    mine = tmp_path / "project"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    result = compress(*place.line[:-1], mine, "-q")
    assert result.code == 2
    assert "holds README.md, and no run that could go on" in result.err
    assert [path.name for path in mine.iterdir()] == ["README.md"]
    assert (mine / "README.md").read_text() == "mine"


def test_what_a_recipe_calls_itself_is_no_change(place: Place, compress: Compress) -> None:
    place.recipe.write_text(f"name: other\ndescription: Other words.\n{RECIPE}", encoding="utf-8")
    assert compress(*place.line, "-q").code == 0


def test_changed_weights_are_refused(place: Place, compress: Compress) -> None:
    weights = place.model / "model.safetensors"
    was = file_sha256(weights)
    spoil(weights, "model.norm.weight", lambda tensor: tensor * 1.5)
    result = compress(*place.line)
    assert result.code == 2
    changed = f"lock.weights.model.safetensors: {was} then, {file_sha256(weights)} now"
    assert changed in result.err
    assert result.err.count(" then, ") == 1


# ---------------------------------------------------------------------- the lock file


def test_a_lock_file_repeats_the_run(place: Place, tmp_path: Path, compress: Compress) -> None:
    lock = place.run / "recipe.lock.yaml"
    assert compress(lock, place.model, "-o", "again", "-q").code == 0
    assert products(Path("again")) == products(place.run)
    again, was = report(Path("again")), report(place.run)
    assert [v["size"] for v in again["variants"]] == [v["size"] for v in was["variants"]]


def test_a_lock_file_refuses_another_model(place: Place, compress: Compress) -> None:
    weights = place.model / "model.safetensors"
    spoil(weights, "model.norm.weight", lambda tensor: tensor * 1.5)
    result = compress(place.run / "recipe.lock.yaml", place.model, "-o", "again")
    assert result.code == 2
    assert "the lock file was made of something else" in result.err
    assert "lock.weights.model.safetensors" in result.err
    assert not (Path("again") / "recipe.lock.yaml").exists()


def test_an_edited_lock_file_is_refused(place: Place, compress: Compress) -> None:
    """What a lock pins is checked, not only carried along."""
    lock = place.run / "recipe.lock.yaml"
    text = lock.read_text(encoding="utf-8")
    assert "samples: 2" in text
    Path("edited.yaml").write_text(text.replace("samples: 2", "samples: 3"), encoding="utf-8")
    result = compress("edited.yaml", place.model, "-o", "again")
    assert result.code == 2
    assert "lock.calibration_sha256" in result.err


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.lock.yaml"])
@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_recipe_that_was_edited_in_its_run_is_refused(
    place: Place, compress: Compress, name: str, command: str
) -> None:
    written = place.run / name
    text = written.read_text(encoding="utf-8")
    written.write_text(text.replace("bits: 4", "bits: 3"), encoding="utf-8")
    before = hashes(place.run)
    result = compress(*(place.line if command == "run" else ["resume", place.run]))
    assert result.code == 2
    assert f"{written} was changed since the run wrote it" in result.err
    assert f"compress {written} MODEL -o DIR" in result.err
    assert hashes(place.run) == before
    written.write_text(text, encoding="utf-8")
    assert compress("resume", place.run).code == 0


# ---------------------------------------------------------------------- disk, processes, signals


def test_a_full_disk_is_refused_before_anything_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch, compress: Compress
) -> None:
    usage = namedtuple("usage", "total used free")
    plan = make_plan(load_recipe(place.recipe), read_config(place.model), "model")
    monkeypatch.setattr(
        "compressor.engine.shutil.disk_usage", lambda _: usage(10**12, 10**12, plan.disk_bytes - 1)
    )
    result = compress(place.recipe, place.model, "-o", "new/deep")
    assert result.code == 3
    assert f"the run needs {size(plan.disk_bytes)} of disk and " in result.err
    assert not Path("new").exists()
    # What a run has written already counts as free.
    assert compress(*place.line, "-q").code == 0


def test_a_disk_that_fills_up_leaves_a_run_that_goes_on(place: Place, compress: Compress) -> None:
    """No file may grow beyond what half a block takes; then there is room again."""
    block = place.run / "stages" / STAGE / "model-block-00000.safetensors"
    with files_end_at(block.stat().st_size // 2):
        full = compress(*place.line[:-1], "full", "-q")
    assert full.code == 3
    (sentence, help_) = full.err.strip().splitlines()
    assert sentence.startswith("error: cannot write ")
    assert sentence.endswith("File too large")
    assert "the same command goes on where it stopped" in help_
    assert not [path for path in Path("full").rglob(".*") if path.name != ".lock"]
    assert compress(*place.line[:-1], "full", "-q").code == 0
    assert products(Path("full")) == products(place.run)


def _until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_interrupted_then_resumed(place: Place, compress: Compress) -> None:
    """Ctrl-C in the middle of a stage; meanwhile nobody else may write the same folder."""
    command = [sys.executable, "-m", "compressor.cli", "r.yaml", "model", "-o", "cut", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    journal = Path("cut/journal.jsonl")
    _until(lambda: journal.exists() and "block_done" in journal.read_text("utf-8"), process)
    process.send_signal(signal.SIGSTOP)
    second = compress("r.yaml", "model", "-o", "cut")
    assert second.code == 2
    assert "another process is writing cut" in second.err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; a run is resumed by the same command" in err
    assert "Traceback" not in err
    assert lines(Path("cut"))[-1] == "interrupted"
    assert "stage_done" not in lines(Path("cut"))

    assert compress("r.yaml", "model", "-o", "cut", "-q").code == 0
    done = lines(Path("cut"))
    assert done.count("block_done") == 4
    assert done.count("run_started") == 2
    assert report(Path("cut"))["run"]["resumed"] == 1
    assert products(Path("cut")) == products(place.run)


def test_without_its_activations_a_stage_cannot_go_on(place: Place, compress: Compress) -> None:
    rewind(place.run, "block_done")
    result = compress("resume", place.run)
    assert result.code == 2
    assert "holds no saved activations" in result.err


# ---------------------------------------------------------------------- verification


@pytest.mark.parametrize(
    ("part", "tensor", "change", "sentence"),
    [
        (
            "00001",
            "model.layers.1.input_layernorm.weight",
            lambda tensor: tensor + 1,
            "model.layers.1.input_layernorm.weight was not to be changed, but differs",
        ),
        (
            "00002",
            "model.layers.2.mlp.up_proj.weight",
            lambda tensor: tensor * float("nan"),
            "model.layers.2.mlp.up_proj.weight holds a NaN",
        ),
        (
            "00003",
            "model.layers.3.self_attn.q_proj.weight",
            lambda tensor: tensor * 0,
            "model.layers.3.self_attn.q_proj.weight is all zero",
        ),
    ],
    ids=["changed", "nan", "zero"],
)
def test_a_corrupted_shard_is_named(
    place: Place,
    compress: Compress,
    part: str,
    tensor: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    sentence: str,
) -> None:
    rewind(place.run, "stage_done")
    spoil(place.run / "stages" / STAGE / f"model-block-{part}.safetensors", tensor, change)
    result = compress(*place.line)
    assert result.code == 1
    assert f"{STAGE}: the checkpoint breaks 1 promises" in result.err
    assert sentence in result.err
    assert lines(place.run)[-1] == "run_started"


def test_a_truncated_shard_is_named(place: Place, compress: Compress) -> None:
    rewind(place.run, "stage_done")
    shard = place.run / "stages" / STAGE / "model-block-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    result = compress(*place.line)
    assert result.code == 2
    assert shard.name in result.err
    assert "files of the run were changed; restore them" in result.err


def test_weights_that_left_their_codes_are_not_packed(place: Place, compress: Compress) -> None:
    rewind(place.run, "evaluated")
    shutil.rmtree(place.run / "deliverable")
    name = "model.layers.0.mlp.down_proj.weight"
    spoil(place.run / "stages" / STAGE / "model-block-00000.safetensors", name, lambda w: w * 1.5)
    result = compress(*place.line)
    assert result.code == 1
    assert f"{name} was changed after it was rounded to its codes" in result.err


@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_deliverable_that_is_not_what_was_verified_is_written_again(
    place: Place, compress: Compress, how: str
) -> None:
    folder = place.run / "deliverable" / "compressed-tensors"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if how == "deleted":
        shutil.rmtree(folder)
    else:
        (shard,) = folder.glob("*.safetensors")
        spoil(shard, "model.layers.0.mlp.down_proj.weight_scale", lambda scale: scale * 1.01)
    assert compress(*place.line).code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
def test_results_that_are_not_whole_are_measured_again(
    place: Place, compress: Compress, how: str
) -> None:
    folder = place.run / "evaluations"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "cut":
        os.truncate(folder / "base.npz", 100)
        os.truncate(folder / f"{STAGE}.json", 100)
    else:
        (folder / "base.json").write_text("{}", encoding="utf-8")
        (folder / f"{STAGE}.npz").write_bytes(b"something else")
    assert compress(*place.line).code == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == after.keys()
    scores = f"{STAGE}.npz"
    assert after[scores] == before[scores]


def test_what_is_refused_before_work_leaves_no_folder(place: Place, compress: Compress) -> None:
    (place.model / "tokenizer.json").unlink()
    result = compress(place.recipe, place.model, "-o", "new")
    assert (result.code, "tokenizer" in result.err) == (2, True)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ("{text: {mine: t.txt}, suite: nosuch}", "no evaluation suite 'nosuch'"),
        ("{text: {mine: t.txt}, suite: ./bad.yaml}", "bad.yaml"),
        ("{text: {mine: latin.txt}}", "latin.txt is not UTF-8 text"),
        ("{text: {mine: blank.txt}}", "blank.txt holds no text"),
        ("{text: {mine: t.txt}, protocol: gptq}", "fewer than one window"),
        ("{length: 4096}", "evaluate.length is 4096, but the model's context holds"),
    ],
)
def test_evaluations_that_cannot_be_made_leave_no_folder(
    place: Place, compress: Compress, evaluate: str, says: str
) -> None:
    Path("t.txt").write_text("A short text.", encoding="utf-8")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("blank.txt").write_text(" \n", encoding="utf-8")
    Path("bad.yaml").write_text("domains: 3", encoding="utf-8")
    recipe = f"stages: [{{method: quantize.rtn, group_size: 64}}]\nevaluate: {evaluate}\n"
    place.recipe.write_text(recipe, encoding="utf-8")
    result = compress(place.recipe, place.model, "-o", "new", "-q")
    assert (result.code, says in result.err) == (2, True), result.err
    assert not Path("new").exists()


# ---------------------------------------------------------------------- what the report says


def test_a_model_that_memory_does_not_hold_is_checked_block_by_block(
    place: Place, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "free_memory", lambda: 1000)
    whole = report(place.run)
    assert compress(*place.line[:-1], "streamed").code == 0
    found = report(Path("streamed"))
    (fallback,) = found["variants"][-1]["stage"]["fallbacks"]
    assert "memory does not hold the model whole" in fallback["reason"]
    assert whole["variants"][-1]["stage"]["fallbacks"] == []
    artifact = found["variants"][-1]["artifact"]
    assert (artifact["reload_ok"], artifact["max_logit_difference"]) == (False, None)
    assert any("was not read back from disk" in warning["text"] for warning in found["warnings"])
    assert products(Path("streamed")) == products(place.run)


def test_a_tensor_that_nothing_reads_is_told_of(place: Place, compress: Compress) -> None:
    shard = place.model / "model.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(shard) | {"value_head.weight": torch.ones(3)}, shard, metadata=metadata)
    result = compress(*place.line[:-1], "more")
    assert (result.code, "value_head.weight" in result.err) == (0, True)
    (fallback,) = report(Path("more"))["variants"][-1]["stage"]["fallbacks"]
    assert fallback["module"] == "value_head.weight"
    assert "no module of Llama reads it" in fallback["reason"]


def test_sizes_are_those_of_the_plan(finished: Place) -> None:
    plan = make_plan(load_recipe(finished.recipe), read_config(finished.model), "model")
    measured = measure(finished.run / "deliverable" / "compressed-tensors", plan.parameters)
    planned = plan.stages[-1]
    assert measured.tensor_bytes == planned.packed_bytes
    assert measured.by_role == planned.by_role
    assert measured.bits_checkpoint == pytest.approx(planned.bits_checkpoint, rel=1e-12)
    assert measured.bits_linear == pytest.approx(planned.bits_linear, rel=1e-12)
    base, last = (variant["size"] for variant in report(finished.run)["variants"])
    assert last["tensor_bytes"] == planned.packed_bytes
    assert last["bits_checkpoint"] == pytest.approx(planned.bits_checkpoint, rel=1e-12)
    assert last["by_role"] == planned.by_role
    assert last["bytes_on_disk"] == sum(
        path.stat().st_size
        for path in (finished.run / "deliverable" / "compressed-tensors").rglob("*")
    )
    assert last["ratio_total"] == pytest.approx(base["bytes_on_disk"] / last["bytes_on_disk"])
    assert base["tensor_bytes"] == plan.base_bytes
    # The run's folder holds less than the plan asked for.
    seen = {path.stat().st_ino: path.stat().st_size for path in finished.run.rglob("*")}
    assert sum(seen.values()) < plan.disk_bytes * 1.6


def test_every_variant_has_its_row(finished: Place) -> None:
    found = report(finished.run)
    assert found["verdict"] == "PASS"
    base, last = found["variants"]
    assert (base["id"], base["stage"], base["parent"]) == ("base", None, None)
    assert (last["id"], last["parent"]) == (STAGE, "base")
    assert last["stage"]["method"] == "quantize.gptq"
    assert last["stage"]["params"]["bits"] == 4
    modules = {metric["module"] for metric in last["stage"]["metrics_per_module"]}
    assert len(modules) == 4 * 7
    assert last["artifact"]["reload_ok"]
    assert last["artifact"]["max_logit_difference"] == 0
    assert last["artifact"]["path"] == "deliverable/compressed-tensors"
    events = Journal(finished.run / "journal.jsonl")
    (exported,) = events.all("exported", format="compressed-tensors")
    assert last["artifact"]["sha256"] == exported["sha256"]
    assert found["reproduce"]["hashes"]["deliverable/compressed-tensors"] == exported["sha256"]
    assert not (finished.run / "scratch").exists()


def test_the_noise_floor_is_far_below_the_damage(finished: Place) -> None:
    measured = json.loads((finished.run / "evaluations" / "base.json").read_bytes())
    floor = measured["noise_floor"]
    damage = json.loads((finished.run / "evaluations" / f"{STAGE}.json").read_bytes())
    assert abs(floor["mean"]["value"]) < 1e-6
    assert floor["flips"] == 0
    assert damage["overall"]["divergence"]["mean"]["value"] > 1e-3
    assert damage["overall"]["divergence"]["flips"] > 0


def test_a_model_compared_with_itself(place: Place, compress: Compress) -> None:
    options = ["--documents", "1", "--length", "64", "--format", "json", "-q"]
    result = compress("compare", place.model, place.model, *options)
    assert result.code == 0
    same = json.loads(result.out)["evaluations"][1]["overall"]
    assert abs(same["divergence"]["mean"]["value"]) < 1e-6
    assert same["divergence"]["flips"] == 0
    assert same["divergence"]["top1_agreement"]["value"] == 1
    assert same["delta_bits_per_byte"]["value"] == 0


def test_the_deliverable_scores_as_its_stage_did(place: Place, compress: Compress) -> None:
    """Packed codes, loaded as anyone loads them, are the model that the report judged."""
    packed = place.run / "deliverable" / "compressed-tensors"
    options = ["--documents", "1", "--length", "64", "--format", "json", "-q"]
    result = compress("compare", place.model, packed, *options)
    assert result.code == 0
    measured = json.loads((place.run / "evaluations" / f"{STAGE}.json").read_bytes())
    found = json.loads(result.out)["evaluations"][1]
    for key in ("perplexity", "bits_per_byte"):
        assert found["overall"][key]["value"] == measured["overall"][key]["value"]
    for key in ("flips", "maximum"):
        assert found["overall"]["divergence"][key] == measured["overall"]["divergence"][key]


def test_gates_decide_the_exit_code(place: Place, compress: Compress) -> None:
    """The limit lies below the interval, and within it."""
    measured = json.loads((place.run / "evaluations" / f"{STAGE}.json").read_bytes())
    estimate = measured["overall"]["divergence"]["mean"]
    assert estimate["low"] < estimate["value"] < estimate["high"]
    options = ["--documents", "1", "--length", "64", "--format", "json", "-q"]
    gate = f"max_kl={estimate['low'] / 2}"
    result = compress(
        "compare", place.model, place.run / "stages" / STAGE, *options, "--gate", gate
    )
    assert (result.code, json.loads(result.out)["verdict"]) == (4, "FAIL")
    # The same recipe gives the same interval, which this limit splits.
    line = [place.recipe, place.model, "-o", "unclear", "-q"]
    result = compress(*line, "--set", f"gates.max_kl={estimate['value']}")
    assert result.code == 5
    assert "the evidence does not decide" in result.err
    found = report(Path("unclear"))
    assert found["verdict"] == "INCONCLUSIVE"
    assert [gate["verdict"] for gate in found["gates"]] == ["INCONCLUSIVE"]
    assert found["gates"][0]["estimate"] == estimate


def test_benchmarks_print_runs_beside_each_other(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    from stage_costs import main

    monkeypatch.setattr(sys, "argv", ["stage_costs.py", str(place.run), str(place.run)])
    main()
    _, _, first, again = capsys.readouterr().out.splitlines()
    kl = report(place.run)["evaluations"][STAGE]["overall"]["divergence"]["mean"]["value"]
    assert f"| {kl:.4f} |" in first
    assert "| +0.0 % (+0.0 to +0.0) | +0.0 % (+0.0 to +0.0) |" in again
    assert first.replace("| – | – | – |", "|") == again.replace(
        "| +0.0 % (+0.0 to +0.0) | +0.0 % (+0.0 to +0.0) | – |", "|"
    )
