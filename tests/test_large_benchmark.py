"""benchmarks/large_llama.py makes a model, takes a recipe through it and prints what that took."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.original import require_sound

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_a_small_shape_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("large_llama")
    monkeypatch.setitem(script.SHAPES, "small", (128, 256, 2, 4, 2, 4096))
    words = ["--shape", "small", "--recipe", "w4-rtn", "--out", tmp_path, "--results"]
    monkeypatch.setattr(sys, "argv", ["large_llama", *map(str, [*words, tmp_path / "table.md"])])
    for _ in range(2):  # the second time nothing is left to do
        script.main()
    require_sound(tmp_path / "small")
    assert Architecture.from_config(read_config(tmp_path / "small")).layers == 2
    table = (tmp_path / "table.md").read_text()
    assert table in capfd.readouterr().out
    label, *cells = table.splitlines()[2].strip("| ").split(" | ")
    assert label == "small, w4-rtn"
    assert float(cells[2]) > 0.1  # GiB: torch alone takes more
    for name in ("large_llama", "draft_sizes"):
        sys.modules.pop(name, None)
