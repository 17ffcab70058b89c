"""Rotations learned on text: the function stays, and the rounded model comes closer, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import resources
from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.errors import RecipeError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.load import load_tokenizer
from compressor.recipe import load_recipe
from compressor.stages import rotating, rotation_learning
from compressor.stages.transform_rotate import TransformRotate
from compressor.types import BlockRecord, StageResult
from compressor.verify import verify_tensors
from tests.model.conftest import build
from tests.stages.test_transform_rotate import context, require_same_function

TINY = resources.builtin_model("tiny")


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    config = CalibrationConfig(samples=8, length=32, batch_size=4)
    return build_batches(config, load_tokenizer(TINY))


def saved(tmp_path: Path, variant: str, dtype: torch.dtype = torch.float32) -> Path:
    folder = tmp_path / "parent"
    build(variant, dtype, vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def stage(**options: Any) -> TransformRotate:
    return TransformRotate(**({"learn": 12, "bits": 3, "group_size": 16, "angle": 0.02} | options))


def run(
    parent: Path, calibration: CalibrationSet, name: str, block_done: Any = None, **options: Any
) -> StageResult:
    surroundings = context(parent.parent / name / "child", block_done=block_done)
    return stage(**options).run(parent, calibration, surroundings)


def content(result: StageResult) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(result.checkpoint.iterdir())}


@pytest.mark.parametrize(
    ("variant", "where"),
    [("llama", "all"), ("qwen2-tied", "residual"), ("phi3", "all"), ("gemma2", "heads")],
)
def test_the_function_stays_and_the_rounded_model_comes_closer(
    variant: str, where: str, calibration: CalibrationSet, tmp_path: Path
) -> None:
    parent = saved(tmp_path, variant)
    learned, again = (run(parent, calibration, name, where=where) for name in ("one", "two"))
    verify_tensors(parent, learned.checkpoint, learned.changed, learned.added)
    require_same_function(parent, learned.checkpoint)
    notes = learned.notes
    assert notes["held-out KL rounded"] < notes["held-out KL rounded, seed"]
    assert notes["largest logit difference in fp32, before storage"] < 2e-5
    assert not learned.fallbacks
    assert content(learned) == content(again)
    seeded = run(parent, calibration, "seeded", where=where, learn=0)
    first, second = (CheckpointReader(r.checkpoint) for r in (seeded, learned))
    name = next(n for n in learned.changed if "o_proj" in n)
    turned = (first[name] - second[name]).norm() / first[name].norm()
    assert 0.005 < float(turned) < 0.7


def test_an_interrupted_stage_does_not_learn_again(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = saved(tmp_path, "qwen2-tied", torch.bfloat16)

    class Killed(Exception):
        pass

    def kill(_: BlockRecord) -> None:
        raise Killed

    whole = run(parent, calibration, "whole")
    with pytest.raises(Killed):
        run(parent, calibration, "parts", kill)
    monkeypatch.setattr(rotating, "learn", lambda *_: pytest.fail("learned twice"))
    surroundings = context(tmp_path / "parts" / "child", finished=(BlockRecord(0),))
    resumed = stage().run(parent, calibration, surroundings)
    assert content(resumed) == content(whole)
    assert resumed.notes == whole.notes


def test_what_never_helps_leaves_the_rotations_of_the_seed(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every check on held-out text comes out as the start did, or worse."""
    parent = saved(tmp_path, "llama")
    found = iter([0.5, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(rotation_learning._Bench, "distance", lambda *_: next(found))
    vain = run(parent, calibration, "vain", learn=4)
    assert [fallback.action for fallback in vain.fallbacks] == ["they stay as the seed has them"]
    assert vain.notes["held-out KL rounded"] == vain.notes["held-out KL rounded, seed"] == 0.5
    seeded = run(parent, calibration, "seeded", learn=0)
    assert content(vain) == content(seeded)


def test_a_rounded_matrix_is_that_of_the_turned_model(
    calibration: CalibrationSet, tmp_path: Path
) -> None:
    """What the loss sees is the function of the turned checkpoint with its matrices rounded."""
    from compressor.model.load import load_model
    from compressor.stages.quantize_rtn import QuantizeRtn

    parent = saved(tmp_path, "llama")
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "grid": "minmax"}
    learned = run(parent, calibration, "learned", learn=4)
    child = tmp_path / "rtn" / "child"
    rounded = QuantizeRtn(**options).run(learned.checkpoint, None, context(child))
    base, after = load_model(parent), load_model(rounded.checkpoint)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in rotating.held_out(parent, 64):
            p, q = (
                m(batch.input_ids, attention_mask=batch.mask.long()).logits[batch.mask]
                for m in (base, after)
            )
            kl = torch.nn.functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
            )
            total, tokens = total + float(kl.sum()), tokens + int(batch.mask.sum())
    # The largest weight of a group lies half-way between two codes, so that a bit decides.
    assert total / tokens == pytest.approx(learned.notes["held-out KL rounded"], rel=0.1)


def test_what_cannot_be_learned_is_refused_by_the_plan(tmp_path: Path) -> None:
    def problems(variant: str, **options: Any) -> list[str]:
        found: list[str] = []
        architecture = Architecture.from_config(build(variant).config.to_dict())
        stage(**options).plan(architecture, lambda _, message, hint: found.append(message + hint))
        return found

    assert not problems("llama")
    assert "no module of its own" in problems("mixtral")[0]
    assert "no module of its own" in problems("gpt2", where="heads")[0]
    assert "groups of 128 do not divide" in problems("llama", group_size=128)[0]
    assert not problems("mixtral", learn=0)
    text = "stages:\n  - {method: transform.rotate, learn: 5}\n  - {method: quantize.rtn}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "learned on calibration text" in caught.value.problems[0].message


def test_wide_streams_are_learned_in_blocks_and_the_plan_says_what_it_holds() -> None:
    assert stage().learned_block(320) == 320
    assert stage().learned_block(4096) == 1024
    assert stage().learned_block(1536) == 768
    architecture = Architecture.from_config(build("llama").config.to_dict())
    assert stage().memory(architecture) > 16 * architecture.parameters
    assert "whole model in fp32" in stage().remarks(architecture)[-1]
    assert stage(learn=0).memory(architecture) == 0
    assert stage(learn=120).flops(architecture) == 10 * stage().flops(architecture)
