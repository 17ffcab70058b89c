"""Choose decoder blocks to drop, and write a checkpoint without them.

What has been decided is on disk after every dropped block, so that an interrupted stage goes on
with the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import NumericalError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.shape import Shape, resized
from compressor.model.surgery import moved, pruned_config
from compressor.model.walk import BlockWalk
from compressor.stages.context import StageContext
from compressor.stages.pruning import size_notes
from compressor.types import BlockRecord, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.prune_depth import PruneDepth


@dataclass
class Dropped:
    """Blocks dropped so far, first to last.

    Attributes:
        influence: 1 - mean cosine between input and output of every block of the parent.
        blocks: their numbers in the parent.
        distance: KL to the parent in nats per token behind each of them; empty without `greedy`.
    """

    influence: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)


def prune_depth(
    stage: PruneDepth, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Drop blocks until as many are left as the stage's target has.

    Args:
        stage: how to choose.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.

    Raises:
        NumericalError: the model's outputs are no numbers.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    shape = stage.target(architecture)
    count = architecture.layers - shape.layers
    dropped = Dropped()
    if count:
        choose = greedy if stage.score == "greedy" else one_shot
        dropped = choose(stage, count, checkpoint, batches, context)
    layers = [index for index in range(architecture.layers) if index not in dropped.blocks]
    notes = {f"block dropped as number {n}": float(b) for n, b in enumerate(dropped.blocks, 1)}
    notes |= {
        f"KL to the parent without {number} blocks": kl
        for number, kl in enumerate(dropped.distance, 1)
    }
    return write_layers(checkpoint, architecture, shape, layers, context, notes)


def write_layers(
    checkpoint: Path,
    architecture: Architecture,
    shape: Shape,
    layers: Sequence[int],
    context: StageContext,
    notes: dict[str, float],
) -> StageResult:
    """Write the checkpoint of these blocks, ascending, with everything outside of them."""
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(context.folder)
    path = f"{architecture.blocks_path}."
    names = [[name for name in reader if name.startswith(f"{path}{old}.")] for old in layers]
    for new in range(len(context.finished), len(layers)):
        tensors = {moved(architecture, name, new): reader[name] for name in names[new]}
        writer.write_shard(shard_name(new), tensors)
        context.block_done(BlockRecord(new))
    outside = {name: reader[name] for name in reader if not name.startswith(path)}
    writer.write_shard(shard_name("outside"), outside)
    after = resized(architecture, shape)
    config = pruned_config(checkpoint, architecture, shape, layers)
    writer.finish(config, checkpoint, after.parameters)
    renamed = {
        moved(architecture, name, new): name
        for new, old in enumerate(layers)
        for name in names[new]
        if new != old
    }
    kept = {name for block in names for name in block} | set(outside)
    return StageResult(
        checkpoint=context.folder,
        changed=(),
        removed=tuple(name for name in reader if name not in kept),
        renamed=renamed,
        notes=size_notes(architecture, after) | notes,
    )


def one_shot(
    stage: PruneDepth,
    count: int,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> Dropped:
    """The blocks of least influence in the whole model (ShortGPT)."""
    del stage
    walk = _walk(checkpoint, batches, context)
    with context.observer.task("block influence", walk.architecture.layers) as task:
        found = influence(walk, task.advance)
    order = sorted(range(len(found)), key=found.__getitem__)
    return Dropped(found, order[:count])


def influence(walk: BlockWalk, advance: Callable[[], None]) -> list[float]:
    """1 - E cos(x_in, x_out) of every block, over all valid tokens."""
    found = []
    for block in walk.blocks():
        block.forward()
        total, tokens = 0.0, 0
        for batch, (before, after) in enumerate(zip(block.inputs, block.outputs, strict=True)):
            pair = (block.valid(batch, before), block.valid(batch, after))
            cosines = functional.cosine_similarity(*pair, dim=1)
            total += float(cosines.sum(dtype=torch.float64))
            tokens += len(cosines)
        found.append(1 - total / tokens)
        advance()
    return found


def greedy(
    stage: PruneDepth,
    count: int,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> Dropped:
    """One block after the other, each time the one whose absence moves the outputs least."""
    walk = _walk(checkpoint, spread_rows(batches, stage.tokens), context)
    progress = context.scratch / "dropped.json"
    done = Dropped(**json.loads(progress.read_text())) if progress.is_file() else Dropped()
    with context.observer.task("dropping blocks", count + 1) as task:
        task.advance(len(done.blocks))
        if not done.influence:
            done.influence = influence(walk, lambda: None)
            atomic_write_json(progress, vars(done))
        task.advance()
        order = sorted(range(len(done.influence)), key=done.influence.__getitem__)
        tried = set(order[: count + stage.candidates])
        while len(done.blocks) < count:
            distances = _without_each(walk, set(done.blocks), tried - set(done.blocks))
            block, distance = min(distances.items(), key=lambda item: (item[1], item[0]))
            done.blocks.append(block)
            done.distance.append(distance)
            atomic_write_json(progress, vars(done))
            task.advance()
    return done


def _without_each(walk: BlockWalk, gone: set[int], candidates: set[int]) -> dict[int, float]:
    """KL to the parent in nats per token when one candidate more is left out, by candidate.

    One walk carries the residual stream of every candidate's model: a block is read once.
    """
    count = len(walk.batches)
    stream: list[Tensor] = []
    without: dict[int, list[Tensor]] = {}
    for block in walk.blocks():
        stream = stream or [block.inputs[batch] for batch in range(count)]
        if block.index in gone:
            continue
        for hidden in without.values():
            hidden[:] = [block.run_with(batch, hidden[batch], {}) for batch in range(count)]
        if block.index in candidates:
            without[block.index] = list(stream)
        stream = [block.run_with(batch, stream[batch], {}) for batch in range(count)]
    totals = dict.fromkeys(without, 0.0)
    for batch, parent in enumerate(walk.final_hidden()):
        for candidate, hidden in without.items():
            totals[candidate] += _divergence(walk, batch, parent, hidden[batch])
    tokens = sum(int(batch.mask.sum()) for batch in walk.batches)
    if any(math.isnan(total) for total in totals.values()):
        raise NumericalError("the outputs of the model without a block hold NaN")
    return {candidate: total / tokens for candidate, total in totals.items()}


def _divergence(walk: BlockWalk, batch: int, parent: Tensor, hidden: Tensor) -> float:
    """Sum of KL(parent ‖ other) over the valid tokens of a batch, row by row to save memory."""
    other = walk.finish(batch, hidden)
    total = 0.0
    for row, valid in enumerate(walk.batches[batch].mask):
        pair = (walk.logits(states[row : row + 1, valid])[0] for states in (parent, other))
        expected, found = (torch.log_softmax(logits.double(), -1) for logits in pair)
        total += float((expected.exp() * (expected - found)).sum())
    return total


def spread_rows(batches: Sequence[TokenBatch], tokens: int) -> list[TokenBatch]:
    """Whole rows, spread evenly over the text, with about this many tokens; at least one."""
    rows = [(batch, row) for batch in batches for row in range(len(batch.domains))]
    length = batches[0].input_ids.shape[1]
    count = min(len(rows), max(1, tokens // length))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return [
        TokenBatch(batch.input_ids[row : row + 1], batch.mask[row : row + 1], (batch.domains[row],))
        for batch, row in chosen
    ]


def _walk(checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext) -> BlockWalk:
    return context.walk(checkpoint, batches, folder="depth")
