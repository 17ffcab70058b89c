"""What the engine hands to a stage: where to work, on what, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.progress import Observer
from compressor.team import ALONE, Team
from compressor.types import BlockRecord, TokenBatch

if TYPE_CHECKING:
    import torch

    from compressor.model.walk import BlockWalk


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
        team: processes that run the stage together.
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
    team: Team = ALONE

    def walk(
        self,
        checkpoint: Path,
        batches: Sequence[TokenBatch],
        *,
        dtype: torch.dtype | None = None,
        folder: str = "",
    ) -> BlockWalk:
        """A walk over the blocks of a checkpoint, in these surroundings.

        Args:
            checkpoint: a plain Hugging Face directory.
            batches: the text that runs through.
            dtype: precision, where it is not that of the context.
            folder: below `scratch`, for the activations of a walk beside others.
        """
        from compressor.model.walk import BlockWalk

        return BlockWalk(
            checkpoint,
            batches,
            device=self.device,
            dtype=dtype or self.dtype,
            scratch=self.scratch / folder,
            memory_budget=self.activation_budget,
        )
