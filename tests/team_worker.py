"""What every process of a launch runs for tests/test_team.py: stages that train, case by case."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.decoding import writing
from compressor.model.load import load_tokenizer
from compressor.stages import distilling, masking
from compressor.stages.draft_base import TrainedDraftConfig
from compressor.stages.draft_eagle3 import DraftEagle3
from compressor.stages.draft_standalone import DraftStandalone
from compressor.stages.prune_dro import PruneDro
from compressor.stages.recover_distill import RecoverDistill
from compressor.stages.train_base import TrainConfig
from compressor.team import Team, assembled
from compressor.training import Schedule
from compressor.types import TokenBatch
from tests.helpers import stage_context

DOMAINS = ("code", "prose")
ROWS: dict[str, Any] = {"tokens": 4 * 24 * 3, "batch": 4, "precision": "fp32"}
RECOVER = RecoverDistill(
    **ROWS,
    accumulate=2,
    cross_entropy=0.1,
    hidden_states=0.5,
    sampler="dro",
    measure_every=2,
    checkpointing=True,
)
# Batches of 4, 4 and 1 rows, half of them written by the target; every batch is read twice.
DRAFT: dict[str, Any] = {
    "precision": "fp32", "tokens": 9 * 24, "length": 24, "prompt": 6, "batch_size": 4, "steps": 6,
    "probes": 1, "drafted": 2,
}  # fmt: skip
EAGLE = DraftEagle3(
    **DRAFT, vocab=256, ttt_steps=2, features=(0, 1, 1), start="random", matrix_rate=None
)
DRAFTS: dict[str, TrainedDraftConfig] = {
    "eagle3": EAGLE,
    "eagle3-resumed": EAGLE,
    # Muon orthogonalises in bf16, which makes much of little: at a small rate it stays little.
    "standalone": DraftStandalone(
        **DRAFT, on_policy=0.34, continued=8, intermediate=32, matrix_rate=1e-4
    ),
}
CASES: dict[str, TrainConfig] = {
    "recover": RECOVER,
    "resumed": RECOVER,
    "adapters": RecoverDistill(**ROWS, adapters=2, learning_rate=1e-3),
    "masks": PruneDro(**ROWS, intermediate=16, kv_heads=1, ramp=0.0, measure_every=2),
}


def text(tokenizer: Path) -> CalibrationSet:
    """Windows of two domains, one in some rows shorter than in others."""
    found = build_batches(CalibrationConfig(samples=24, length=24), load_tokenizer(tokenizer))
    chosen = [
        TokenBatch(b.input_ids[[row]], b.mask[[row]].clone(), (domain,))
        for b in found.batches
        for row, domain in enumerate(b.domains)
        if domain in DOMAINS
    ]
    for batch in chosen[::2]:
        batch.mask[:, 17:] = False
    return replace(found, batches=tuple(chosen))


def run(case: str, parents: Path, folder: Path, words: CalibrationSet, team: Team) -> None:
    """Train; the notes of the result go to a file beside the folder."""
    context = stage_context(folder / case, original=parents / "whole", team=team)
    if case in DRAFTS:
        result = DRAFTS[case].run(parents / "whole", words, context)
    else:
        result = CASES[case].run(parents / "pruned", words, context)
    if team.leads:
        (folder / f"{case}.json").write_text(json.dumps(dict(result.notes)))
    else:
        assert not result.changed


def often(
    schedule: Callable[[TrainedDraftConfig], Schedule],
) -> Callable[[TrainedDraftConfig], Schedule]:
    """The same schedule with a checkpoint in the middle."""
    return lambda config: replace(schedule(config), every=3)


def main(parents: Path, folder: Path, cases: list[str]) -> None:
    """Run cases with whoever else was started."""
    distilling._HELD = 3  # more than a turn of two processes, and not a multiple
    distilling._EVERY = 1
    masking._FISHER_WINDOWS = 5
    writing._TOGETHER = 2
    TrainedDraftConfig.schedule = often(TrainedDraftConfig.schedule)  # type: ignore[method-assign]
    words = text(parents / "whole")
    with assembled() as team:
        for case in cases:
            run(case, parents, folder, words, team)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
