"""A small recipe, a model of its own and a finished run, to be repeated, cut short and spoiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor import resources
from compressor.journal import Journal
from compressor.provenance import file_sha256
from tests.command import leave

RECIPE = """\
calibration: {samples: 2, length: 64, batch_size: 2}
stages:
  - method: quantize.gptq
    bits: 4
    group_size: 64
evaluate: {documents: 1, length: 64, resamples: 100}
gates: {max_kl: 5.0}
export:
  - format: compressed-tensors
  - format: dense
"""
STAGE = "01-quantize.gptq"


class Place:
    """A recipe, a model of its own and a finished run."""

    def __init__(self, root: Path) -> None:
        self.recipe, self.model, self.run = root / "r.yaml", root / "model", root / "run"

    @property
    def line(self) -> list[Path | str]:
        return [self.recipe, self.model, "-o", self.run]

    def copy(self, root: Path) -> Place:
        for path in (self.model, self.run):
            shutil.copytree(path, root / path.name)
        shutil.copy(self.recipe, root)
        return Place(root)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("finished"))
    shutil.copytree(resources.builtin_model("tiny"), place.model)
    place.recipe.write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.recipe.parent)
        assert leave("r.yaml", "model", "-o", "run", "-q") == 0
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the finished run to spoil; models are named relative to its folder."""
    finished.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    copied = Place(Path())
    assert copied.line == [Path("r.yaml"), Path("model"), "-o", Path("run")]
    return copied


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def products(run: Path) -> dict[str, str]:
    found = {f"{part}/{k}": v for part in PARTS for k, v in hashes(run / part).items()}
    assert len(found) > 20
    return found


PARTS = ("stages", "deliverable")


def lines(run: Path) -> list[str]:
    return [event["event"] for event in Journal(run / "journal.jsonl").events]


def rewind(run: Path, last: str) -> None:
    """Cut the journal after the last event of that name, as if the run had died there."""
    text = (run / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    names = [json.loads(line)["event"] for line in text]
    end = len(names) - names[::-1].index(last)
    (run / "journal.jsonl").write_text("".join(text[:end]), encoding="utf-8")


def spoil(path: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, path, metadata=metadata)
