"""Channels of the stream go everywhere at once: exact where they are dead, ranked, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from compressor.calibration import CalibrationConfig, build_batches
from compressor.errors import ModelError, PlanError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.plan import make_plan
from compressor.resources import builtin_model
from compressor.stages.distilling import _require_comparable
from compressor.stages.prune_hidden import PruneHidden
from compressor.stages.recover_distill import RecoverDistill
from compressor.types import BlockRecord
from tests.model.conftest import build
from tests.model.conftest import checkpoints as checkpoints  # noqa: PLC0414 — a fixture
from tests.test_prune import batches, context, loss, prune

TINY = builtin_model("tiny")
DEAD = [1, 6, 7, 13, 20, 21, 30, 31]
WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
FAMILIES = (
    "llama-tied-biased",
    "mistral",
    "qwen2",
    "qwen3-biased",
    "phi3",
    "smollm3",
    "granite",
    "mixtral",
    "qwen3_moe-mixed",
)


def with_dead_channels(variant: str, folder: Path) -> Path:
    """A model into whose stream nothing ever writes eight channels, on disk."""
    model = build(variant, rms_norm_eps=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter[:, DEAD] = 0
            elif name.endswith(WRITERS):
                parameter[DEAD] = 0
            elif name.endswith("experts.down_proj"):
                parameter[:, DEAD] = 0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", FAMILIES)
def test_dead_channels_are_not_missed(tmp_path: Path, variant: str) -> None:
    parent = with_dead_channels(variant, tmp_path / "parent")
    text = batches()
    result = prune(tmp_path / "out", text, "prune.hidden", parent, hidden=24, multiple=1)
    (batch,) = text.batches
    with torch.inference_mode():
        before, after = (
            load_model(path, dtype=torch.float32)(batch.input_ids).logits[batch.mask]
            for path in (parent, tmp_path / "out")
        )
    torch.testing.assert_close(after, before, atol=2e-5, rtol=2e-5)
    for side in ("least", "largest"):
        assert result.notes[f"{side} factor of a norm"] == pytest.approx((32 / 24) ** 0.5, rel=1e-6)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    old = Architecture.from_config(read_config(parent))
    assert (config.hidden_size, config.head_dim) == (24, old.head_dim)


def test_living_channels_are_missed(tmp_path: Path) -> None:
    """The mutant: four that the model uses go too."""
    parent = with_dead_channels("qwen3-biased", tmp_path / "parent")
    text = batches()
    prune(tmp_path / "out", text, "prune.hidden", parent, hidden=20, multiple=1)
    (batch,) = text.batches
    with torch.inference_mode():
        before, after = (load_model(p)(batch.input_ids).logits for p in (parent, tmp_path / "out"))
    assert (after - before)[batch.mask].abs().max() > 1e-2


def test_keeping_all_keeps_every_byte(tmp_path: Path) -> None:
    result = prune(tmp_path / "out", batches(4096), "prune.hidden", TINY, ratio=0.0)
    before, after = CheckpointReader(TINY), CheckpointReader(tmp_path / "out")
    assert all(before.tensor_sha256(name) == after.tensor_sha256(name) for name in before)
    assert (result.changed, result.resized, result.removed) == ((), (), ())


def test_the_score_beats_chance(tmp_path: Path) -> None:
    text = build_batches(CalibrationConfig(samples=6, length=48), load_tokenizer(TINY))
    other = build_batches(CalibrationConfig(samples=6, length=48, seed=5), load_tokenizer(TINY))
    for score in ("activation", "random"):
        prune(tmp_path / score, text, "prune.hidden", hidden=280, score=score)
    base = loss(TINY, other)
    harm = [loss(tmp_path / score, other) - base for score in ("activation", "random")]
    assert 0 < harm[0] < 0.8 * harm[1]


def test_an_interrupted_stage_ends_with_the_same_bytes(
    tmp_path: Path, checkpoints: Callable[..., Path]
) -> None:
    parent, text = checkpoints("qwen2-tied"), batches()
    whole = prune(tmp_path / "whole", text, "prune.hidden", parent, hidden=24)
    done: list[BlockRecord] = []

    def stop(record: BlockRecord) -> None:
        done.append(record)
        raise KeyboardInterrupt

    stage = PruneHidden(hidden=24)
    with pytest.raises(KeyboardInterrupt):
        stage.run(parent, text, context(tmp_path / "parts", (), stop))
    result = stage.run(parent, text, context(tmp_path / "parts", tuple(done)))
    assert (result.changed, result.notes) == (whole.changed, whole.notes)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


REFUSED = {
    "multiple": ("hidden: 300", "300 channels are no multiple of 64"),
    "heads": ("hidden: 256", r"its heads \(5\) divide, and 256 is none"),
    "budget": ("ratio: 0.2", "must be a multiple of 320, for heads"),
    "more": ("hidden: 384", "384 hidden cannot be kept: the model has 320"),
    "nothing": ("seed: 1", "nothing says how much goes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_in_a_sentence(case: str, recipe_file: Callable[..., object]) -> None:
    """Groups of 64 and five heads leave no width below 320."""
    written, sentence = REFUSED[case]
    recipe = recipe_file(
        f"calibration: {{}}\nstages:\n  - {{method: prune.hidden, {written}}}\n"
        "  - {method: quantize.rtn, group_size: 64}\n"
    )
    with pytest.raises(PlanError, match=sentence):
        make_plan(recipe, read_config(TINY), "builtin:tiny")


def test_the_hint_names_a_width_that_works() -> None:
    """Without rounders: a multiple of 8 that the five heads divide."""
    architecture = Architecture.from_config(read_config(TINY))
    found: list[tuple[str, str, str | None]] = []
    PruneHidden(hidden=300).plan(architecture, lambda *words: found.append(words))
    assert found == [
        (
            "hidden",
            "300 channels are no multiple of 8, which `multiple` or a rounder after it asks for",
            "write 280",
        )
    ]
    PruneHidden(hidden=280).plan(architecture, lambda *words: found.append(words))
    assert len(found) == 1


def test_a_budget_is_met_by_a_width_that_works() -> None:
    architecture = Architecture.from_config(read_config(TINY))
    target = PruneHidden(ratio=0.2).target(architecture)
    assert target.hidden == 240  # of 320, by 8 and by 5 heads: 280 is as far from 0.2
    assert PruneHidden(ratio=0.1).target(architecture).hidden == 280


@pytest.mark.parametrize("variant", ["gemma2", "olmo2", "gpt2", "opt"])
def test_other_norms_are_refused(variant: str, checkpoints: Callable[..., Path]) -> None:
    found: list[str] = []
    architecture = Architecture.from_config(read_config(checkpoints(variant)))
    PruneHidden(hidden=24).plan(architecture, lambda *words: found.append(words[1]))
    assert "its norms are not RMSNorms" in found[0]


def test_hidden_states_of_two_widths_are_not_compared() -> None:
    teacher, student = build("qwen3"), build("qwen3", hidden_size=24)
    _require_comparable(RecoverDistill(), teacher, student)
    with pytest.raises(ModelError, match="32 channels where the model has 24"):
        _require_comparable(RecoverDistill(hidden_states=1.0), teacher, student)
