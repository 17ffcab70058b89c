"""What every process of a launch runs for tests/test_team.py: stages that train, case by case."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.model.load import load_tokenizer
from compressor.stages import distilling, masking
from compressor.stages.prune_dro import PruneDro
from compressor.stages.recover_distill import RecoverDistill
from compressor.stages.train_base import TrainConfig
from compressor.team import Team, assembled
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
    """Train; what stands in the result goes to `result.json` beside the folder."""
    context = stage_context(folder / case, original=parents / "whole", team=team)
    result = CASES[case].run(parents / "pruned", words, context)
    if team.leads:
        (folder / f"{case}.json").write_text(json.dumps(dict(result.notes)))
    else:
        assert not result.changed


def main(parents: Path, folder: Path, cases: list[str]) -> None:
    """Run cases with whoever else was started."""
    distilling._HELD = 3  # more than a turn of two processes, and not a multiple
    distilling._EVERY = 1
    masking._FISHER_WINDOWS = 5
    words = text(parents / "whole")
    with assembled() as team:
        for case in cases:
            run(case, parents, folder, words, team)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
