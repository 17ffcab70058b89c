"""`compress w4-gptq MODEL` to GGUF on the command line: llama.cpp computes what the report says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor.formats import gguf
from compressor.formats.exporters import Source
from compressor.report.render import load_report
from compressor.report.schema import Report
from compressor.resources import builtin_model
from compressor.text import evaluation_documents
from tests.engines.llama_cpp import BUILT, divergence
from tools.engines import build_llama_cpp

pytestmark = pytest.mark.engines

SMOLLM2 = Path(__file__).resolve().parents[2] / "cache" / "SmolLM2-135M-Instruct"
LENGTH = 256
KINDS = ("Q8_0", "Q4_0")
EXPORTS = "{format: gguf}, " + ", ".join(f"{{format: gguf, embedding: {kind}}}" for kind in KINDS)


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    build_llama_cpp.build(BUILT, jobs=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    documents = [document.text for document in evaluation_documents("prose")]
    path.write_text("\n\n".join(documents)[:8_000], encoding="utf-8")
    return path


@pytest.fixture(
    scope="module",
    params=[
        "builtin:tiny",
        pytest.param(
            str(SMOLLM2),
            marks=pytest.mark.skipif(not SMOLLM2.is_dir(), reason="tools/build_smollm2.py"),
        ),
    ],
    ids=["tiny", "SmolLM2"],
)
def run(
    request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Report]:
    """The dense model's file, and a run with an embedding of bf16, Q8_0 and Q4_0."""
    folder = tmp_path_factory.mktemp("run")
    values = [
        "calibration.samples=8",
        f"calibration.length={LENGTH}",
        "stages.0.group_size=32",
        f"evaluate={{text: {{prose: {text}}}, protocol: llama.cpp, length: {LENGTH}}}",
        f"export=[{EXPORTS}]",
    ]
    sets = [word for value in values for word in ("--set", value)]
    command = [sys.executable, "-m", "compressor", "w4-gptq", request.param, "--effort", "light"]
    done = subprocess.run(
        [*command, *sets, "-o", str(folder / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = builtin_model("tiny") if ":" in request.param else Path(request.param)
    gguf.write(Source(model, {}, 1, "gguf"), folder / "dense")
    return folder / "dense" / gguf.FILE, folder / "out", load_report(folder / "out")


def test_every_file_has_the_divergence_of_its_row(
    run: tuple[Path, Path, Report], text: Path, tmp_path: Path
) -> None:
    """llama.cpp rounds inputs to 8 bits where weights are rounded, embeddings as heads too."""
    dense, folder, report = run
    rows = [report.headline, *(f"gguf-embedding-{kind}" for kind in KINDS)]
    found, sizes = [], []
    for row, item in zip(rows, report.deliverables, strict=True):
        file = folder / item.path / gguf.FILE
        ours = report.evaluations[row].overall
        theirs = divergence(dense, file, text, LENGTH, tmp_path)
        assert ours.divergence is not None
        assert ours.perplexity is not None
        print(row, file.stat().st_size, ours.divergence.mean.value, theirs["kl"])
        assert theirs["kl"] == pytest.approx(ours.divergence.mean.value, rel=0.03, abs=0.005)
        assert theirs["ours"] == pytest.approx(ours.perplexity.value, rel=0.01)
        found.append(theirs["kl"])
        sizes.append(file.stat().st_size)
    kept, eight, four = found
    assert abs(eight - kept) < 0.1 * kept  # 8 bits of the embedding are nearly free
    assert four > eight + 0.005  # 4 bits are not, so that the rows cannot be mistaken
    assert sizes == sorted(sizes, reverse=True)
