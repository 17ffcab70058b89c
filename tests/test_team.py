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

from compressor.decoding import writing
from compressor.decoding.corpus import share
from compressor.errors import UsageError
from compressor.following import require_shares
from compressor.formats.shards import CheckpointReader
from compressor.resources import builtin_model
from compressor.stages import distilling, masking
from compressor.stages.draft_base import TrainedDraftConfig
from compressor.stages.prune_width import PruneWidth
from compressor.team import ALONE, Team
from compressor.types import TokenBatch
from tests import team_worker
from tests.helpers import stage_context
from tests.model.conftest import build

ROOT = Path(__file__).resolve().parents[1]
CASES = ("recover", "adapters", "masks")
DRAFTS = ("eagle3", "standalone")


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


def test_threads_that_have_summed_do_not_abort_the_exit(tmp_path: Path) -> None:
    """They outlive the group in caches of torch, and drop their tensors when they are let to."""
    script = tmp_path / "sums.py"
    script.write_text(
        "import sys, torch\n"
        "from compressor.team import assembled\n"
        "sys.setswitchinterval(60)  # the interpreter is not taken away, only left\n"
        "with assembled() as team:\n"
        "    import torch.distributed.fsdp  # keeps the group in defaults of its functions\n"
        "    terms = [torch.ones(3) for _ in range(50)]\n"
        "    for term in terms:\n"
        "        team.add(term)\n"
        "    del term, terms\n"
    )
    done = launch(2, script)
    assert not done.returncode, done.stderr[-3000:]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp32, so that nothing is rounded when it is written, and a pruned one."""
    folder = tmp_path_factory.mktemp("parents")
    whole = build("llama", vocab_size=4096, tie_word_embeddings=True, max_position_embeddings=256)
    whole.save_pretrained(folder / "whole")
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
        patch.setattr(writing, "_TOGETHER", writing._TOGETHER)
        patch.setattr(TrainedDraftConfig, "schedule", TrainedDraftConfig.schedule)
        team_worker.main(parents, one, [*CASES, *DRAFTS])
    for part, name in (("-scratch", "training.safetensors"), ("", "dro.jsonl")):
        (two / f"resumed{part}").mkdir()
        shutil.copy(one / f"recover{part}" / name, two / f"resumed{part}")
    shutil.copytree(one / "eagle3-scratch", two / "eagle3-resumed-scratch")
    (two / "eagle3-resumed-scratch" / "written" / "000000.safetensors").unlink()
    cases = (*CASES, "resumed", *DRAFTS, "eagle3-resumed")
    done = launch(2, "-m", "tests.team_worker", parents, two, *cases)
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


def same_training(folders: tuple[Path, Path], case: str) -> None:
    """Notes of the results and checkpoints of the training, but for the order of sums."""
    notes = [json.loads((folder / f"{case}.json").read_text()) for folder in folders]
    assert notes[1].pop("processes") == 2
    assert notes[1] == pytest.approx(notes[0], rel=1e-5, abs=1e-7)
    files = [folder / f"{case}-scratch" / "training.safetensors" for folder in folders]
    losses = [json.loads(safe_open(file, "pt").metadata()["losses"]) for file in files]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = map(load_file, files)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_losses_shares_and_checkpoints_agree(folders: tuple[Path, Path], case: str) -> None:
    lines = [(folder / case / "dro.jsonl").read_text().splitlines() for folder in folders]
    assert len(lines[0]) == len(lines[1]) > 1
    for one, two in zip(*(map(json.loads, found) for found in lines), strict=True):
        for key in ("loss", "shares", "error"):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7)
    same_training(folders, case)


@pytest.mark.parametrize("case", DRAFTS)
def test_two_processes_train_the_draft_that_one_trains(
    folders: tuple[Path, Path], case: str
) -> None:
    one, two = (load_file(folder / case / "model.safetensors") for folder in folders)
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    same_training(folders, case)
    stood = load_file(folders[0] / f"{case}-scratch" / "training.safetensors")
    moved = max(
        float((one[name] - stood[f"weight.{name}"]).abs().max())
        for name in one
        if f"weight.{name}" in stood
    )
    assert moved > 1e-3  # in the second half, which the checkpoint does not hold
    bindings = [json.loads((folder / case / "draft.json").read_text()) for folder in folders]
    assert bindings[0] == bindings[1]  # with what was accepted while it was trained
    texts = [sorted((folder / f"{case}-scratch" / "written").iterdir()) for folder in folders]
    assert len(texts[0]) == len(texts[1]) == 2
    for files in zip(*texts, strict=True):
        rows = [load_file(file) for file in files]
        assert all(torch.equal(rows[0][name], rows[1][name]) for name in (rows[0] | rows[1]))


def test_a_draft_of_one_process_is_taken_up_by_two(folders: tuple[Path, Path]) -> None:
    """In the middle, and with a part of the text to be written again."""
    one, two = folders
    first, second = one / "eagle3", two / "eagle3-resumed"
    wanted, found = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=0)
    name = "written/000000.safetensors"
    kept, again = (one / "eagle3-scratch" / name, two / "eagle3-resumed-scratch" / name)
    assert str(load_file(kept)) == str(load_file(again))


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


def test_rows_without_a_taker_count_nowhere() -> None:
    ids, mask = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    shares = [share(TokenBatch(ids, mask, ("a", "b")), Team(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([part.input_ids[part.mask] for part in shares]), torch.arange(10))
    assert [part.domains for part in shares] == [("a",), ("b",), ("a",)]
    assert shares[2].input_ids.shape == (1, 5)
    assert not shares[2].mask.any()


RECIPE = """\
calibration: {samples: 12, length: 24}
stages:
  - {method: prune.width, score: magnitude, intermediate: 32}
  - {method: recover.distill, tokens: 48, batch: 2, repeats: 100}
  - {method: draft.standalone, tokens: 96, length: 24, prompt: 6, batch_size: 2, steps: 2,
     probes: 0, drafted: 2, prompts: 1, new_tokens: 4}
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
    report = json.loads((out / "report.json").read_text())
    for made in (report["variants"][-1], *report["drafts"]):
        assert made["stage"]["notes"]["processes"] == 2
    assert not list((out / "scratch").glob("*draft*"))


def test_what_processes_cannot_share_is_refused(recipe_file) -> None:
    recipe = recipe_file(RECIPE)
    require_shares(recipe, ALONE)
    require_shares(recipe, Team(0, 2))
    with pytest.raises(UsageError, match="runs 2 windows at once, too few for 3 processes"):
        require_shares(recipe, Team(0, 3))
    drafts = recipe_file("calibration: {}\nstages: [{method: draft.eagle3, batch_size: 2}]\n")
    with pytest.raises(UsageError, match="eagle3 runs 2 windows at once"):
        require_shares(drafts, Team(0, 3))
    with pytest.raises(UsageError, match="no stage of the recipe trains in several"):
        require_shares(recipe_file(), Team(0, 2))
