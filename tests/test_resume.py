"""A run that is killed at any moment ends, when taken up again, with the same bytes.

Every attempt is a process of its own that really gets SIGKILL; it is forked from a server that
has imported everything, so that an attempt costs its work only.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.provenance import file_sha256

RECIPE = """\
calibration: {samples: 2, length: 32, batch_size: 1}
stages:
  - method: quantize.gptq
    bits: 4
    group_size: 64
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
export:
  - format: compressed-tensors
  - format: dense
"""
PRELOAD = ["pytest", "compressor.engine", "transformers.models.llama.modeling_llama"]
SERVER = multiprocessing.get_context("forkserver")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------- when to die


def at_line(number: int, moment: str) -> None:
    """Die when the journal is about to get, or just got, its line of that number (from 1)."""
    from compressor.journal import Journal

    write = Journal.append

    def append(self: Journal, name: str, **facts: Any) -> dict[str, Any]:
        last = len(self.events) + 1 == number
        if last and moment == "torn":
            line = json.dumps({"event": name, "time": 0.0, **facts})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line[: len(line) // 2])
            die()
        event = write(self, name, **facts)
        if last:
            die()
        return event

    Journal.append = append  # type: ignore[method-assign]


def at_rename(target: str, moment: str) -> None:
    """Die when a file is about to be renamed to `target` (half of it lost), or just was."""
    rename = os.replace

    def replace(source: Any, destination: Any) -> None:
        hit = str(destination).endswith(target)
        if hit and moment == "torn":
            os.truncate(source, os.path.getsize(source) // 2)
            die()
        rename(source, destination)
        if hit:
            die()

    os.replace = replace


def at_link(number: int) -> None:
    """Die when the dense export has linked that many files."""
    link, links = os.link, 0

    def counted(source: Any, destination: Any) -> None:
        nonlocal links
        link(source, destination)
        links += 1
        if links == number:
            die()

    os.link = counted


def recording(log: Path) -> None:
    """Write down the destination of every rename, in order."""
    rename = os.replace

    def replace(source: Any, destination: Any) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{destination}\n")
        rename(source, destination)

    os.replace = replace


# ---------------------------------------------------------------------- attempts


def run(folder: Path, trap: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """The same command every time, in this process."""
    import torch
    from tqdm import tqdm

    from compressor.engine import run_recipe
    from compressor.model.quiet import quiet
    from compressor.recipe import load_recipe

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    if trap:
        trap(*arguments)
    with quiet():
        run_recipe(load_recipe(folder.parent / "recipe.yaml"), "builtin:tiny", folder)


def attempt(folder: Path, trap: Callable[..., None] | None = None, *arguments: Any) -> int | None:
    """Exit code of a run in a process of its own; minus the signal if one ended it."""
    SERVER.set_forkserver_preload(PRELOAD)
    process = SERVER.Process(target=run, args=(folder, trap, arguments))
    process.start()
    process.join()
    return process.exitcode


def events(folder: Path) -> list[str]:
    """Names of the whole lines of the journal."""
    path = folder / "journal.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line)["event"] for line in text.split("\n")[:-1]]


def result(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: bytes of all files, measured numbers."""
    files = [path for name in KEPT for path in (folder / name).rglob("*") if path.is_file()]
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    hashes |= {path.name: file_sha256(path) for path in (folder / "evaluations").glob("*.npz")}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    metrics = [variant["stage"]["metrics_per_module"] for variant in report["variants"][1:]]
    return {"files": hashes, "metrics": metrics, "artifacts": report["variants"][-1]["artifact"]}


KEPT = ("stages", "deliverable")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    (folder.parent / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert attempt(folder, recording, folder.parent / "renames") == 0
    return folder


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Any]:
    found = result(whole)
    names = {Path(name).name for name in found["files"]}
    assert {"model-block-00003.safetensors", "codes-block-00003.safetensors"} <= names
    assert {"base.npz", "01-quantize.gptq.npz", "tokenizer.json", "config.json"} <= names
    return found


def test_the_same_run_twice_gives_the_same_bytes(whole: Path, expected: dict[str, Any]) -> None:
    again = whole.parent / "again"
    assert attempt(again) == 0
    assert result(again) == expected


def test_killed_at_every_line_of_the_journal(whole: Path, expected: dict[str, Any]) -> None:
    """Every event is reached twice: torn while it was written, then whole but nothing after."""
    lines = events(whole)
    assert lines.count("block_done") == 4
    folder = whole.parent / "lines"
    for event in lines[1:]:
        for moment, last in (("torn", "run_started"), ("after", event)):
            # Every attempt begins with a line `run_started`; the next one is the one to die at.
            assert attempt(folder, at_line, len(events(folder)) + 2, moment) == -signal.SIGKILL
            assert events(folder)[-1] == last
    assert attempt(folder) == 0
    # Nothing that was done was done again.
    assert [event for event in events(folder) if event != "run_started"] == lines[1:] + lines[-1:]
    assert result(folder) == expected


def test_killed_at_every_rename(whole: Path, expected: dict[str, Any]) -> None:
    """Every file is met twice: half of it written under a temporary name, then just renamed."""
    renames = (whole.parent / "renames").read_text(encoding="utf-8").splitlines()
    targets = list(dict.fromkeys(f"/{Path(path).relative_to(whole)}" for path in renames))
    figures = [target for target in targets if target.startswith("/figures/")]
    assert len(targets) - len(figures) > 30
    assert figures
    folder = whole.parent / "renamed"
    for target in (name for name in targets if name not in figures[1:]):
        for moment in ("torn", "after"):
            assert attempt(folder, at_rename, target, moment) == -signal.SIGKILL, target
    assert attempt(folder) == 0
    assert result(folder) == expected


def test_killed_between_the_links_of_the_dense_export(
    whole: Path, expected: dict[str, Any]
) -> None:
    folder = whole.parent / "linked"
    for number in (1, 5):
        assert attempt(folder, at_link, number) == -signal.SIGKILL
        assert len(list((folder / "deliverable" / "dense").iterdir())) == number
    assert attempt(folder) == 0
    assert result(folder) == expected
