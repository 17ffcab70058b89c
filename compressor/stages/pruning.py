"""The loop that makes blocks narrower: measure what readers see, choose units, refit, cut, go on.

A reader is the matrix whose columns are units: the output of attention, whose units are heads, and
the second matrix of a feed-forward half, whose units are channels. Within a block attention goes
first, so that the feed-forward half is measured on what pruned attention leaves. While a block is
in memory, columns that go are zero, which computes the same as a block without them; only what is
written is cut. Everything a block leaves is on disk before it is reported done, so that an
interrupted stage goes on at the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.formats.shards import CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.files import read_config
from compressor.model.matrices import Matrix
from compressor.model.shape import Shape, resized, shape_of
from compressor.model.surgery import BlockKeep, cut_block, pruned_config
from compressor.model.walk import BlockWalk
from compressor.numerics.hessian import relative_losses
from compressor.numerics.pruning import Level
from compressor.stages.context import StageContext
from compressor.stages.unit_inputs import Inputs, Place, compare, measure, paired
from compressor.types import BlockRecord, Fallback, ModuleMetric, StageResult, TokenBatch

_DOWN = ("down", "fc_out")
_ENTRIES = {True: ("q", "k", "v", "qkv"), False: ("gate", "up", "gate_up", "fc_in")}


@dataclass(frozen=True)
class Choice:
    """What becomes of a reader.

    Attributes:
        columns: that stay, int64 ascending.
        weight: what they become, [out, columns].
        target: [out, in], what the cut reader should come close to.
        bias: what the bias becomes; None to leave it.
        fallback: (reason, action) when not done as asked.
    """

    columns: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    fallback: tuple[str, str] | None = None


Choose = Callable[[Place, Inputs | None], Choice]
Align = Callable[[Tensor, Inputs], Tensor]
"""What a matrix [out, in] becomes whose inputs have drifted from the parent's; see `compare`."""


@dataclass(frozen=True)
class Job:
    """What a method asks of the loop.

    Attributes:
        shape: sizes that are left.
        choose: which columns of a reader stay, and as what; gets its inputs, or None when no
            token reached it or `batches` are none.
        batches: calibration tokens; none when `choose` wants no inputs.
        refits: whether `choose` changes the columns that stay.
        refits_bias: whether it changes biases of readers.
        parent: checkpoint to run beside, for `undoes` and `align`.
        undoes: with `parent`, whether `choose` is to undo what pruning has done to the residual
            stream so far, also in readers that lose no unit.
        layers: the parent's blocks that the model still has, ascending; None for all. What the
            others added to the stream is missing from it like anything else.
        domain_weights: share of every domain in the inputs' moments; None counts tokens.
        align: with `parent`, changes the matrices that read the residual stream; None to leave
            them.
    """

    shape: Shape
    choose: Choose
    batches: Sequence[TokenBatch] = ()
    refits: bool = False
    refits_bias: bool = False
    parent: Path | None = None
    undoes: bool = False
    layers: Sequence[int] | None = None
    domain_weights: Mapping[str, float] | None = None
    align: Align | None = None


