"""What the engine hands to a stage: where to work, on what, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.progress import Observer
from compressor.types import BlockRecord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StageContext:
    """Surroundings of one stage.

    Attributes:
        folder: where the stage writes its checkpoint; may hold the shards of finished blocks.
        scratch: for activations; deleted when the stage is done.
        device: where blocks are computed.
        dtype: precision of the computation.
        activation_budget: bytes of activations kept in memory; the rest spills to `scratch`.
        finished: the blocks that an interrupted run has on disk, in order.
        block_done: to be called after the block, its codes and the next activations are on disk.
        observer: progress.
        original: directory of the model that the run began with; None outside of a run.
    """

    folder: Path
    scratch: Path
    device: torch.device
    dtype: torch.dtype
    activation_budget: int
    finished: tuple[BlockRecord, ...]
    block_done: Callable[[BlockRecord], None]
    observer: Observer
    original: Path | None = None
