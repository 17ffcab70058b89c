"""The work of `allocate.bits`: walk forward, walk back, price every grid, solve the knapsack.

The walk forward keeps the inputs of all blocks on disk. The walk back takes one block at a time,
from the last: its matrices' inputs and output gradients give the loss of every grid, which is
written to a file before the block is reported done, so that an interrupted stage goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import NumericalError, ResumeError
from compressor.formats.allocation import write_allocation
from compressor.formats.atomic import atomic_write_json
from compressor.formats.files import link_checkpoint
from compressor.formats.shards import TORCH_DTYPES
from compressor.formats.sizes import STORED
from compressor.model.backward import Gradients
from compressor.model.block import Block
from compressor.model.walk import BlockWalk
from compressor.numerics.hessian import DiagonalAccumulator, HessianAccumulator
from compressor.numerics.knapsack import choose
from compressor.numerics.sensitivity import Metric, compensated, rounding_losses
from compressor.stages.allocate_bits import allotment
from compressor.stages.budget import Unit, dense_bytes
from compressor.stages.context import StageContext
from compressor.stages.scaling import sampled
from compressor.stages.tables import table_losses
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
    walk = context.walk(checkpoint, [parts[place] for place in sample.places])
    found = stage.units(walk.architecture)
    losses = _measure(stage, walk, found, context) | _of_tables(stage, walk, found, batches)
    table = [
        [sum(of_grid) for of_grid in zip(*(losses[m.name] for m in unit.matrices), strict=True)]
        for unit in found
    ]
    budget = stage.budget(walk.architecture, found)
    chosen = choose([unit.costs for unit in found], table, budget)
    link_checkpoint(checkpoint, context.folder)
    schemes = allotment(found, chosen)
    write_allocation(context.folder, schemes, _expected(found, chosen, losses))
    spent = sum(unit.costs[place] for unit, place in zip(found, chosen, strict=True))
    dense = dense_bytes(walk.architecture, found, stage.layout)
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
        if unit.schemes[place] is not None
    }


def _mean_bits(schemes: dict[str, WeightScheme], found: Sequence[Unit]) -> float:
    """Of one code, over the weights that got a grid."""
    matrices = [matrix for unit in found for matrix in unit.matrices if matrix.name in schemes]
    total = sum(schemes[matrix.name].bits * matrix.parameters for matrix in matrices)
    return total / sum(matrix.parameters for matrix in matrices)


def _measure(
    stage: AllocateBits, walk: BlockWalk, found: Sequence[Unit], context: StageContext
) -> Losses:
    """What every grid of every matrix costs; blocks that an earlier attempt measured are read."""
    schemes = {matrix.name: unit.grids for unit in found for matrix in unit.matrices}
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
                Gradients(walk).drop(index + 1)
                losses |= of_block
                context.block_done(BlockRecord(index))
            task.advance()
    return losses


def _of_tables(
    stage: AllocateBits, walk: BlockWalk, found: Sequence[Unit], batches: Sequence[TokenBatch]
) -> Losses:
    """What every grid of embedding and head costs; measured once all blocks are."""
    schemes = {u.matrices[0].name: u.schemes for u in found if u.matrices[0].block is None}
    if not schemes:
        return {}
    walk.keep()
    losses = table_losses(walk, schemes, batches, stage.rows)
    if not all(isfinite(loss) for of_grids in losses.values() for loss in of_grids):
        raise NumericalError("the losses of embedding or head are not finite")
    return losses


def _start_back(walk: BlockWalk, seed: int) -> None:
    """Gradients at the end of the last block, unless an earlier attempt has left them."""
    gradients, layers = Gradients(walk), walk.architecture.layers
    walk.keep()
    try:
        gradients.at(layers)
    except ResumeError:
        generator = torch.Generator().manual_seed(seed)
        outputs = enumerate(walk.outputs())
        gradients.save(layers, (gradients.sampled(i, out, generator) for i, out in outputs))


class _Seen:
    """Second moments of one matrix's inputs (shared by its input group) and output gradients.

    An expert counts by the share of tokens that it sees. One that no token reached counts as if
    one had, with the moments of all other experts of the block.
    """

    def __init__(
        self, block: Block, names: Collection[str], tokens: int, device: torch.device
    ) -> None:
        self._infos = {m.info.name: m.info for m in block.matrices if m.info.name in names}
        self._tokens, self._device = tokens, device
        self._rows: dict[str, DiagonalAccumulator] = {}
        self._inputs: dict[str, HessianAccumulator] = {}
        for name, info in self._infos.items():
            self._rows[name] = DiagonalAccumulator(info.shape[0], device)
            self._inputs.setdefault(info.input_group, HessianAccumulator(info.shape[1], device))
        self._first = {info.input_group: name for name, info in reversed(self._infos.items())}

    def __call__(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        if name not in self._rows:
            return
        self._rows[name].add(gradients)
        group = self._infos[name].input_group
        if self._first[group] == name:
            self._inputs[group].add(inputs)

    def share(self, name: str) -> float:
        """Of all tokens, those that the matrix sees."""
        return max(self._rows[name].tokens, 1) / self._tokens

    def row_weight(self, name: str) -> Tensor:
        """γ [out] = E[(∂ log p / ∂ o)²] over the tokens that it sees."""
        seen = self._rows[name]
        if not seen.tokens:
            seen = DiagonalAccumulator(self._infos[name].shape[0], self._device)
            for mate in self._mates(name):
                seen.merge(self._rows[mate])
        return seen.diagonal() / 2  # the accumulator's is twice that

    def moment(self, name: str) -> Tensor:
        """E[x xᵀ] [in, in] over the tokens that it sees."""
        seen = self._inputs[self._infos[name].input_group]
        if not seen.tokens:
            seen = HessianAccumulator(self._infos[name].shape[1], self._device)
            for mate in self._mates(name):
                seen.merge(self._inputs[self._infos[mate].input_group])
        return seen.matrix() / 2

    def _mates(self, name: str) -> list[str]:
        """The matrices of that role in all experts of the block."""
        role = self._infos[name].role
        return [
            mate
            for mate, info in self._infos.items()
            if info.expert is not None and info.role == role
        ]


def _measure_block(
    stage: AllocateBits,
    walk: BlockWalk,
    index: int,
    schemes: dict[str, tuple[WeightScheme, ...]],
) -> Losses:
    """Losses of one block's grids; the gradients that enter it are then on disk."""
    block = walk.kept(index)
    chosen = [matrix for matrix in block.matrices if matrix.info.name in schemes]
    tokens = sum(int(batch.mask.sum()) for batch in walk.batches)
    seen = _Seen(block, {matrix.info.name for matrix in chosen}, tokens, walk.device)
    Gradients(walk).pass_through(block, seen)
    dtype = TORCH_DTYPES[STORED[walk.architecture.dtype]]
    losses: Losses = {}
    for _, members in groupby(chosen, lambda matrix: matrix.info.input_group):
        metric: Metric | None = None
        for matrix in members:
            name = matrix.info.name
            metric = _metric(stage, seen.moment(name)) if metric is None else metric
            gamma = seen.row_weight(name) * seen.share(name)
            losses[name] = rounding_losses(
                matrix.weight, schemes[name], gamma, metric, rows=stage.rows, scale_dtype=dtype
            )
    walk.release(block)
    if not all(loss < float("inf") for of_grids in losses.values() for loss in of_grids):
        raise NumericalError(f"the losses of block {index} are not finite")
    return losses


def _metric(stage: AllocateBits, moment: Tensor) -> Metric:
    """What an error in the weights costs at the outputs, as the rounder will leave it."""
    if stage.rounder == "rtn":
        return Metric(moment)
    return compensated(moment, damping=stage.damping)
