"""The work of `allocate.bits`: walk forward, walk back, price every grid, solve the knapsack.

The walk forward keeps the inputs of all blocks on disk. The walk back takes one block at a time,
from the last: its matrices' inputs and output gradients give the loss of every grid, which is
written to a file before the block is reported done, so that an interrupted stage goes on there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import NumericalError, ResumeError
from compressor.formats.allocation import write_allocation
from compressor.formats.atomic import atomic_write_json
from compressor.formats.files import checkpoint_files
from compressor.formats.shards import TORCH_DTYPES
from compressor.formats.sizes import STORED
from compressor.model.walk import Block, BlockWalk
from compressor.numerics.hessian import DiagonalAccumulator, HessianAccumulator
from compressor.numerics.knapsack import choose
from compressor.numerics.sensitivity import compensated_columns, rounding_losses
from compressor.stages.allocate_bits import allotment
from compressor.stages.budget import Unit, dense_bytes
from compressor.stages.context import StageContext
from compressor.stages.scaling import sampled
from compressor.types import BlockRecord, StageResult, TokenBatch, WeightScheme

if TYPE_CHECKING:
    from compressor.stages.allocate_bits import AllocateBits

Losses = dict[str, list[float]]
"""Expected divergence, nats per token, of each matrix on each grid of its unit."""


def allocate(
    stage: AllocateBits, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Choose a grid for every matrix and leave the choice beside the same checkpoint.

    Args:
        stage: the budget and the choices.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.

    Raises:
        NumericalError: a gradient or an input is not finite.
    """
    parts, sample = sampled(batches, stage.tokens)
    walk = BlockWalk(
        checkpoint,
        [parts[place] for place in sample.places],
        device=context.device,
        dtype=context.dtype,
        scratch=context.scratch,
        memory_budget=context.activation_budget,
    )
    found = stage.units(walk.architecture)
    losses = _measure(stage, walk, found, context)
    table = [
        [sum(of_grid) for of_grid in zip(*(losses[m.name] for m in unit.matrices), strict=True)]
        for unit in found
    ]
    budget = stage.budget(walk.architecture, found)
    chosen = choose([unit.costs for unit in found], table, budget)
    _link_checkpoint(checkpoint, context.folder)
    schemes = allotment(found, chosen)
    write_allocation(context.folder, schemes, _expected(found, chosen, losses))
    spent = sum(unit.costs[place] for unit, place in zip(found, chosen, strict=True))
    dense = dense_bytes(walk.architecture, found)
    return StageResult(
        checkpoint=context.folder,
        changed=(),
        notes={
            "budget_bytes": float(dense + budget),
            "allocated_bytes": float(dense + spent),
            "expected_kl": sum(row[place] for row, place in zip(table, chosen, strict=True)),
            "mean_bits": _mean_bits(schemes, found),
            "tokens": float(sample.tokens),
        },
    )


def _expected(found: Sequence[Unit], chosen: Sequence[int], losses: Losses) -> dict[str, float]:
    return {
        matrix.name: losses[matrix.name][place]
        for unit, place in zip(found, chosen, strict=True)
        for matrix in unit.matrices
    }


def _mean_bits(schemes: dict[str, WeightScheme], found: Sequence[Unit]) -> float:
    """Of one code, over the weights that got a grid."""
    matrices = [matrix for unit in found for matrix in unit.matrices]
    total = sum(schemes[matrix.name].bits * matrix.parameters for matrix in matrices)
    return total / sum(matrix.parameters for matrix in matrices)


def _measure(
    stage: AllocateBits, walk: BlockWalk, found: Sequence[Unit], context: StageContext
) -> Losses:
    """What every grid of every matrix costs; blocks that an earlier attempt measured are read."""
    schemes = {matrix.name: unit.schemes for unit in found for matrix in unit.matrices}
    layers = walk.architecture.layers
    losses: Losses = {}
    with context.observer.task("measuring blocks", layers) as task:
        for index in reversed(range(layers)):
            path = context.scratch / f"losses-{index:05d}.json"
            if path.is_file():
                losses |= json.loads(path.read_text())
            else:
                if not losses:
                    _start_back(walk, stage.seed)
                of_block = _measure_block(stage, walk, index, schemes)
                atomic_write_json(path, of_block)
                losses |= of_block
                context.block_done(BlockRecord(index))
            task.advance()
    return losses


