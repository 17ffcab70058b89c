"""ONNX Runtime and OpenVINO on graphs of our rounded model, each in its own environment.

`tools/engines/install.py onnxruntime openvino` installs them once; about six minutes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compressor.engine import RunOutcome
from compressor.formats import exporters
from compressor.formats.capabilities import ENVIRONMENTS
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.progress import SilentObserver
from compressor.recheck import verify_folder
from compressor.resources import builtin_model
from compressor.serving.check import prove, serve_check
from tests import runs
from tools.engines import install

pytestmark = pytest.mark.engines
RECIPE = """\
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
export: [{format: onnx, engines: [onnxruntime]}, {format: openvino, engines: [openvino]}]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    for engine in ENVIRONMENTS.values():
        install.install(engine)
    return runs.run(tmp_path_factory.mktemp("run"), RECIPE)


def test_graphs_compute_the_rounded_model(finished: RunOutcome) -> None:
    """In fp32, so that only the order of sums differs; they proved it before they counted."""
    report = finished.report
    assert [check.engine for check in report.engine_checks] == ["onnxruntime", "openvino"]
    for check, item in zip(report.engine_checks, report.deliverables, strict=True):
        assert check.verdict == "PASS"
        assert check.difference is not None
        assert check.difference < 1e-5
        assert check.to_original is not None
        assert check.to_original > 1000 * check.difference
        assert check.same_text == check.prompts
        assert item.max_logprob_difference == check.largest
        assert item.reload_ok
    assert (
        "log-probabilities that its engine computes" in (finished.folder / "README.md").read_text()
    )
    checks = verify_folder(finished.folder)
    assert not [check for check in checks if check.passed is False]
    words = [check.detail for check in checks if check.name == "generation"]
    assert len(words) == 2
    assert words[0] == words[1]
    assert words[0].startswith("'The ")


def test_a_finished_graph_is_asked_again(finished: RunOutcome) -> None:
    (found,) = serve_check(finished.folder, "onnxruntime", SilentObserver())
    assert (found.verdict, found.format) == ("PASS", "onnx")


def test_a_model_with_other_rotary_settings_arrives(tmp_path: Path) -> None:
    """transformers 4 ignores `rope_parameters`; without its own names it would take 10 000."""
    model = Path(shutil.copytree(builtin_model("tiny"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    out = tmp_path / "onnx"
    exporters.exporter("onnx").write(Source(model, CodesReader(), 1, "onnx"), out)
    found = prove("onnxruntime", model, out, builtin_model("tiny"), SilentObserver())
    assert found.to_original is not None
    assert found.to_original > 0.1
