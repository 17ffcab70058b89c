"""Run beside the leading process what it cannot run alone.

Recipe, plan, journal and files are the leader's. It tells the others what it is about to run, and
at the end that there is nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.calibration import CalibrationSet
from compressor.errors import UsageError
from compressor.machine import activation_budget
from compressor.progress import SilentObserver
from compressor.recipe import Recipe
from compressor.sessions import default_device
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.team import Team


@dataclass(frozen=True)
class Job:
    """A stage that all processes run.

    Attributes:
        stage: its options.
        checkpoint: what it starts from.
        calibration: text.
        folder, scratch, original, dtype: see `StageContext`. Only the leader writes there.
        seed: of the recipe.
    """

    stage: StageConfig
    checkpoint: Path
    calibration: CalibrationSet | None
    folder: Path
    scratch: Path
    original: Path | None
    dtype: torch.dtype
    seed: int

    def run(self, team: Team) -> None:
        """Run it as one that follows; what comes out is the leader's."""
        torch.manual_seed(self.seed)
        context = StageContext(
            folder=self.folder,
            scratch=self.scratch,
            device=default_device(),
            dtype=self.dtype,
            activation_budget=activation_budget(),
            finished=(),
            block_done=lambda _: None,
            observer=SilentObserver(),
            original=self.original,
            team=team,
        )
        self.stage.run(self.checkpoint, self.calibration, context)


def follow(team: Team) -> None:
    """Run what the leader runs until it is done."""
    while (job := team.hear(None)) is not None:
        assert isinstance(job, Job)
        job.run(team)


def require_shares(recipe: Recipe, team: Team) -> None:
    """Refuse a launch of several processes that would have nothing to do.

    Raises:
        UsageError: no stage trains, or a part of an update has fewer windows than processes.
    """
    if team.alone:
        return
    shared = [stage for stage in recipe.stages if stage.shared]
    if not shared:
        raise UsageError(
            f"{team.size} processes were started, and no stage of the recipe trains in several",
            "start one process",
        )
    for stage in shared:
        if stage.windows_at_once < team.size:
            message = f"{stage.method} runs {stage.windows_at_once} windows at once, too few for "
            raise UsageError(f"{message}{team.size} processes", "a larger `batch` has more")