def prune_widths(job: Job, checkpoint: Path, context: StageContext) -> StageResult:
    """Write the checkpoint with narrower blocks.

    Args:
        job: what to do.
        checkpoint: the parent, a plain Hugging Face directory.
        context: where to work and whom to tell.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    if job.shape == shape_of(architecture) and not (job.parent and job.layers):
        job = replace(job, batches=(), refits=False, refits_bias=False, parent=None)
    walks = _walks(job, checkpoint, context)
    writer = CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("pruning blocks", architecture.layers) as task:
        task.advance(len(records))
        for block, original in _lockstep(job, walks, len(records)):
            keep, record = _prune_block(job, architecture, block, original)
            state = cut_block(architecture, block.index, keep, block.state())
            writer.write_shard(shard_name(block.index), state)
            if original:
                original.save_outputs()
            block.save_outputs()
            records.append(record)
            context.block_done(record)
            task.advance()
    walk = walks[0]
    writer.write_shard(shard_name("outside"), {name: walk.tensor(name) for name in walk.rest()})
    config = pruned_config(checkpoint, architecture, job.shape, range(architecture.layers))
    after = resized(architecture, job.shape)
    writer.finish(config, checkpoint, after.parameters)
    return _result(job, architecture, after, context.folder, records)


def _result(
    job: Job,
    before: Architecture,
    after: Architecture,
    folder: Path,
    records: Sequence[BlockRecord],
) -> StageResult:
    shapes = dict(before.tensors())
    smaller = {name for name, shape in after.tensors() if shapes[name] != shape}
    changed = set()
    for index in range(before.layers):
        for reader, levels in readers(before, index, job.shape):
            stream = job.parent and job.undoes and _lacks(job, before, index, reader)
            if job.refits and (levels or (stream and paired(before, reader.expert))):
                changed.add(reader.tensor)
            if job.refits_bias and levels and f"{reader.name}.bias" in shapes:
                changed.add(f"{reader.name}.bias")
            changed.update(matrix.tensor for matrix in _entries(job, before, index, reader))
    return StageResult(
        checkpoint=folder,
        changed=tuple(sorted(changed)),
        metrics=tuple(metric for record in records for metric in record.metrics),
        fallbacks=tuple(fallback for record in records for fallback in record.fallbacks),
        resized=tuple(sorted(smaller)),
        notes=size_notes(before, after),
    )


def size_notes(before: Architecture, after: Architecture) -> dict[str, float]:
    """What the report says about how much went."""
    inside = [sum(m.parameters for m in a.matrices if m.block is not None) for a in (before, after)]
    return {
        "parameters before": float(before.parameters),
        "parameters after": float(after.parameters),
        "share of parameters removed": 1 - after.parameters / before.parameters,
        "share of block weights removed": 1 - inside[1] / inside[0],
    }


def _walks(job: Job, checkpoint: Path, context: StageContext) -> list[BlockWalk]:
    """The model that is pruned and, if asked for, its parent; they share the memory."""
    models = [(checkpoint, context.scratch)]
    if job.parent:
        models.append((job.parent, context.scratch / "parent"))
    return [
        BlockWalk(
            model,
            job.batches,
            device=context.device,
            dtype=context.dtype,
            scratch=folder,
            memory_budget=context.activation_budget // len(models),
        )
        for model, folder in models
    ]


def _lockstep(
    job: Job, walks: Sequence[BlockWalk], start: int
) -> Iterator[tuple[Block, Block | None]]:
    """Every block with the parent's; those that the model has no longer are only walked through."""
    if len(walks) == 1:
        yield from ((block, None) for block in walks[0].blocks(start))
        return
    layers = job.layers or range(walks[1].architecture.layers)
    originals = walks[1].blocks(layers[start - 1] + 1 if start else 0)
    for block in walks[0].blocks(start):
        yield block, next(other for other in originals if other.index == layers[block.index])


def _lacks(job: Job, architecture: Architecture, index: int, reader: Matrix) -> bool:
    """Whether anything that went has changed the stream before a reader."""
    now = shape_of(architecture)
    heads = (now.heads, now.kv_heads) != (job.shape.heads, job.shape.kv_heads)
    if index > 0 and (heads or now.channels != job.shape.channels):
        return True
    earlier = bool(job.layers) and (job.layers or ())[index] > index
    return earlier or (reader.role != "o" and heads)


# ---------------------------------------------------------------------- what goes where


def readers(
    architecture: Architecture, index: int, shape: Shape
) -> Iterator[tuple[Matrix, tuple[Level, ...]]]:
    """Every reader of a block with its selections, in order of execution."""
    for matrix in architecture.block(index):
        if matrix.role == "o":
            yield matrix, _head_levels(architecture, shape)
        elif matrix.role in _DOWN and (matrix.expert is not None or not architecture.experts):
            wide = matrix.shape[1] != shape.channels
            yield matrix, ((Level(1, shape.channels),) if wide else ())


def _entries(job: Job, architecture: Architecture, index: int, reader: Matrix) -> list[Matrix]:
    """Matrices that compute what a reader reads from a stream that is no longer the parent's."""
    drifted = job.parent and _lacks(job, architecture, index, reader)
    if not (job.align and drifted and paired(architecture, reader.expert)):
        return []
    roles = _ENTRIES[reader.role == "o"]
    return [matrix for matrix in architecture.block(index) if matrix.role in roles]


