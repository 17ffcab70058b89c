"""The loop that every rounder shares: stream blocks, round the chosen matrices, write, go on.

A rounder supplies one function, `Solve`, that rounds the matrices which see the same input.
Everything a block leaves (weights, codes, the activations that enter the next block) is on disk
before the block is reported done, so that an interrupted stage goes on at the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.formats.codes import codes_name, write_codes
from compressor.formats.shards import CheckpointWriter, shard_name
from compressor.formats.sizes import bits_per_weight
from compressor.model.architecture import Architecture
from compressor.model.load import read_config
from compressor.model.walk import Block, BlockWalk, MatrixHandle
from compressor.numerics.hessian import HessianAccumulator, relative_loss
from compressor.numerics.rtn import rtn
from compressor.stages.context import StageContext
from compressor.types import (
    BlockRecord,
    Fallback,
    ModuleMetric,
    QTensor,
    StageResult,
    TokenBatch,
    WeightScheme,
)


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding; `fallback` is (reason, action) when not done as asked."""

    qtensor: QTensor
    fallback: tuple[str, str] | None = None


@dataclass(frozen=True)
class Job:
    """What a rounder asks of the loop.

    Attributes:
        schemes: grid of every matrix to be rounded, by its name on disk without `.weight`.
        solve: rounds matrices [out, in] (fp32) that see the same input; gets their schemes, that
            input's Hessian (None when no token reached it or none was asked for) and the dtype in
            which scales are stored.
        needs_inputs: whether `solve` wants Hessians.
        sublayers: measure inputs again after each group of matrices has been rounded.
    """

    schemes: Mapping[str, WeightScheme]
    solve: Solve
    needs_inputs: bool
    sublayers: bool = False


Solve = Callable[
    [Sequence[Tensor], Sequence[WeightScheme], HessianAccumulator | None, torch.dtype],
    list[Rounded],
]


def round_model(
    job: Job, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Round the job's matrices and write the new checkpoint with its codes.

    Args:
        job: which matrices, on which grids, by which solver.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens; read only if the job needs inputs.
        context: where to work and whom to tell.

    Returns:
        The stage's result; `changed` names every rounded tensor.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    walk = BlockWalk(
        checkpoint,
        batches if job.needs_inputs else (),
        context.device,
        context.dtype,
        context.scratch,
        context.activation_budget,
    )
    writer = CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("rounding blocks", architecture.layers) as task:
        task.advance(len(records))
        for block in walk.blocks(start=len(records)):
            codes, record = _round_block(job, block)
            writer.write_shard(shard_name(block.index), block.state())
            write_codes(context.folder / codes_name(block.index), codes)
            block.forward()
            context.block_done(record)
            records.append(record)
            task.advance()
    records.append(_round_outside(job, walk, writer, context.folder))
    writer.finish(read_config(checkpoint), checkpoint, architecture.parameters)
    return _result(context.folder, records)


def _round_block(job: Job, block: Block) -> tuple[dict[str, QTensor], BlockRecord]:
    """Round the chosen matrices of one block in place."""
    groups = _chosen_groups(block.matrices, job.schemes)
    codes: dict[str, QTensor] = {}
    metrics: list[ModuleMetric] = []
    fallbacks: list[Fallback] = []
    for wave in _waves(groups, job.sublayers):
        hessians = _measure(block, groups, wave) if job.needs_inputs else {}
        for name in wave:
            hessian = hessians.pop(name, None)
            for handle, rounded in _solve(job, groups[name], hessian):
                module = handle.info.name
                codes[module] = rounded.qtensor
                metrics.append(_metric(module, handle.weight, rounded.qtensor, hessian))
                if rounded.fallback:
                    fallbacks.append(Fallback(module, *rounded.fallback))
                handle.set_weight(rounded.qtensor.dequantize())
    return codes, BlockRecord(block.index, tuple(metrics), tuple(fallbacks))


def _chosen_groups(
    handles: Iterable[MatrixHandle], schemes: Collection[str]
) -> dict[str, list[MatrixHandle]]:
    """The matrices to be rounded, by the input they see, in order of execution."""
    groups: dict[str, list[MatrixHandle]] = {}
    for handle in handles:
        if handle.info.name in schemes:
            groups.setdefault(handle.info.input_group, []).append(handle)
    return groups


def _waves(groups: Collection[str], sublayers: bool) -> Iterator[list[str]]:
    """Input groups measured together: all at once, or each after the ones before were rounded."""
    if sublayers:
        yield from ([name] for name in groups)
    else:
        yield list(groups)


def _measure(
    block: Block, groups: Mapping[str, Sequence[MatrixHandle]], wave: Collection[str]
) -> dict[str, HessianAccumulator]:
    """One pass of all calibration tokens through the block; a Hessian per input."""
    hessians = {
        name: HessianAccumulator(groups[name][0].info.shape[1], groups[name][0].weight.device)
        for name in wave
    }
    block.capture(lambda name, inputs, _: hessians[name].add(inputs), groups=wave)
    return {name: hessian for name, hessian in hessians.items() if hessian.tokens}


def _solve(
    job: Job, handles: Sequence[MatrixHandle], hessian: HessianAccumulator | None
) -> Iterator[tuple[MatrixHandle, Rounded]]:
    weights = [handle.weight.float() for handle in handles]
    schemes = [job.schemes[handle.info.name] for handle in handles]
    dtype = handles[0].disk_dtype
    rounded = job.solve(weights, schemes, hessian, dtype)
    return zip(handles, rounded, strict=True)


def _metric(
    module: str, weight: Tensor, qtensor: QTensor, hessian: HessianAccumulator | None
) -> ModuleMetric:
    """Relative layer error beside that of plain rounding, on the same inputs."""
    matrix = hessian.matrix() if hessian else torch.eye(weight.shape[1], device=weight.device)
    simple = rtn(weight.float(), qtensor.scheme, scale_dtype=qtensor.scale.dtype)
    return ModuleMetric(
        module=module,
        bits=bits_per_weight(tuple(weight.shape), qtensor.scheme, qtensor.scale.dtype),
        loss=relative_loss(weight, qtensor.dequantize(), matrix),
        baseline_loss=relative_loss(weight, simple.dequantize(), matrix),
    )


def _round_outside(
    job: Job, walk: BlockWalk, writer: CheckpointWriter, folder: Path
) -> BlockRecord:
    """Write everything outside the blocks; embedding and head are rounded to nearest if chosen.

    An embedding is a table of rows that are looked up, not a product, so there is no Hessian.
    """
    tensors = {name: walk.read(name) for name in walk.rest()}
    codes: dict[str, QTensor] = {}
    metrics: list[ModuleMetric] = []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in job.schemes:
            codes[module] = rtn(
                tensor.float(), job.schemes[module], search="mse", scale_dtype=tensor.dtype
            )
            metrics.append(_metric(module, tensor, codes[module], None))
    dense = {f"{module}.weight": qtensor.dequantize() for module, qtensor in codes.items()}
    writer.write_shard(shard_name("outside"), tensors | dense)
    if codes:
        write_codes(folder / codes_name("outside"), codes)
    return BlockRecord(-1, tuple(metrics))


def _result(folder: Path, records: Iterable[BlockRecord]) -> StageResult:
    metrics = tuple(metric for record in records for metric in record.metrics)
    return StageResult(
        checkpoint=folder,
        changed=tuple(f"{metric.module}.weight" for metric in metrics),
        metrics=metrics,
        fallbacks=tuple(fallback for record in records for fallback in record.fallbacks),
    )
