"""The loop of the scaling transforms: stream blocks, choose scales, fold them, write, go on.

All edges of a block are judged on the block as it came, then folded at once: a fold changes
neither the inputs of another edge nor, because grids follow the scale of a row, how the rows of
a producer round. Everything is folded in fp32 and rounded to the stored dtype once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from compressor.errors import VerificationError
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.edges import Edge, edges
from compressor.model.files import read_config
from compressor.model.walk import BlockWalk
from compressor.numerics.scaling import (
    fold_norm,
    spread_heads,
)
from compressor.stages.context import StageContext
from compressor.types import BlockRecord, Fallback, ModuleMetric, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.transform_base import ScalingConfig


@dataclass(frozen=True)
class Sample:
    """The batches on which outputs are compared: their places in the walk, and their masks."""

    places: tuple[int, ...]
    masks: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Valid tokens in them."""
        return sum(int(mask.sum()) for mask in self.masks)


@dataclass(frozen=True)
class Chosen:
    """What was found for an edge: a scale per channel of its producer, or None to leave it.

    `metric` is the loss with and without the scale; None when nothing could be measured.
    """

    edge: Edge
    scale: Tensor | None
    metric: ModuleMetric | None
    fallback: Fallback | None = None


class Chooser(Protocol):
    """A method: how scales are chosen for the edges of one block."""

    tokens: int

    def __call__(
        self, walk: BlockWalk, block: Block, found: Sequence[Edge], sample: Sample
    ) -> Iterator[Chosen]:
        """One `Chosen` per edge; the block must be left as it is."""
        ...


