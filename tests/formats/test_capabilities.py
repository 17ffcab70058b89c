"""The table of engines: what the plan refuses by it, and the documents that show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import PlanError
from compressor.formats.capabilities import CONTAINERS, ENGINES
from compressor.formats.capability_table import (
    BEGIN,
    END,
    HEADER,
    OVERVIEW,
    SHORT,
    markdown,
    overview,
    replaced,
    within,
)
from compressor.plan import Plan
from tests import runs
from tools.engine_table import DOCUMENTS, ROOT

LLAMA = "{format: gguf, engines: [llama.cpp]}"


def plan(folder: Path, stage: str, export: str = LLAMA) -> Plan:
    calibration = "calibration: {samples: 4, length: 64}\n"
    text = f"{calibration}stages:\n  - {{{stage}}}\nexport:\n  - {export}\n"
    return runs.plan(folder, text, runs.TINY)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("method: quantize.kv", "gguf cannot say that the cache is rounded"),
        (
            "method: quantize.rtn, bits: 8, group_size: channel, activations: int8",
            "gguf cannot say that inputs are rounded",
        ),
        ("method: quantize.rtn, bits: 6, group_size: 32, symmetry: asymmetric", "6-bit asymmetric"),
        ("method: quantize.rtn, bits: 8, group_size: 32, symmetry: asymmetric", "8-bit asymmetric"),
        ("method: quantize.rtn, bits: 4, group_size: 16", "blocks of GGUF have 32 inputs"),
        ("method: quantize.rtn, weights: fp8", "has a float grid, and gguf holds integer codes"),
        ("method: quantize.rtn, weights: mxfp4", "has a float grid"),
        ("method: quantize.bnb", "only bitsandbytes holds"),
    ],
)
def test_llama_cpp_gets_nothing_that_it_would_compute_otherwise(
    tmp_path: Path, stage: str, says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        plan(tmp_path, stage)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_llama_cpp_loads_no_other_container(tmp_path: Path, form: str) -> None:
    stage = "method: quantize.rtn, bits: 4, group_size: 32"
    with pytest.raises(PlanError, match=r"llama\.cpp does not load"):
        plan(tmp_path, stage, f"{{format: {form}, engines: [llama.cpp]}}")


@pytest.mark.parametrize(
    "stage",
    [
        "method: quantize.rtn, bits: 4, group_size: 32",
        "method: quantize.rtn, bits: 3, group_size: 64, symmetry: asymmetric",
        "method: quantize.rtn, bits: 5, group_size: 32, symmetry: asymmetric",
        "method: quantize.rtn, bits: 8, group_size: channel",
    ],
)
def test_what_blocks_hold_is_accepted(tmp_path: Path, stage: str) -> None:
    assert plan(tmp_path, stage).exports[0].ratio > 1


def test_every_row_is_in_the_table() -> None:
    lines = markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == sum(len(engine.containers) for engine in ENGINES.values())
    assert all(row.count("|") == len(HEADER) + 1 for row in rows)
    for engine in ENGINES.values():
        for name, limits in engine.containers.items():
            start = f"| {engine.title} {engine.version} | `{name}` |"
            (row,) = [row for row in rows if row.startswith(start)]
            assert all(kernel in row for kernel in limits.inputs)
            assert all(draft in row for draft in engine.drafts)
            assert ("a test runs it" in row) == (limits.evidence == "run")
    assert all(f"- `{name}`: " in markdown() for name in CONTAINERS)


def test_documents_show_the_table_as_it_is() -> None:
    """Else: python tools/engine_table.py."""
    shown = {path.name: path.read_text("utf-8") for path in DOCUMENTS}
    assert within(shown["engines.md"]) == markdown()
    assert within(shown["README.md"], SHORT) == overview()


def test_the_overview_has_every_engine_and_every_container() -> None:
    rows = overview().splitlines()[2:]
    assert len(rows) == len(ENGINES)
    for row, engine in zip(rows, ENGINES.values(), strict=True):
        title, run, documents, drafts = row.strip("| ").split(" | ")
        assert title == f"{engine.title} {engine.version}"
        for name, limits in engine.containers.items():
            assert f"`{name}`" in (run if limits.evidence == "run" else documents)
            assert f"`{name}`" not in (documents if limits.evidence == "run" else run)
        assert all((name in drafts) == (how == "run") for name, how in engine.drafts.items())
    assert all(row.count("|") == len(OVERVIEW) + 1 for row in rows)


def test_an_old_table_is_replaced_and_nothing_else() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(document) == f"before\n{BEGIN}\n{markdown()}\n{END}\nafter\n"
    assert within(document) == "old"
    assert replaced("no marks\n") == "no marks\n"
    assert replaced(f"{SHORT}\nold\n{END}\n") == f"{SHORT}\n{overview()}\n{END}\n"
    assert (ROOT / "docs" / "engines.md").is_file()
