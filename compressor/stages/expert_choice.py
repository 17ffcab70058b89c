"""Choose experts to drop, block by block, and write a checkpoint without them.

Experts are measured in the model as it is. Everything a block leaves is on disk before it is
reported done, so that an interrupted stage goes on at the next block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.formats.shards import CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.files import read_config
from compressor.model.shape import resized
from compressor.model.surgery import expert_names, kept_experts, pruned_config
from compressor.numerics.experts import ExpertSums, worthiest
from compressor.stages.context import StageContext
from compressor.stages.pruning import size_notes
from compressor.types import BlockRecord, Fallback, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.prune_experts import PruneExperts

_KEPT, _LOST = "expert kept", "share of the tokens' places that went"


def drop_experts(
    stage: PruneExperts, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Drop experts until as many are left as the stage's target has.

    Args:
        stage: how to choose.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens; none for a choice at random.
        context: where to work and whom to tell.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    shape = stage.target(architecture)
    if shape.experts == architecture.experts:
        batches = ()
    walk, writer = context.walk(checkpoint, batches), CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("pruning experts", architecture.layers) as task:
        task.advance(len(records))
        for block in walk.blocks(len(records)):
            record = _choose(stage, block, architecture, shape.experts)
            state, keep = block.state(), _kept(record)
            if keep:
                state = kept_experts(architecture, block.index, keep, state)
            writer.write_shard(shard_name(block.index), state)
            block.save_outputs()
            records.append(record)
            context.block_done(record)
            task.advance()
    writer.write_shard(shard_name("outside"), {name: walk.tensor(name) for name in walk.rest()})
    config = pruned_config(checkpoint, architecture, shape, range(architecture.layers))
    after = resized(architecture, shape)
    writer.finish(config, checkpoint, after.parameters)
    return _result(architecture, after, records, context.folder)


def _choose(
    stage: PruneExperts, block: Block, architecture: Architecture, count: int
) -> BlockRecord:
    """Which experts of a block stay, as notes of its record; runs the block."""
    if all(matrix.info.expert is None for matrix in block.matrices):
        block.forward()
        return BlockRecord(block.index)
    sums = ExpertSums(architecture.experts)
    block.forward_watching(sums.add)
    if stage.score == "random":
        generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + block.index)
        worth = torch.rand(architecture.experts, generator=generator)
    else:
        worth = sums.worth(stage.score)
    keep = worthiest(worth, count)
    notes = {f"{_KEPT} {place:05d}": float(expert) for place, expert in enumerate(keep)}
    tokens = sums.tokens.double()
    if tokens.any():
        notes[_LOST] = 1 - float(tokens[keep].sum() / tokens.sum())
    return BlockRecord(block.index, fallbacks=tuple(_unasked(block, sums, keep)), notes=notes)


def _unasked(block: Block, sums: ExpertSums, keep: Sequence[int]) -> Iterator[Fallback]:
    """Experts that stay though nothing is known of them."""
    if not sums.tokens.any() or len(keep) == len(sums.tokens):
        return
    for matrix in block.matrices:
        expert = matrix.info.expert
        if matrix.info.role == "down" and expert in keep and not sums.tokens[expert]:
            yield Fallback(
                matrix.info.name, "no calibration token reached it", "kept by its number"
            )


def _kept(record: BlockRecord) -> list[int]:
    """Experts of a block that stay; none where it has none."""
    return [int(value) for name, value in record.notes.items() if name.startswith(_KEPT)]


def _result(
    before: Architecture, after: Architecture, records: Sequence[BlockRecord], folder: Path
) -> StageResult:
    names: dict[str, str] = {}
    for record in records:
        names |= expert_names(before, record.block, _kept(record))
    experts = {matrix.tensor for matrix in before.matrices if matrix.expert is not None}
    routers = [matrix.tensor for matrix in after.matrices if matrix.role == "router"]
    lost = [record.notes[_LOST] for record in records if _LOST in record.notes]
    notes = {_LOST: sum(lost) / len(lost)} if lost else {}
    return StageResult(
        checkpoint=folder,
        changed=(),
        removed=tuple(sorted(experts - set(names))),
        renamed={new: name for name, new in names.items() if new != name},
        resized=tuple(routers) if before.experts != after.experts else (),
        fallbacks=tuple(fallback for record in records for fallback in record.fallbacks),
        notes=size_notes(before, after) | notes,
    )
