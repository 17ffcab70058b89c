"""`quantize.autoround` on the built-in model and real text."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from compressor import resources
from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.formats.shards import CheckpointReader
from compressor.model import precision
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer
from compressor.model.walk import BlockWalk
from compressor.numerics.signround import LearnedRounding
from compressor.stages.context import StageContext
from compressor.stages.learning import _checkpoints
from compressor.stages.quantize_autoround import QuantizeAutoround
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import ACTIVATIONS, BlockRecord, StageResult, TokenBatch, WeightScheme
from tests.helpers import stage_context
from tests.model.conftest import build
from tests.test_resume import RECIPE, at_line, attempt, events, result

TINY = resources.builtin_model("tiny")


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    config = CalibrationConfig(samples=6, length=32, batch_size=2)
    return build_batches(config, load_tokenizer(TINY))


def context(folder: Path, records: list[BlockRecord]) -> StageContext:
    told = records.append
    return stage_context(folder / "stage", block_done=told)


def stage(**options: Any) -> QuantizeAutoround:
    quick = {"bits": 3, "group_size": 64, "grid": "minmax", "steps": 24, "checks": 3}
    return QuantizeAutoround(**(quick | {"precision": "float32", "rate": 0.02} | options))


def files(outcome: StageResult) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(outcome.checkpoint.iterdir())}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_running_through_is_running_with(family: str, tmp_path: Path) -> None:
    """The same output as with the weights in place, gradients to all of them, nothing left."""
    build(family, torch.bfloat16).save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = (TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",) * 2),)
    walk = BlockWalk(tmp_path / "model", batches, scratch=tmp_path / "scratch")
    block = next(walk.blocks())
    before = block.run(0)
    weights = {
        m.info.name: (m.weight * 0.5).bfloat16().float().requires_grad_()
        for m in block.matrices
        if m.info.role != "router"
    }
    output = block.run_through(0, weights)
    output.square().sum().backward()  # type: ignore[no-untyped-call]
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0
    assert torch.equal(block.run(0), before)
    for matrix in block.matrices:
        if matrix.info.name in weights:
            matrix.set_weight(weights[matrix.info.name].detach())
    assert torch.allclose(block.run(0), output, atol=1e-6)


def test_gradients_pass_rounded_inputs(calibration: CalibrationSet, tmp_path: Path) -> None:
    """Learning sees what serving will do to inputs, and still reaches the first matrices."""
    names = Architecture.from_config(read_config(TINY)).block(0)
    rounded = {matrix.name: ACTIVATIONS["int8"] for matrix in names}
    slopes = []
    for activations in ({}, rounded):
        walk = BlockWalk(
            TINY,
            calibration.batches,
            scratch=tmp_path / str(len(activations)),
            activations=activations,
        )
        block = next(walk.blocks())
        weights = {m.info.name: (0.9 * m.weight).requires_grad_() for m in block.matrices}
        block.run_through(0, weights).square().sum().backward()  # type: ignore[no-untyped-call]
        slopes.append([weight.grad for weight in weights.values()])
    for plain, through in zip(*slopes, strict=True):
        assert plain is not None
        assert through is not None
        assert (through - plain).norm() < 0.2 * plain.norm()
        assert not torch.equal(through, plain)


def test_learned_rounding_beats_nearest_in_every_block(
    calibration: CalibrationSet, tmp_path: Path
) -> None:
    records: list[BlockRecord] = []
    outcome = stage().run(TINY, calibration, context(tmp_path / "learned", records))
    assert len(records) == 4
    for record in records:
        best = record.notes[f"block_loss.{record.block:03d}"]
        nearest = record.notes[f"block_loss_nearest.{record.block:03d}"]
        assert 0 < best < 0.8 * nearest
    assert not outcome.fallbacks
    assert len(outcome.changed) == 4 * 7
    # The first block sees the same inputs as with rounding to nearest: its error is that one's.
    nearest_stage = QuantizeRtn(bits=3, group_size=64, grid="minmax")
    plain = nearest_stage.run(TINY, calibration, context(tmp_path / "nearest", []))
    errors = errors_of_first_block([plain, outcome], calibration, tmp_path)
    notes = records[0].notes
    assert errors[0] == pytest.approx(notes["block_loss_nearest.000"], rel=1e-3)
    assert errors[1] == pytest.approx(notes["block_loss.000"], rel=1e-3)


def test_same_seed_same_bytes_other_seed_others(
    calibration: CalibrationSet, tmp_path: Path
) -> None:
    narrow = {"targets": ("v", "down"), "steps": 4, "checks": 1}
    runs = [
        files(stage(seed=seed, **narrow).run(TINY, calibration, context(tmp_path / str(i), [])))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_what_does_not_help_is_not_kept(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps up the gradient make every block worse; then it is rounded to nearest, and said so."""
    down = LearnedRounding.step
    monkeypatch.setattr(LearnedRounding, "step", lambda self, rate: down(self, -rate))
    records: list[BlockRecord] = []
    outcome = stage(targets=("mlp",), steps=6).run(
        TINY, calibration, context(tmp_path / "up", records)
    )
    assert len(outcome.fallbacks) == 4 * 3
    assert {f.action for f in outcome.fallbacks} == {"rounded to nearest"}
    plain = QuantizeRtn(bits=3, group_size=64, grid="minmax", targets=("mlp",))
    other = plain.run(TINY, calibration, context(tmp_path / "nearest", []))
    assert files(outcome) == files(other)