def scale_model(
    stage: ScalingConfig,
    choose: Chooser,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> StageResult:
    """Fold scales into a model and write the new checkpoint.

    Args:
        stage: says which edges.
        choose: finds their scales.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.

    Raises:
        VerificationError: a block does not compute what it did before.
    """
    config = read_config(checkpoint)
    architecture = Architecture.from_config(config)
    kinds = stage.edge_kinds(architecture)
    parts, sample = sampled(batches, choose.tokens)
    walk = context.walk(checkpoint, parts)
    writer = CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("scaling blocks", architecture.layers) as task:
        task.advance(len(records))
        for block in walk.blocks(start=len(records)):
            found = [edge for edge in edges(architecture, block.index) if edge.kind in kinds]
            chosen = list(choose(walk, block, found, sample))
            _fold_block(walk, block, chosen)
            writer.write_shard(shard_name(block.index), block.state())
            block.save_outputs()
            records.append(_record(block.index, chosen))
            context.block_done(records[-1])
            task.advance()
    writer.write_shard(shard_name("outside"), {name: walk.tensor(name) for name in walk.rest()})
    writer.finish(config, checkpoint, architecture.parameters)
    return _result(checkpoint, context.folder, records, sample.tokens)


def sampled(batches: Sequence[TokenBatch], tokens: int) -> tuple[list[TokenBatch], Sample]:
    """Split off rows, spread evenly, that hold about `tokens` tokens; at least one row.

    Returns:
        The same rows in batches that are sampled whole or not at all, and which those are.
    """
    rows = sum(len(batch.domains) for batch in batches)
    total = sum(int(batch.mask.sum()) for batch in batches)
    wanted = min(rows, max(1, -(-rows * tokens // max(total, 1))))
    chosen = {index * rows // wanted for index in range(wanted)}
    parts: list[TokenBatch] = []
    places: list[int] = []
    first = 0
    for batch in batches:
        inside = [row for row in range(len(batch.domains)) if first + row in chosen]
        outside = [row for row in range(len(batch.domains)) if first + row not in chosen]
        first += len(batch.domains)
        if inside:
            places.append(len(parts))
        parts += [_rows_of(batch, own) for own in (inside, outside) if own]
    return parts, Sample(tuple(places), tuple(parts[place_].mask for place_ in places))


def _rows_of(batch: TokenBatch, rows: list[int]) -> TokenBatch:
    domains = tuple(batch.domains[row] for row in rows)
    return TokenBatch(batch.input_ids[rows], batch.mask[rows], domains)


# ---------------------------------------------------------------------- folding


def _fold_block(walk: BlockWalk, block: Block, chosen: Sequence[Chosen]) -> None:
    """Fold every scale that was chosen; the block must go on computing the same."""
    with torch.no_grad():
        before = block.run(0)
    names = {name: block.tensor(name).dtype for name in block.names}
    work = {name: block.tensor(name).float() for name in _touched(block, chosen)}
    for choice in chosen:
        if choice.scale is not None:
            fold(choice.edge, choice.scale.cpu(), work, names)
    for name, value in work.items():
        block.set_tensor(name, value)
    if work:
        with torch.no_grad():
            after = block.run(0)
        mask = walk.batches[0].mask.to(after.device)
        stored = [names[name] for name in work]
        _require_same(block.index, before[mask], after[mask], [walk.dtype, *stored])


def _touched(block: Block, chosen: Sequence[Chosen]) -> list[str]:
    """Names on disk of the tensors that the folds change."""
    found: dict[str, None] = {}
    for choice in chosen:
        if choice.scale is None:
            continue
        edge = choice.edge
        names = [f"{edge.source}.weight", f"{edge.source}.bias"]
        names += [matrix.tensor for matrix in (*edge.readers, *edge.followers)]
        found |= dict.fromkeys(name for name in names if name in block.names)
    return list(found)


def fold(
    edge: Edge, scale: Tensor, work: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Divide the producer of an edge and multiply its readers; exact but for rounding.

    Args:
        edge: where.
        scale: per channel of the producer.
        work: fp32 tensors by name on disk, in their disk shape; replaced.
        dtypes: in which they will be stored.
    """
    name, bias = f"{edge.source}.weight", f"{edge.source}.bias"
    if edge.rows is None:
        work[name], scale = fold_norm(work[name], scale, offset=edge.offset, dtype=dtypes[name])
        work[name] = work[name].float()
        if bias in work:
            work[bias] = work[bias] / scale
    else:
        rows = torch.tensor(edge.rows.indices())
        divide_rows(work, name, rows, scale, transposed=edge.transposed)
        if bias in work:
            divide_rows(work, bias, rows, scale, transposed=False)
    per_input = expanded(edge, scale)
    for matrix in (*edge.readers, *edge.followers):
        weight = work[matrix.tensor]
        by_column = per_input.unsqueeze(1) if matrix.transposed_on_disk else per_input
        work[matrix.tensor] = weight * by_column


def expanded(edge: Edge, scale: Tensor) -> Tensor:
    """A scale per channel of the producer as one per input of the readers."""
    return scale if edge.heads is None else spread_heads(scale, *edge.heads)


def divide_rows(
    work: dict[str, Tensor], name: str, rows: Tensor, scale: Tensor, *, transposed: bool
) -> None:
    """Divide output channels `rows` of a matrix [out, in] (or [in, out]) or of a bias [out]."""
    divisor = torch.ones(work[name].shape[1 if transposed else 0])
    divisor[rows] = scale
    by_row = divisor if transposed or work[name].dim() == 1 else divisor.unsqueeze(1)
    work[name] = work[name] / by_row


def _require_same(block: int, before: Tensor, after: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Compare outputs [tokens, hidden] of a block before and after folding.

    The median over tokens, because rounding of a router may send single tokens elsewhere.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    allowed = max(1e-4, 4 * coarsest)
    size = before.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    change = (after - before).float().norm(dim=-1) / size
    if not (middle := float(change.median())) <= allowed:
        raise VerificationError(
            f"block {block}: scaling changed its output by {middle:.3g} of its norm, where "
            f"rounding of the stored weights explains {allowed:.3g}"
        )


# ---------------------------------------------------------------------- what is reported


def _record(block: int, chosen: Sequence[Chosen]) -> BlockRecord:
    metrics = tuple(choice.metric for choice in chosen if choice.metric is not None)
    fallbacks = tuple(choice.fallback for choice in chosen if choice.fallback is not None)
    return BlockRecord(block, metrics, fallbacks)


def _result(parent: Path, folder: Path, records: Iterable[BlockRecord], tokens: int) -> StageResult:
    metrics = tuple(metric for record in records for metric in record.metrics)
    ratios = [m.loss / m.baseline_loss for m in metrics if m.loss > 0 and m.baseline_loss > 0]
    return StageResult(
        checkpoint=folder,
        changed=_changed(parent, folder),
        metrics=metrics,
        fallbacks=tuple(fallback for record in records for fallback in record.fallbacks),
        notes={
            "tokens compared": float(tokens),
            "edges": float(len(metrics)),
            "error after rounding, relative to no scaling (geometric mean)": exp(
                sum(log(ratio) for ratio in ratios) / max(len(ratios), 1)
            ),
        },
    )


def _changed(parent: Path, folder: Path) -> tuple[str, ...]:
    """Names of the tensors that differ: a bias of zeros, for example, stays what it is."""
    before, after = CheckpointReader(parent), CheckpointReader(folder)
    return tuple(name for name in after if before.tensor_sha256(name) != after.tensor_sha256(name))
