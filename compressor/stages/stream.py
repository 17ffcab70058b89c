"""Measure the norms of the residual stream, choose channels for the whole model, cut them out.

What was measured is on disk before anything is cut, so that an interrupted stage goes on with the
next block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.formats.atomic import replacing
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.shape import resized
from compressor.model.surgery import kept_stream, pruned_config
from compressor.model.walk import BlockWalk
from compressor.numerics.experts import worthiest
from compressor.numerics.stream import StreamSums, activation_worth
from compressor.stages.context import StageContext
from compressor.stages.pruning import size_notes
from compressor.types import BlockRecord, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.prune_hidden import PruneHidden


def narrow_stream(
    stage: PruneHidden, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Write the checkpoint with fewer channels in the residual stream.

    Args:
        stage: how many, and how to choose.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    shape = stage.target(architecture)
    kept, factors = list(range(architecture.hidden)), {}
    if shape.hidden != architecture.hidden:
        sums = _measured(checkpoint, batches, context)
        kept = _chosen(stage, sums, shape.hidden)
        factors = {name: found.factor(kept) for name, found in sums.items()}
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(context.folder)

    def cut(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {name: reader[name] for name in names}
        return kept_stream(architecture, kept, factors, tensors) if factors else tensors

    path = f"{architecture.blocks_path}."
    for index in range(len(context.finished), architecture.layers):
        names = [name for name in reader if name.startswith(f"{path}{index}.")]
        writer.write_shard(shard_name(index), cut(names))
        context.block_done(BlockRecord(index))
    outside = [name for name in reader if not name.startswith(path)]
    writer.write_shard(shard_name("outside"), cut(outside))
    after = resized(architecture, shape)
    config = pruned_config(checkpoint, architecture, shape, range(architecture.layers))
    writer.finish(config, checkpoint, after.parameters)
    return _result(architecture, after, context.folder, factors)


def _result(
    before: Architecture, after: Architecture, folder: Path, factors: Mapping[str, float]
) -> StageResult:
    shapes = dict(before.tensors())
    notes = {}
    if factors:
        notes = {
            "least factor of a norm": min(factors.values()),
            "largest factor of a norm": max(factors.values()),
        }
    return StageResult(
        checkpoint=folder,
        changed=tuple(sorted(factors)),
        resized=tuple(sorted(name for name, shape in after.tensors() if shapes[name] != shape)),
        notes=size_notes(before, after) | notes,
    )


def _chosen(stage: PruneHidden, sums: Mapping[str, StreamSums], count: int) -> list[int]:
    if stage.score == "activation":
        return worthiest(activation_worth(sums.values()), count)
    generator = torch.Generator().manual_seed(stage.seed)
    width = len(next(iter(sums.values())).shares)
    return worthiest(torch.rand(width, generator=generator), count)


def _measured(
    checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> dict[str, StreamSums]:
    """By the name of every norm of the stream, in order; taken from disk where it is there."""
    path = context.scratch / "stream.safetensors"
    if not path.is_file():
        walk = context.walk(checkpoint, batches, folder="stream")
        found = _norms(walk, context)
        tensors = {f"{kind}.{n}": getattr(s, kind) for n, s in found.items() for kind in _KINDS}
        with replacing(path) as temporary:
            save_file(tensors, temporary)
    stored, sums = load_file(path), {}
    for name in _names(Architecture.from_config(read_config(checkpoint))):
        shares, sizes = (stored[f"{kind}.{name}"] for kind in _KINDS)
        sums[name] = StreamSums(len(shares))
        sums[name].shares, sums[name].sizes = shares, sizes
        sums[name].tokens = sum(int(batch.mask.sum()) for batch in batches)
    return sums


_KINDS = ("shares", "sizes")


def _names(architecture: Architecture) -> list[str]:
    """Of the weights of all norms over the stream."""
    inside = [
        name for index in range(architecture.layers) for name in architecture.norm_readers(index)
    ]
    return [*inside, architecture.final_norm]


def _norms(walk: BlockWalk, context: StageContext) -> dict[str, StreamSums]:
    """One walk through the whole model."""
    architecture = walk.architecture
    found = {name: StreamSums(architecture.hidden) for name in _names(architecture)}
    with context.observer.task("measuring norms", architecture.layers) as task:
        for block in walk.blocks():
            with ExitStack() as stack:
                for name in architecture.norm_readers(block.index):
                    stack.callback(_watch(walk, name, found[name]).remove)
                block.forward()
            task.advance()
    handle = _watch(walk, architecture.final_norm, found[architecture.final_norm])
    for _ in walk.final_hidden():
        pass
    handle.remove()
    return found


def _watch(walk: BlockWalk, name: str, sums: StreamSums) -> RemovableHandle:
    """Count what a norm reads and puts out; batches come in order, each once."""
    masks = iter([batch.mask for batch in walk.batches])
    path = walk.architecture.module_tensor(name).removesuffix(".weight")

    def count(_: Any, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        for valid, row, out in zip(next(masks), inputs[0], outputs, strict=True):
            sums.add(row[valid], out[valid])

    module: nn.Module = walk.skeleton.model.get_submodule(path)
    return module.register_forward_hook(count)
