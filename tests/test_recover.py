"""Distillation brings a pruned model back, goes on where it was killed, and leans as it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.errors import ModelError, PlanError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer
from compressor.plan import make_plan
from compressor.progress import SilentObserver
from compressor.resources import builtin_model
from compressor.stages import distilling
from compressor.stages.context import StageContext
from compressor.stages.prune_width import PruneWidth
from compressor.stages.recover_distill import RecoverDistill
from compressor.stages.sampling import Rows
from compressor.types import StageResult
from compressor.verify import verify_tensors
from tests.helpers import Killed, Killer, stage_context
from tests.model.conftest import build

TINY = builtin_model("tiny")


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return build_batches(CalibrationConfig(samples=20, length=48), load_tokenizer(TINY))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    PruneWidth(score="random", intermediate=640).run(TINY, None, context(folder))
    return folder


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "_HELD", 2)


def context(folder: Path, observer=None) -> StageContext:
    return stage_context(folder, observer=observer or SilentObserver(), original=TINY)


def recover(pruned: Path, folder: Path, text: CalibrationSet | None, **options) -> StageResult:
    stage = RecoverDistill(**{"tokens": 4 * 48 * 6, "batch": 4, "precision": "fp32", **options})
    result = stage.run(pruned, text, context(folder))
    verify_tensors(pruned, folder, result.changed, result.added)
    return result


def domain_losses(result: StageResult, when: str) -> dict[str, float]:
    start = f"held-out KL {when}, "
    return {n.removeprefix(start): v for n, v in result.notes.items() if n.startswith(start)}


def test_training_brings_the_predictions_back(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    result = recover(pruned, tmp_path / "out", text, tokens=4 * 48 * 20, learning_rate=3e-4)
    before, after = (domain_losses(result, when) for when in ("before", "after"))
    assert len(before) == 6
    assert sum(after.values()) < 0.8 * sum(before.values())
    assert result.notes["updates"] == 20
    lines = [json.loads(line) for line in (tmp_path / "out" / "dro.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 20]
    assert lines[0]["shares"] == lines[1]["shares"]


@pytest.mark.parametrize("sampler", ["static", "dro"])
def test_a_killed_training_ends_with_the_same_bytes(
    tmp_path: Path,
    pruned: Path,
    text: CalibrationSet,
    sampler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distilling, "_EVERY", 2)
    options = {"sampler": sampler, "measure_every": 3, "tokens": 4 * 48 * 6}
    whole = recover(pruned, tmp_path / "whole", text, **options)
    stage = RecoverDistill(batch=4, precision="fp32", **options)
    with pytest.raises(Killed):
        stage.run(pruned, text, context(tmp_path / "parts", Killer(4)))
    result = stage.run(pruned, text, context(tmp_path / "parts"))
    assert replace(result, checkpoint=whole.checkpoint) == whole
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_parts_of_an_update_add_up_to_it(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    found = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        recover(pruned, folder, text, accumulate=parts, tokens=4 * 48, learning_rate=1e-3)
        name = "model.layers.2.mlp.down_proj.weight"
        moved = CheckpointReader(folder)[name].float() - CheckpointReader(pruned)[name].float()
        found.append(moved)
    assert found[0].abs().max() > 0
    same = (found[0] - found[1]).norm() / found[0].norm()
    assert same < 0.02


def test_other_losses_train_too(tmp_path: Path, pruned: Path, text: CalibrationSet) -> None:
    options = {"top_k": 20, "cross_entropy": 0.1, "temperature": 2.0, "checkpointing": True}
    options |= {"hidden_states": 0.5, "precision": "bf16"}
    result = recover(
        pruned, tmp_path / "out", text, tokens=4 * 48 * 8, learning_rate=3e-4, **options
    )
    before, after = (domain_losses(result, when) for when in ("before", "after"))
    assert sum(after.values()) < sum(before.values())


def test_a_time_box_that_ends_training_is_in_the_report(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    minutes = 1e-9  # over after the first update
    result = recover(pruned, tmp_path / "out", text, minutes=minutes)
    (fallback,) = result.fallbacks
    assert fallback.reason == "1e-09 minutes were over after 1 of 6 updates"
    assert not recover(pruned, tmp_path / "whole", text, tokens=48 * 4).fallbacks
    assert "up to" in RecoverDistill(minutes=1).label


def test_shares_lean_towards_the_worst_domain(
    tmp_path: Path, pruned: Path, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code alone is far away; nothing else is, so that only code may gain a share."""
    domains = ("code", "docs", "encyclopedia", "multilingual", "prose", "speeches")
    spread = torch.tensor([-0.01, 0.01, -0.01, 0.01]).double()
    losses = {name: spread + (1.0 if name == "code" else 0.1) for name in domains}
    monkeypatch.setattr(distilling.Judge, "measure", lambda _: losses)
    recover(pruned, tmp_path / "out", text, sampler="dro", tokens=4 * 48, radius=0.1)
    line = json.loads((tmp_path / "out" / "dro.jsonl").read_text().splitlines()[0])
    rows = Rows(text.batches)
    ratios = torch.tensor([line["shares"][name] for name in domains]) / rows.shares
    assert ratios[0] > 1.4
    assert (ratios[1:] < 1).all()
    distance = 0.5 * float((rows.shares * (ratios - 1).square()).sum())
    assert 0.09 < distance <= 0.1
    noise = {name: 4 * spread + (0.11 if name == "code" else 0.1) for name in domains}
    monkeypatch.setattr(distilling.Judge, "measure", lambda _: noise)
    result = recover(pruned, tmp_path / "noise", text, sampler="dro", tokens=4 * 48)
    line = json.loads((tmp_path / "noise" / "dro.jsonl").read_text().splitlines()[0])
    assert list(line["shares"].values()) == pytest.approx(rows.shares.tolist())
    assert line["radius"] == 0
    assert [point.at for point in result.mixture] == [0, 1]
    assert result.mixture[0].shares == line["shares"]


