"""ONNX and OpenVINO: what is refused, sized and configured without their environments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compressor.errors import PlanError, ResourceError, UsageError
from compressor.formats import exporters
from compressor.formats.capabilities import ENVIRONMENTS
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.formats.files import checkpoint_files
from compressor.formats.graphs import check, older_config
from compressor.formats.sizes import measure
from compressor.plan import Plan
from compressor.programs import _ROOTS, PROGRAMS
from compressor.recheck import verify_folder
from compressor.reload import form_of
from compressor.resources import builtin_model
from tests import runs

RECIPE = "stages: [{{method: quantize.rtn, group_size: 64}}]\nexport: [{{format: {}}}]\n"


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for engine in ENVIRONMENTS.values():
        monkeypatch.setenv(PROGRAMS[engine].variable, str(tmp_path / "nowhere"))


def plan(folder: Path, form: str, *overrides: str) -> Plan:
    return runs.plan(folder, RECIPE.format(form), runs.TINY, *overrides)


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize("form", list(ENVIRONMENTS))
def test_the_plan_refuses_what_nobody_here_can_write(tmp_path: Path, form: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(tmp_path, form)
    (problem,) = caught.value.problems
    assert f"{form} export needs another program" in problem.message
    assert problem.hint.startswith(f"python tools/engines/install.py {ENVIRONMENTS[form]}")
    assert problem.line == 2


@pytest.mark.usefixtures("no_engines")
@pytest.mark.parametrize("form", list(ENVIRONMENTS))
def test_the_writer_refuses_too(tmp_path: Path, form: str) -> None:
    source = Source(builtin_model("tiny"), CodesReader(), 1, "onnx")
    with pytest.raises(ResourceError, match="there is no"):
        exporters.exporter(form).write(source, tmp_path / "out" / form)
    assert not (tmp_path / "out" / form).exists()


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Environments that are there: the plan looks no further."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    for engine in ENVIRONMENTS.values():
        monkeypatch.setenv(PROGRAMS[engine].variable, str(tmp_path / "env"))


@pytest.mark.usefixtures("present")
def test_the_plan_prices_fp32(tmp_path: Path) -> None:
    made = plan(tmp_path, "onnx")
    (export,) = made.exports
    assert export.tensor_bytes == 4 * made.parameters
    assert export.ratio == pytest.approx(0.5)


@pytest.mark.usefixtures("present")
def test_rounded_inputs_and_caches_are_not_in_a_graph(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot say that inputs are rounded"):
        plan(tmp_path, "onnx", "stages.0.bits=8", "stages.0.activations=int8")
    with pytest.raises(PlanError, match=r"llama\.cpp does not load onnx"):
        plan(tmp_path, "onnx", "export.0.engines=[llama.cpp]")


def test_rotary_settings_have_their_older_names() -> None:
    plain = {"a": 1, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    assert older_config(plain) == {**plain, "rope_theta": 1e5, "rope_scaling": None}
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    older = older_config({"rope_parameters": scaled})
    assert older["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert older["rope_theta"] == 5e5
    assert older_config({"n_embd": 3}) == {"n_embd": 3}


def test_layers_with_rotary_settings_of_their_own_are_refused(tmp_path: Path) -> None:
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with pytest.raises(UsageError, match="differ in their rotary settings"):
        check(tmp_path)
    check(builtin_model("tiny"))


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (("model.onnx", "model.onnx_data"), "onnx"),
        (("openvino_model.xml", "openvino_model.bin"), "openvino"),
    ],
)
def test_a_folder_of_a_graph_is_known(
    tmp_path: Path, names: tuple[str, str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = PROGRAMS[ENVIRONMENTS[form]]
    monkeypatch.setenv(program.variable, str(tmp_path))
    folder = tmp_path / form
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x" * 1000)
    shutil.copy(builtin_model("tiny") / "tokenizer.json", folder)
    assert form_of(folder) == form
    assert len(checkpoint_files(folder)) == 3
    found = measure(folder, 500)
    assert found.tensor_bytes == (2000 if form == "onnx" else 1000)
    assert found.bits_checkpoint == 8 * found.tensor_bytes / 500
    checks = {item.name: item for item in verify_folder(folder)}
    assert checks["files"].passed
    assert checks["generation"].passed is None
    assert f"there is no {program.title}" in checks["generation"].detail
    assert ENVIRONMENTS[form] in checks["weights"].detail


def test_the_checkout_is_where_engines_are_installed() -> None:
    assert (_ROOTS[-1] / "tools" / "engines" / "install.py").is_file()
