"""Two processes train what one trains; one alone writes; launches that cannot work are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compressor.errors import UsageError
from compressor.following import require_shares
from compressor.formats.shards import CheckpointReader
from compressor.resources import builtin_model
from compressor.stages import distilling, masking
from compressor.stages.prune_width import PruneWidth
from compressor.team import ALONE, Team
from tests import team_worker
from tests.helpers import stage_context
from tests.model.conftest import build

ROOT = Path(__file__).resolve().parents[1]
CASES = ("recover", "adapters", "masks")


def launch(processes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """The same command several times, by torch's launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "--standalone", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp32, so that nothing is rounded when it is written, and a pruned one."""
    folder = tmp_path_factory.mktemp("parents")
    build("llama", vocab_size=4096, tie_word_embeddings=True).save_pretrained(folder / "whole")
    for path in builtin_model("tiny").glob("*token*"):
        shutil.copy(path, folder / "whole")
    stage = PruneWidth(score="random", intermediate=32, heads=2)
    stage.run(folder / "whole", None, stage_context(folder / "pruned"))
    return folder


@pytest.fixture(scope="module")
def folders(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All cases by one process, and by two; what is resumed begins where one process stood."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((distilling, "_HELD"), (distilling, "_EVERY")):
            patch.setattr(module, name, getattr(module, name))  # put back at the end
        patch.setattr(masking, "_FISHER_WINDOWS", masking._FISHER_WINDOWS)
        team_worker.main(parents, one, list(CASES))
    for part, name in (("-scratch", "training.safetensors"), ("", "dro.jsonl")):
        (two / f"resumed{part}").mkdir()
        shutil.copy(one / f"recover{part}" / name, two / f"resumed{part}")
    done = launch(2, "-m", "tests.team_worker", parents, two, *CASES, "resumed")
    assert not done.returncode, done.stderr[-3000:]
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(
    folders: tuple[Path, Path], parents: Path, case: str
) -> None:
    one, two = (CheckpointReader(folder / case) for folder in folders)
    before = CheckpointReader(parents / "pruned")
    assert set(one) == set(two)
    moved = 0.0
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
        if one[name].shape == before[name].shape:
            moved = max(moved, float((one[name] - before[name]).abs().max()))
    assert moved > 1e-4  # or it would say nothing that they agree


@pytest.mark.parametrize("case", CASES)
def test_losses_shares_and_checkpoints_agree(folders: tuple[Path, Path], case: str) -> None:
    lines = [(folder / case / "dro.jsonl").read_text().splitlines() for folder in folders]
    assert len(lines[0]) == len(lines[1]) > 1
    for one, two in zip(*(map(json.loads, found) for found in lines), strict=True):
        for key in ("loss", "shares", "error"):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7)
    notes = [json.loads((folder / f"{case}.json").read_text()) for folder in folders]
    assert notes[1].pop("processes") == 2
    assert notes[1] == pytest.approx(notes[0], rel=1e-5, abs=1e-7)
    files = [folder / f"{case}-scratch" / "training.safetensors" for folder in folders]
    losses = [json.loads(safe_open(file, "pt").metadata()["losses"]) for file in files]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = map(load_file, files)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-3)


def test_a_checkpoint_of_one_process_is_taken_up_by_two(folders: tuple[Path, Path]) -> None:
    """After the last checkpoint of one, with an update to go."""
    one, two = CheckpointReader(folders[0] / "recover"), CheckpointReader(folders[1] / "resumed")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)


def test_shares_and_turns_cover_everything_once() -> None:
    for size in (1, 2, 3):
        teams = [Team(rank, size) for rank in range(size)]
        assert sorted(item for team in teams for item in team.share(range(7))) == list(range(7))
        turns = [team.turns(7) for team in teams]
        assert len({len(found) for found in turns}) == 1
        assert sorted(n for found in turns for n, kept in found if kept) == list(range(7))
        assert all(n < 7 for found in turns for n, _ in found)


RECIPE = """\
calibration: {samples: 12, length: 24}
stages:
  - {method: prune.width, score: magnitude, intermediate: 32}
  - {method: recover.distill, tokens: 48, batch: 2, repeats: 100}
evaluate: {documents: 1, length: 32, resamples: 100, noise_floor: false}
export: [{format: dense}]
"""


def test_the_command_runs_in_two_processes_and_speaks_once(parents: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    model = parents / "whole"
    done = launch(2, "-m", "compressor", recipe, model, "-o", out, "--format", "json")
    assert not done.returncode, done.stderr[-3000:]
    assert json.loads(done.stdout)["verdict"] == "NO GATES"
    assert (out / "journal.jsonl").read_text().count("run_started") == 1
    notes = json.loads((out / "report.json").read_text())["variants"][-1]["stage"]["notes"]
    assert notes["processes"] == 2


def test_what_processes_cannot_share_is_refused(recipe_file) -> None:
    recipe = recipe_file(RECIPE)
    require_shares(recipe, ALONE)
    require_shares(recipe, Team(0, 2))
    with pytest.raises(UsageError, match="runs 2 windows at once, too few for 3 processes"):
        require_shares(recipe, Team(0, 3))
    with pytest.raises(UsageError, match="no stage of the recipe trains in several"):
        require_shares(recipe_file(), Team(0, 2))
