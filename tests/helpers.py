"""What tests share: a context, a run held to promises and plan, a kill in training, a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.calibration import CalibrationSet
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.progress import SilentObserver
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.types import StageResult
from compressor.verify import verify_result


def stage_context(folder: Path, **changes: Any) -> StageContext:
    """A first start that writes to `folder` in fp32 on the CPU and tells nobody."""
    made = StageContext(
        folder=folder,
        scratch=folder.parent / f"{folder.name}-scratch",
        device=torch.device("cpu"),
        dtype=torch.float32,
        activation_budget=1 << 26,
        finished=(),
        block_done=lambda _: None,
        observer=SilentObserver(),
    )
    return replace(made, **changes)


def checked_run(
    stage: StageConfig, parent: Path, text: CalibrationSet | None, context: StageContext
) -> StageResult:
    """Run a stage, hold it to its promises and to its plan."""
    result = stage.run(parent, text, context)
    verify_result(parent, result)
    planned = stage.plan(Architecture.from_config(read_config(parent)), pytest.fail)
    reader = CheckpointReader(context.folder)
    assert {name: reader.shape(name) for name in reader} == dict(planned.tensors())
    assert Architecture.from_config(read_config(context.folder)).parameters == planned.parameters
    return result


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Within it, the operating system refuses to let a file of this process grow beyond `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Killed(Exception):
    """Of a `Killer`."""


class Killer(SilentObserver):
    """Stops after so many steps of training, like a killed process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def task(self, label: str, total: int) -> Any:
        return nullcontext(self)

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise Killed