def _start_back(walk: BlockWalk, seed: int) -> None:
    """Gradients at the end of the last block, unless an earlier attempt has left them."""
    layers = walk.architecture.layers
    walk.keep()
    try:
        walk.gradients(layers)
    except ResumeError:
        walk.save_gradients(layers, _last_gradients(walk, seed))


def _last_gradients(walk: BlockWalk, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for batch, hidden in enumerate(walk.outputs()):
        yield walk.sampled_gradient(batch, hidden, generator)


class _Seen:
    """Second moments of one matrix's inputs (shared by its input group) and output gradients."""

    def __init__(self, block: Block, names: Sequence[str], device: torch.device) -> None:
        self.rows: dict[str, DiagonalAccumulator] = {}
        self.inputs: dict[str, HessianAccumulator] = {}
        self.group: dict[str, str] = {}
        for matrix in block.matrices:
            info = matrix.info
            if info.name in names:
                self.group[info.name] = info.input_group
                self.rows[info.name] = DiagonalAccumulator(info.shape[0], device)
                self.inputs.setdefault(info.input_group, HessianAccumulator(info.shape[1], device))
        self.first = {group: name for name, group in reversed(self.group.items())}

    def __call__(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        if name not in self.rows:
            return
        self.rows[name].add(gradients)
        group = self.group[name]
        if self.first[group] == name:
            self.inputs[group].add(inputs)

    def row_weight(self, name: str) -> Tensor:
        """γ [out] = E[(∂ log p / ∂ o)²]; the accumulator's is twice that."""
        return self.rows[name].diagonal() / 2

    def moment(self, group: str) -> Tensor:
        """E[x xᵀ] [in, in]."""
        return self.inputs[group].matrix() / 2


def _measure_block(
    stage: AllocateBits,
    walk: BlockWalk,
    index: int,
    schemes: dict[str, tuple[WeightScheme, ...]],
) -> Losses:
    """Losses of one block's grids; the gradients that enter it are then on disk."""
    block, upstream = walk.kept(index), walk.gradients(index + 1)
    chosen = [matrix for matrix in block.matrices if matrix.info.name in schemes]
    seen = _Seen(block, [matrix.info.name for matrix in chosen], walk.device)
    walk.save_gradients(
        index, (block.backward(batch, upstream[batch], seen) for batch in range(len(upstream)))
    )
    metrics = {group: _metric(stage, seen.moment(group)) for group in seen.inputs}
    losses = {
        matrix.info.name: rounding_losses(
            matrix.weight,
            schemes[matrix.info.name],
            seen.row_weight(matrix.info.name),
            metrics[matrix.info.input_group],
            rows=stage.rows,
            scale_dtype=TORCH_DTYPES[STORED[walk.architecture.dtype]],
        )
        for matrix in chosen
    }
    walk.release(block)
    if not all(loss < float("inf") for of_grids in losses.values() for loss in of_grids):
        raise NumericalError(f"the losses of block {index} are not finite")
    return losses


def _metric(stage: AllocateBits, moment: Tensor) -> Tensor:
    """What an error in the weights costs at the outputs, as the rounder will leave it."""
    if stage.rounder == "rtn":
        return moment
    return compensated_columns(moment, damping=stage.damping)


def _link_checkpoint(checkpoint: Path, folder: Path) -> None:
    """The same checkpoint in another folder: links where the file system has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint_files(checkpoint):
        target = folder / path.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), target)  # the file itself: the Hub's cache holds symlinks
        except OSError:
            shutil.copy2(path, target)