def test_updates_draw_domains_by_their_shares(text: CalibrationSet) -> None:
    rows = Rows(text.batches)
    shares = torch.zeros(6).double()
    shares[rows.domains.index("prose")] = 1
    drawn = [rows.draw(shares, 4, 0, step) for step in range(3)]
    assert {rows.batch(chosen).domains for chosen in drawn} == {("prose",) * 4}
    again = [rows.draw(shares, 4, 0, step) for step in range(3)]
    assert drawn == again
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("batch: 8\n    accumulate: 3", "3 parts do not divide a batch of 8"),
        ("top_k: 4096", "not fewer than the vocabulary"),
        ("mix: defualt", "no calibration mix 'defualt'"),
        ("mix: default\n    length: 1024", "longer than the model's context"),
    ],
)
def test_the_plan_refuses_in_a_sentence(option: str, sentence: str, recipe_file) -> None:
    recipe = recipe_file(
        f"calibration: {{}}\nstages:\n  - method: recover.distill\n    {option}\n"
        "export: [{format: dense}]\n"
    )
    with pytest.raises(PlanError, match=sentence):
        make_plan(recipe, read_config(TINY), "builtin:tiny")


def test_experts_and_strangers_are_refused(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    found: list[str] = []
    architecture = Architecture.from_config(build("mixtral").config.to_dict())
    RecoverDistill().plan(architecture, lambda *words: found.append(words[1]))
    assert "experts of Mixtral" in found[0]
    alone = replace(context(tmp_path / "out"), original=None)
    with pytest.raises(ModelError, match="needs the original"):
        RecoverDistill().run(pruned, text, alone)
    other = tmp_path / "other"
    build("llama").save_pretrained(other)
    with pytest.raises(ModelError, match="predicts 96 tokens and the student 4096"):
        RecoverDistill().run(pruned, text, replace(alone, original=other))


def test_a_loss_that_is_no_number_stops_with_a_sentence(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pruned.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in broken.glob("*.safetensors") if "outside" in path.name)
    reader = CheckpointReader(pruned)
    names = [name for name in reader if not name.startswith("model.layers")]
    tensors = {name: reader[name] for name in names}
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("inf"))
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(Exception, match="the loss of training step 0 is nan"):
        recover(broken, tmp_path / "out", text)


def test_adapters_are_merged_and_nothing_else_moves(
    tmp_path: Path, pruned: Path, text: CalibrationSet
) -> None:
    """Every matrix of the blocks moves by a sum of the rank, up to rounding; the others stay."""
    result = recover(
        pruned, tmp_path / "out", text, adapters=2, tokens=4 * 48 * 8, learning_rate=5e-3
    )
    before, after = CheckpointReader(pruned), CheckpointReader(tmp_path / "out")
    architecture = Architecture.from_config(read_config(pruned))
    inside = {matrix.tensor for matrix in architecture.matrices if matrix.block is not None}
    assert set(result.changed) == inside
    name = "model.layers.1.mlp.up_proj.weight"
    values = torch.linalg.svdvals((after[name].float() - before[name].float()).double())
    assert values[1] > 8 * values[2]
    losses = [domain_losses(result, when) for when in ("before", "after")]
    assert sum(losses[1].values()) < sum(losses[0].values())


def test_the_plan_counts_what_training_costs() -> None:
    tiny = Architecture.from_config(read_config(TINY))
    inside = sum(matrix.parameters for matrix in tiny.matrices if matrix.block is not None)
    products = inside + tiny.hidden * tiny.vocab  # the head multiplies, the embedding looks up
    stage = RecoverDistill(tokens=1000, batch=8, accumulate=2, mix="default", length=64)
    assert stage.flops(tiny) == 1000 * (2 + 6) * products  # the original, then forward and backward
    again = RecoverDistill(tokens=1000, checkpointing=True)
    assert again.flops(tiny) == stage.flops(tiny) + 2 * 1000 * inside
    logits = 3 * 4 * (8 // 2) * 64 * tiny.vocab
    assert stage.memory(tiny) == 5 * 4 * tiny.parameters + logits  # weights, gradients, moments
