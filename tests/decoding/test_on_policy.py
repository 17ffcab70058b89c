"""Training on what the draft itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.decoding.corpus import Corpus
from compressor.decoding.standalone import standalone
from compressor.progress import SilentObserver
from compressor.stages.draft_standalone import DraftStandalone
from compressor.stages.drafting import on_policy_loss
from compressor.training import Schedule, fit
from compressor.types import TokenBatch
from tests.model.conftest import build

CONFIG = DraftStandalone(prompt=4, length=16, continued=12, loss="kl", seed=7, precision="fp32")
HELD_OUT = 10_000  # a step that training never reaches: other draws of the same seed


def parts(folder: Path) -> tuple[Any, Any, Corpus]:
    target = build("llama")
    target.lm_head.weight.data *= 4  # a target that knows what it wants
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, mask, ("",) * 8)
    corpus = Corpus(target, [batch], (), folder, 10**7, SilentObserver())
    return target, standalone(target, (0,)), corpus


class Killed(Exception):
    pass


def train(folder: Path, stop: int | None = None) -> tuple[float, float, dict[str, Tensor]]:
    target, student, corpus = parts(folder / "corpus")
    folder.mkdir(exist_ok=True)

    def loss(step: int) -> Tensor:
        if step == stop:
            raise Killed
        return on_policy_loss(CONFIG, student, target, corpus, step)

    with torch.no_grad():
        before = float(on_policy_loss(CONFIG, student, target, corpus, HELD_OUT))
    weights = dict(student.named_parameters())
    schedule = Schedule(steps=30, learning_rate=3e-3, every=10)
    fit(weights, loss, schedule, folder, SilentObserver())
    with torch.no_grad():
        after = float(on_policy_loss(CONFIG, student, target, corpus, HELD_OUT))
    return before, after, weights


def test_it_comes_nearer_to_the_target_on_its_own_text(tmp_path: Path) -> None:
    before, after, _ = train(tmp_path)
    assert after < 0.7 * before


def test_an_interrupted_run_ends_in_the_same_state(tmp_path: Path) -> None:
    *_, whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "cut", 25)
    *_, resumed = train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_what_the_draft_wrote_counts(tmp_path: Path) -> None:
    """A draft that is the target has no loss, and one that is not has."""
    target, _, corpus = parts(tmp_path)
    same = standalone(target, (0, 1))
    with torch.no_grad():
        assert float(on_policy_loss(CONFIG, same, target, corpus, 0)) == pytest.approx(0, abs=1e-5)
        one = float(on_policy_loss(CONFIG, parts(tmp_path / "b")[1], target, corpus, 0))
    assert one > 0.05