def test_learning_begins_at_the_codes_of_gptq(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their error is where it starts, it goes down from there, and where it cannot they stay."""
    records: list[BlockRecord] = []
    learned = stage(grid="gptq", rate=None, bits=2)
    outcome = learned.run(TINY, calibration, context(tmp_path / "learned", records))
    assert not outcome.fallbacks
    compensated = QuantizeGptq(bits=2, group_size=64, precision="float32")
    gptq = compensated.run(TINY, calibration, context(tmp_path / "gptq", []))
    for record in records:
        best, first = (record.notes[f"block_loss{s}.{record.block:03d}"] for s in ("", "_gptq"))
        assert 0 < best < 0.97 * first
    starts = [records[0].notes["block_loss_gptq.000"], records[0].notes["block_loss.000"]]
    assert errors_of_first_block([gptq, outcome], calibration, tmp_path) == [
        pytest.approx(starts[0], rel=0.03),  # its sums run over halves of batches
        pytest.approx(starts[1], rel=1e-3),
    ]
    down = LearnedRounding.step
    monkeypatch.setattr(LearnedRounding, "step", lambda self, rate: down(self, -rate))
    kept = stage(grid="gptq", targets=("v", "down"), bits=2, steps=4).run(
        TINY, calibration, context(tmp_path / "up", [])
    )
    assert {f.action for f in kept.fallbacks} == {"the codes of GPTQ stay"}
    assert len(kept.fallbacks) == 4 * 2


@pytest.mark.parametrize("grid", ["imatrix", "clip"])
def test_learning_begins_at_grids_that_read_text(
    grid: Literal["imatrix", "clip"], calibration: CalibrationSet, tmp_path: Path
) -> None:
    """Its first error is that of rounding to nearest on the grid, and it goes down from there."""
    records: list[BlockRecord] = []
    learned = stage(grid=grid, rate=None, bits=2).run(
        TINY, calibration, context(tmp_path / "learned", records)
    )
    nearest = QuantizeRtn(bits=2, group_size=64, grid=grid, force=True)
    rounded = nearest.run(TINY, calibration, context(tmp_path / "nearest", []))
    notes = records[0].notes
    first, best = notes["block_loss_nearest.000"], notes["block_loss.000"]
    assert best < 0.9 * first
    assert errors_of_first_block([rounded, learned], calibration, tmp_path) == [
        pytest.approx(first, rel=0.03),
        pytest.approx(best, rel=1e-3),
    ]


def errors_of_first_block(
    results: list[StageResult], calibration: CalibrationSet, folder: Path
) -> list[float]:
    """Share of the original's output that checkpoints lose in their first block."""
    walks = [
        BlockWalk(checkpoint, calibration.batches, scratch=folder / f"scratch{i}")
        for i, checkpoint in enumerate([TINY, *(result.checkpoint for result in results)])
    ]
    blocks = [next(walk.blocks()) for walk in walks]
    wanted, *found = [torch.cat([block.run(i) for i in range(3)]).double() for block in blocks]
    return [float((y - wanted).square().sum() / wanted.square().sum()) for y in found]


def test_rates_and_checks() -> None:
    assert stage(rate=None, grid="gptq").first_rate == 1 / 200
    assert stage(rate=None, grid="gptq", steps=1000).first_rate == 2 / 1000
    assert stage(rate=None).first_rate == 1 / 24
    assert stage(rate=None, steps=1000).first_rate == 2 / 1000
    assert stage(rate=None, steps=1000, bits=4).first_rate == 1 / 1000
    assert stage(rate=0.1).first_rate == 0.1
    assert _checkpoints(200, 4) == {50, 100, 150, 200}
    assert _checkpoints(10, 3) == {4, 7, 10}
    assert _checkpoints(1, 4) == {1}


def test_the_plan_prices_the_steps(tmp_path: Path) -> None:
    from compressor.plan import make_plan
    from compressor.recipe import load_recipe

    def planned(model: Path, **options: Any) -> Any:
        lines = "".join(f"    {key}: {value}\n" for key, value in options.items())
        text = RECIPE.replace("quantize.gptq\n", f"quantize.autoround\n{lines}")
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return make_plan(load_recipe(path), read_config(model), "model").stages[0]

    few, many = planned(TINY, steps=10), planned(TINY, steps=1000)
    assert many.flops > 20 * few.flops
    assert many.peak_bytes == few.peak_bytes


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe-mixed"])
def test_routed_experts_learn_from_gptq(
    variant: str, calibration: CalibrationSet, tmp_path: Path
) -> None:
    build(variant, torch.bfloat16, vocab_size=4096).save_pretrained(tmp_path / "model")
    records: list[BlockRecord] = []
    narrow = {"targets": ("*.experts.*",), "group_size": 16, "bits": 2}
    begun = stage(grid="gptq", rate=None, **narrow)
    begun.run(tmp_path / "model", calibration, context(tmp_path, records))
    sparse = [record for record in records if record.metrics]
    assert sparse
    for record in sparse:
        best, first = (record.notes[f"block_loss{s}.{record.block:03d}"] for s in ("", "_gptq"))
        assert 0 < best < first


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe-mixed"])
def test_routed_experts_learn_as_well(
    variant: str, calibration: CalibrationSet, tmp_path: Path
) -> None:
    """Blocks lose less than with experts rounded to nearest, whose codes differ from the learned.

    The experts alone are rounded, so that it is they whose rounding is learned.
    """
    build(variant, torch.bfloat16, vocab_size=4096).save_pretrained(tmp_path / "model")
    narrow = {"targets": ("*.experts.*",), "group_size": 16, "steps": 32}
    records: list[BlockRecord] = []
    outcome = stage(**narrow).run(tmp_path / "model", calibration, context(tmp_path, records))
    sparse = [record for record in records if record.metrics]
    assert sparse
    for record in sparse:
        best = record.notes[f"block_loss.{record.block:03d}"]
        nearest = record.notes[f"block_loss_nearest.{record.block:03d}"]
        assert 0 < best < 0.9 * nearest
    assert not outcome.fallbacks
    assert len(outcome.changed) == 9 * len(sparse)
    plain = QuantizeRtn(bits=3, group_size=16, grid="minmax", targets=narrow["targets"])  # type: ignore[arg-type]
    other = plain.run(tmp_path / "model", calibration, context(tmp_path / "nearest", []))
    learned, nearest_ = (CheckpointReader(r.checkpoint) for r in (outcome, other))
    assert set(plain.schemes(Architecture.from_config(read_config(tmp_path / "model")))) == {
        name.removesuffix(".weight") for name in outcome.changed
    }
    moved = [n for n in outcome.changed if not torch.equal(learned[n], nearest_[n])]
    assert len(moved) > 0.8 * len(outcome.changed)


def test_the_plan_refuses_other_numbers_than_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    class FloatScheme(WeightScheme):
        """A grid that says more than bits, group and symmetry."""

    tiny = Architecture.from_config(read_config(TINY))
    found: list[str] = []
    stage().plan(tiny, lambda *problem: found.append(problem[1]))
    assert not found
    grids = {name: FloatScheme(4, 64) for name in stage().schemes(tiny)}
    monkeypatch.setattr(QuantizeAutoround, "schemes", lambda *_: grids)
    stage().plan(tiny, lambda *problem: found.append(problem[1]))
    assert "plain integer grids only" in found[0]


def test_killed_within_a_block(tmp_path: Path) -> None:
    recipe = RECIPE.replace("quantize.gptq\n", "quantize.autoround\n    steps: 3\n    checks: 1\n")
    recipe = recipe[: recipe.index("export:")].replace("length: 64", "length: 16")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert attempt(tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    assert attempt(folder, at_line, 4, "torn") == -signal.SIGKILL
    assert events(folder).count("block_done") == 1
    assert attempt(folder) == 0
    assert events(folder).count("block_done") == 4
    assert result(folder) == result(tmp_path / "whole")


def test_gradients_survive_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs compute models of fp16 in; of thousands of tokens' mean little was left in it."""
    model = build(
        "llama", torch.float16, hidden_size=256, intermediate_size=512, num_hidden_layers=1
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "embed" in name:
                weight.mul_(0.02)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 90, (64, 64), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",) * 64)
    text = CalibrationSet((batch,), (), {"prose": 4096}, "")
    left = []
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(precision, "calibration_dtype", lambda *_, dtype=dtype: dtype)
        where = stage_context(tmp_path / str(dtype))
        found = stage(bits=4, group_size=32, steps=6).run(tmp_path / "model", text, where).notes
        left.append(found["block_loss.000"] / found["block_loss_nearest.000"])
    assert left[0] < 0.7
    assert left[1] == pytest.approx(left[0], rel=0.03)
