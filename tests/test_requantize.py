"""Exports that llama.cpp's quantizer rounds: options, refusals, the command line, the report.

Another program stands in for the quantizer (`tests/stand_in`), so that these run everywhere;
`tests/engines` has the real one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compressor.engine import RunOutcome, export_run, resume_run, run_recipe
from compressor.errors import PlanError, RecipeError, ResourceError, UsageError, VerificationError
from compressor.formats import exporters, llama_quantize
from compressor.formats.exporters import Source
from compressor.formats.gguf_metadata import QUANTIZER_KEY
from compressor.formats.gguf_types import MIXTURES, estimated_bytes
from compressor.formats.shards import CheckpointReader
from compressor.journal import Journal
from compressor.plan import make_plan
from compressor.publish import plan_publication
from compressor.recheck import verify_folder
from compressor.reload import unpack
from compressor.report.build import check_report
from compressor.report.schema import Report
from compressor.requantize import relative_error
from compressor.resources import builtin_model
from compressor.sections import ExportConfig
from tests.runs import SMOL, TINY, load, run

TYPED = """\
calibration: {samples: 4, length: 64}
stages: STAGES
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
gates: {max_kl: 0.01}
export: EXPORT
"""
Q4 = "[{format: gguf, type: Q4_K_M}]"


def text(export: str = Q4, stages: str = "[]", drop: str = "") -> str:
    lines = TYPED.replace("STAGES", stages).replace("EXPORT", export).splitlines()
    return "\n".join(line for line in lines if not (drop and line.startswith(drop))) + "\n"


# ---------------------------------------------------------------------- what can be asked


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (text("[{format: gptq, type: Q4_K_M}]"), "`type` is for format gguf; gptq has none"),
        (text("[{format: gguf, imatrix: false}]"), "name a `type` too"),
        (text("[{format: gguf, type: IQ2_XS, imatrix: false}]"), "IQ2_XS needs an importance"),
        (text("[{format: gguf, type: Q4_K_N}]"), "Q4_K_M"),
        (text("[{format: gguf, type: Q6_K}, {format: gguf, type: Q6_K}]"), "gguf-Q6_K is named"),
        (text("[{format: gguf}]"), "stages in the recipe needs at least one entry"),
        (text(drop="calibration"), "Q4_K_M is weighed by an importance matrix"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_stands(
    tmp_path: Path, content: str, says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, content)
    assert says in str(caught.value)
    assert all(problem.line for problem in caught.value.problems)


def test_each_type_has_a_folder_of_its_own(tmp_path: Path) -> None:
    several = "[{format: gguf}, {format: gguf, type: Q4_K_M}, {format: gguf, type: IQ4_XS}]"
    names = [export.name for export in load(tmp_path, text(several)).export]
    assert names == ["gguf", "gguf-Q4_K_M", "gguf-IQ4_XS"]
    bare = load(tmp_path, text("[{format: gguf, type: Q4_K_M, imatrix: false}]", drop="cal"))
    assert bare.export[0].container == "llama-quantize"


# ---------------------------------------------------------------------- what the plan refuses


def test_a_missing_quantizer_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(tmp_path, text())
    monkeypatch.setenv(llama_quantize.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(PlanError, match=r"LLAMA_QUANTIZE names .*nowhere, which is no program"):
        make_plan(recipe, TINY, "builtin:tiny")
    monkeypatch.delenv(llama_quantize.VARIABLE)
    monkeypatch.setattr(llama_quantize, "_BUILT", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="is not on this machine") as caught:
        run_recipe(recipe, "builtin:tiny", tmp_path / "out")
    assert "tools/engines/build_llama_cpp.py" in str(caught.value)
    assert caught.value.problems[0].line == 5
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResourceError, match="is not on this machine"):
        llama_quantize.require_program()


def test_it_is_looked_for_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path
) -> None:
    def program(folder: str) -> Path:
        path = tmp_path / folder / llama_quantize.PROGRAM
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    assert llama_quantize.find_program() == stand_in
    monkeypatch.delenv(llama_quantize.VARIABLE)
    built, on_path = program("built"), program("path")
    monkeypatch.setattr(llama_quantize, "_BUILT", built)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert llama_quantize.find_program() == built
    built.unlink()
    assert llama_quantize.find_program() == on_path
    on_path.chmod(0o644)
    assert llama_quantize.find_program() is None


@pytest.mark.parametrize(
    ("stages", "export", "says"),
    [
        ("[{method: quantize.rtn, group_size: 64}]", Q4, "would round it a second time"),
        ("[{method: quantize.bnb}]", Q4, "would round it a second time"),
        ("[{method: quantize.kv}]", Q4, "cannot say that the cache is rounded"),
        (
            "[{method: quantize.rtn, bits: 8, group_size: channel, activations: int8}]",
            Q4,
            "cannot say that inputs are rounded",
        ),
        ("[]", "[{format: gguf, type: Q6_K, engines: [vllm]}]", "vllm does not load llama-quan"),
        ("[]", "[{format: gguf, type: Q6_K, engines: [transformers]}]", "does not load llama-q"),
    ],
)
def test_the_plan_refuses_what_would_be_wrong(
    tmp_path: Path, stages: str, export: str, says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(load(tmp_path, text(export, stages)), TINY, "builtin:tiny")


def test_a_family_without_names_is_refused(tmp_path: Path) -> None:
    gemma = TINY | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    with pytest.raises(PlanError, match="not of gemma2"):
        make_plan(load(tmp_path, text()), gemma, "gemma")


def test_the_plan_says_what_it_estimates(tmp_path: Path) -> None:
    accepted = load(tmp_path, text("[{format: gguf, type: Q4_K_M, engines: [llama.cpp]}]"))
    (export,) = make_plan(accepted, SMOL, "smol").exports
    assert export.format == "gguf-Q4_K_M"
    mine, widths = export.remarks
    assert "by llama.cpp's own quantizer" in mine
    assert widths.startswith("181 of 211 matrices have widths that 256 does not divide")
    assert "Q5_0 (5.5 bits)" in widths
    inner = 2 * 576**2 + 2 * 576 * 192 + 2 * 576 * 1536
    bits = 30 * (5.5 * inner + 4.8944 * 576 * 1536) + 8.5 * 49152 * 576 + 32 * 61 * 576
    assert export.tensor_bytes == round(bits / 8)
    plain = make_plan(load(tmp_path, text("[{format: gguf, type: Q8_0}]")), SMOL, "smol")
    assert len(plain.exports[0].remarks) == 1
    assert plain.disk_bytes > 2 * 134_515_008 + 4 * 134_515_008  # dense GGUF, and fp32 to measure


def test_every_type_has_bits_in_their_order() -> None:
    shape = (1024, 4096)
    sizes = {kind: estimated_bytes(kind, [(shape, False)]) for kind in MIXTURES}
    assert all(2 * np.prod(shape) / 8 < size < 8.6 * np.prod(shape) / 8 for size in sizes.values())
    for low, high in [("IQ1_S", "IQ2_XXS"), ("Q2_K", "Q3_K_S"), ("Q4_K_M", "Q5_K_S")]:
        assert sizes[low] < sizes[high]  # type: ignore[index]
    needs = {kind for kind, mixture in MIXTURES.items() if mixture.needs_importance}
    assert needs == {"Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS",
                     "IQ3_XS"}  # fmt: skip


# ---------------------------------------------------------------------- the program


def test_the_command_line_tells_nothing_of_this_machine() -> None:
    program, scratch = Path("/bin/llama-quantize"), Path("/runs/scratch")
    line = llama_quantize.command(
        program, scratch / "dense.gguf", Path("/runs/x.gguf"), "IQ3_S", scratch / "im.gguf", 3
    )
    expected = "/bin/llama-quantize --imatrix im.gguf dense.gguf /runs/x.gguf IQ3_S 3"
    assert line == expected.split()
    bare = llama_quantize.command(program, scratch / "d.gguf", Path("x"), "Q4_0", None, 1)
    assert bare == ["/bin/llama-quantize", "d.gguf", "x", "Q4_0", "1"]


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    folder = tmp_path_factory.mktemp("typed")
    both = "[{format: gguf, type: Q4_K_M}, {format: gguf, type: Q8_0, imatrix: false}]"
    return run(folder, text(both))


def test_the_report_says_whose_work_it_is(finished: RunOutcome) -> None:
    report = finished.report
    check_report(report)
    assert [variant.id for variant in report.variants] == ["base", "gguf-Q4_K_M", "gguf-Q8_0"]
    assert report.headline == report.judged == "gguf-Q4_K_M"
    row = report.variants[1]
    assert row.stage is not None
    assert row.stage.method == "export.gguf"
    assert row.stage.params["quantizer"] == "llama-quantize 0.0.0 (stand-in)"
    assert row.artifact == report.deliverables[0]
    assert row.artifact.quantizer == "llama-quantize 0.0.0 (stand-in)"
    assert 0.003 < row.stage.notes["relative_weight_error"] < 0.02  # of Q8_0
    claims = {claim.id: claim.text for claim in report.claims}
    assert "none of our codes are in its file" in claims["quantizer-gguf-Q4_K_M"]
    assert "reload-gguf-Q4_K_M" not in claims
    card = (finished.folder / "README.md").read_text()
    assert card.count("llama-server -m deliverable/gguf-Q4_K_M/model.gguf") == 1
    assert card.count("llama-server -m deliverable/gguf-Q8_0/model.gguf") == 1
    assert "rounded by llama-quantize 0.0.0 (stand-in)" in card


def test_sizes_and_divergence_are_of_the_file(finished: RunOutcome) -> None:
    report = finished.report
    for variant in report.variants[1:]:
        file = finished.folder / "deliverable" / variant.id / "model.gguf"
        assert variant.size.bytes_on_disk == file.stat().st_size
        assert variant.size.bits_nominal == 8
        assert variant.size.bits_linear == 8.5
        found = report.evaluations[variant.id].overall.divergence
        assert found is not None
        assert 1e-5 < found.mean.value < 1e-3  # 8 bits of a small model
    (gate,) = report.gates
    assert gate.estimate == report.evaluations["gguf-Q4_K_M"].overall.divergence.mean
    assert finished.verdict == "PASS"
    assert report.parent_deltas["gguf-Q8_0"].value != 0


def test_what_was_stored_otherwise_is_told(finished: RunOutcome) -> None:
    told = [(item.variant, item.module, item.action) for item in finished.report.fallbacks]
    stored = "llama-quantize stored them as Q8_0"
    assert told == [
        ("gguf-Q4_K_M", "25 matrices", stored),
        ("gguf-Q4_K_M", "4 matrices", stored),
    ]  # and none for Q8_0, whose blocks have 32 inputs


def test_the_file_tells_nothing_of_this_machine(finished: RunOutcome) -> None:
    reader = gguf.GGUFReader(finished.folder / "deliverable" / "gguf-Q4_K_M" / "model.gguf")
    assert reader.get_field("quantize.imatrix.file").contents() == "imatrix.gguf"
    assert reader.get_field(QUANTIZER_KEY).contents() == "llama-quantize"
    own = gguf.GGUFReader(finished.folder / "deliverable" / "gguf-Q8_0" / "model.gguf")
    assert own.get_field("quantize.imatrix.file") is None
    assert not list((finished.folder).glob("scratch"))


def test_what_is_measured_is_what_the_file_computes_with(
    finished: RunOutcome, tmp_path: Path
) -> None:
    tiny, folder = builtin_model("tiny"), finished.folder / "deliverable" / "gguf-Q4_K_M"
    unpack(folder, tiny, tmp_path / "dense", 1)
    dense, before = CheckpointReader(tmp_path / "dense"), CheckpointReader(tiny)
    assert set(dense) == set(before)
    name = "model.layers.1.mlp.down_proj.weight"
    reader = gguf.GGUFReader(folder / "model.gguf")
    stored = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    exact = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(dense[name], exact)
    assert not torch.equal(dense[name], before[name].float())
    assert torch.equal(dense["model.norm.weight"], before["model.norm.weight"].float())
    # Rows of q are reordered for llama.cpp, and back: by more than rounding if it went wrong.
    name = "model.layers.2.self_attn.q_proj.weight"
    assert (dense[name] - before[name].float()).norm() < 0.02 * before[name].float().norm()


def test_it_is_checked_again_by_verify(finished: RunOutcome, tmp_path: Path) -> None:
    found = {(c.folder, c.name): (c.passed, c.detail) for c in verify_folder(finished.folder)}
    assert not [key for key, (passed, _) in found.items() if passed is False]
    passed, detail = found["gguf-Q4_K_M", "weights"]
    assert passed
    assert detail.startswith("rounded by llama-quantize 0.0.0 (stand-in): 0.00")
    assert found["gguf-Q4_K_M", "shapes"] == (
        True,
        "as the file's own description says; 38 tensors",
    )
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    path = run / "deliverable" / "gguf-Q8_0" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-7000:-6000] = bytes(1000)
    path.write_bytes(bytes(data))
    failed = {(c.folder, c.name) for c in verify_folder(run) if c.passed is False}
    assert ("gguf-Q8_0", "hash") in failed


def test_each_deliverable_is_published_as_what_it_is(finished: RunOutcome) -> None:
    planned = plan_publication(finished.folder, "org/name", public=False)
    assert [one.name for one in planned.repositories] == ["org/name", "org/name-gguf-Q8_0"]
    first, second = (
        Report.model_validate_json(str(one.files["report.json"])) for one in planned.repositories
    )
    assert [v.id for v in first.variants] == ["base", "gguf-Q4_K_M"]
    assert [v.id for v in second.variants] == ["base", "gguf-Q8_0"]
    assert (len(first.gates), len(second.gates)) == (1, 0)  # gates spoke of the first
    assert second.headline == "gguf-Q8_0"


def test_a_run_takes_up_where_it_stopped(finished: RunOutcome, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    file = run / "deliverable" / "gguf-Q4_K_M" / "model.gguf"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    before = len(Journal(run / "journal.jsonl").events)
    resume_run(run)
    assert file.read_bytes() == content  # and the same bytes in another folder
    events = [event["event"] for event in Journal(run / "journal.jsonl").events[before:]]
    assert events == ["run_started", "exported", "report_written"]
    (run / "evaluations" / "gguf-Q8_0.npz").unlink()
    before = len(Journal(run / "journal.jsonl").events)
    resume_run(run)
    events = [event["event"] for event in Journal(run / "journal.jsonl").events[before:]]
    assert events == ["run_started", "evaluated", "report_written"]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ("fail", ResourceError, r"could not round to Q4_K_M: (?s:.*)cannot make Q4_K_M"),
        ("damage", VerificationError, "q_proj.weight is not the weight that was rounded"),
        ("drop", VerificationError, "q_proj.weight is missing"),
    ],
)
def test_a_quantizer_that_goes_wrong_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, error: type[Exception], says: str
) -> None:
    monkeypatch.setenv("STAND_IN", wrong)
    with pytest.raises(error, match=says):
        run(tmp_path, text())
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_lost_vector_is_caught(tmp_path: Path) -> None:
    """A changed norm is no rounding, however small."""
    from tests.formats.helpers import quantize_checkpoint

    tiny = builtin_model("tiny")
    exporters.exporter("gguf").write(Source(tiny, {}, 1, "llama-quantize"), tmp_path / "out")
    assert relative_error(tmp_path / "out", tiny) == 0
    other, _ = quantize_checkpoint(tiny, tmp_path / "other", lambda _: None)
    reader = CheckpointReader(other)
    tensors = {name: reader[name].clone() for name in reader}
    tensors["model.norm.weight"][3] *= 1.01
    from safetensors.torch import save_file

    (file,) = other.glob("*.safetensors")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is not the weight"):
        relative_error(tmp_path / "out", other)


# ---------------------------------------------------------------------- added to a run


def compress(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_type_is_added_to_a_run(finished: RunOutcome, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    line = ["export", run, "--as", "gguf", "--type", "IQ4_XS", "-q", "--format", "json"]
    done = compress(*line)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    assert [item["path"] for item in report["deliverables"]][2] == "deliverable/gguf-IQ4_XS"
    assert "# added by `compress export`: gguf-IQ4_XS" in (run / "recipe.yaml").read_text()
    again = compress(*line)
    assert again.returncode == 2
    assert "gguf-IQ4_XS already" in again.stderr
    other = compress("export", run, "--as", "gptq", "--type", "Q6_K")
    assert other.returncode == 2
    assert "--type is for --as gguf" in other.stderr


def test_a_run_of_rounded_weights_gets_none(tmp_path: Path) -> None:
    stages = "[{method: quantize.rtn, bits: 4, group_size: 64}]"
    recipe = load(tmp_path, text("[{format: gguf}]", stages))
    run = run_recipe(recipe, "builtin:tiny", tmp_path / "out").folder
    lock = (run / "recipe.lock.yaml").read_bytes()
    with pytest.raises(PlanError, match="a second time") as caught:
        export_run(run, [ExportConfig(format="gguf", type="Q4_K_M")])
    assert "leave `type` out" in str(caught.value)
    assert (run / "recipe.lock.yaml").read_bytes() == lock
    with pytest.raises(UsageError, match="gguf already"):
        export_run(run, [ExportConfig(format="gguf")])


def test_beside_a_stage_both_are_told_apart(tmp_path: Path) -> None:
    """Pruned weights as they are and in a second quantizer's hands: gates speak of the first."""
    export = "[{format: gguf}, {format: gguf, type: Q5_K_M}]"
    stages = "[{method: prune.depth, ratio: 0.15}]"
    outcome = run(tmp_path, text(export, stages))
    report = outcome.report
    assert [v.id for v in report.variants] == ["base", "01-prune.depth", "gguf-Q5_K_M"]
    assert report.headline == "01-prune.depth"
    assert report.variants[1].artifact == report.deliverables[0]
    assert report.variants[2].parent == "01-prune.depth"
    kl = [report.evaluations[v.id].overall.divergence.mean.value for v in report.variants[1:]]
    assert kl[0] == pytest.approx(kl[1], rel=0.05)  # 8 bits add little to a missing block
    delta = report.parent_deltas["gguf-Q5_K_M"].value
    assert abs(delta) < 0.1 * abs(report.parent_deltas["01-prune.depth"].value)
    assert False not in {check.passed for check in verify_folder(outcome.folder)}