def _head_levels(architecture: Architecture, shape: Shape) -> tuple[Level, ...]:
    """Key-value heads with all that share them first, then queries of those that stay."""
    now = shape_of(architecture)
    shared, stays = now.heads // now.kv_heads, shape.heads // shape.kv_heads
    levels = []
    if shape.kv_heads != now.kv_heads:
        levels.append(Level(shared * architecture.head_dim, shape.kv_heads))
    if stays != shared:
        levels.append(Level(architecture.head_dim, stays, shape.kv_heads))
    return tuple(levels)


def _prune_block(
    job: Job, architecture: Architecture, block: Block, original: Block | None
) -> tuple[BlockKeep, BlockRecord]:
    """Zero the columns that go, change those that stay, and say which stay."""
    found = list(readers(architecture, block.index, job.shape))
    attention = [item for item in found if item[0].role == "o"]
    rest = [item for item in found if item[0].role != "o"]
    keep, metrics, fallbacks = BlockKeep(), [], []
    if original:
        original.forward()
    for half, onward in ((attention, False), (rest, True)):
        places = [
            Place(block, block.matrix(info.name), levels)
            for info, levels in half
            if levels
            or (
                original
                and job.undoes
                and paired(architecture, info.expert)
                and _lacks(job, architecture, block.index, info)
            )
        ]
        measured: dict[str, Inputs] = {}
        shares = _shares(job)
        if original:
            for info, _ in half:
                _align(job, block, original, _entries(job, architecture, block.index, info))
        if job.batches and places:
            measured = measure(architecture, places, original, onward=onward, shares=shares)
        for place in places:
            choice = job.choose(place, measured.get(place.reader.info.input_group))
            metrics.append(_install(place, choice, measured))
            if choice.fallback:
                fallbacks.append(Fallback(place.reader.info.name, *choice.fallback))
            if place.levels:
                keep = _kept(architecture, keep, place, choice.columns.tolist())
    block.forward()
    return keep, BlockRecord(block.index, tuple(metrics), tuple(fallbacks))


def _align(job: Job, block: Block, original: Block, entries: Sequence[Matrix]) -> None:
    """Let matrices compute from the pruned stream what they did from the parent's."""
    if not entries or job.align is None:
        return
    inputs = compare(block, original, entries[0].role, _shares(job))
    if inputs is None:
        return
    for info in entries:
        matrix = block.matrix(info.name)
        matrix.set_weight(job.align(matrix.weight, inputs))


def _shares(job: Job) -> tuple[float, ...] | None:
    """Weight of every domain, in the order in which a walk numbers them."""
    if job.domain_weights is None:
        return None
    return tuple(job.domain_weights[name] for name in domains_of(job.batches))


def domains_of(batches: Sequence[TokenBatch]) -> tuple[str, ...]:
    """Domains of the text, sorted."""
    return tuple(sorted({name for batch in batches for name in batch.domains}))


def _install(place: Place, choice: Choice, measured: Mapping[str, Inputs]) -> ModuleMetric:
    """Put a choice into the live block; its error beside that of cutting without refitting."""
    before = place.reader.weight
    weight, plain = torch.zeros_like(before), torch.zeros_like(before)
    weight[:, choice.columns] = choice.weight.to(weight)
    plain[:, choice.columns] = before[:, choice.columns]
    place.reader.set_weight(weight)
    if choice.bias is not None and place.bias:
        place.block.set_tensor(place.bias, choice.bias)
    inputs = measured.get(place.reader.info.input_group)
    hessian = inputs.hessian if inputs else None
    target = choice.target.to(before)
    stored = place.block.tensor(place.reader.info.tensor)
    loss, baseline_loss = relative_losses(target, [place.reader.weight, plain], hessian)
    return ModuleMetric(
        module=place.reader.info.name,
        bits=8.0 * stored.element_size(),
        loss=float(loss),
        baseline_loss=float(baseline_loss),
    )


def _kept(
    architecture: Architecture, keep: BlockKeep, place: Place, columns: list[int]
) -> BlockKeep:
    info = place.reader.info
    if info.role != "o":
        return replace(keep, channels={**keep.channels, info.expert: columns})
    heads = [column // architecture.head_dim for column in columns[:: architecture.head_dim]]
    shared = architecture.heads // architecture.kv_heads
    return replace(keep, heads=heads, kv_heads=sorted({head // shared for head in heads}))
