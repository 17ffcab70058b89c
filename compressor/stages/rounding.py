"""The loop that every rounder shares: stream blocks, round the chosen matrices, write, go on.

A rounder supplies one function, `Solve`, that rounds the matrices which see the same input.
Everything a block leaves (weights, codes, the activations that enter the next block) is on disk
before the block is reported done, so that an interrupted stage goes on at the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.formats.codes import codes_name, write_codes
from compressor.formats.shards import TORCH_DTYPES, CheckpointWriter, shard_name
from compressor.formats.sizes import bits_per_weight
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.walk import Block, BlockMatrix, BlockWalk
from compressor.numerics.hessian import HessianAccumulator, relative_loss
from compressor.numerics.rtn import rtn
from compressor.stages.context import StageContext
from compressor.stages.quantize_base import RounderConfig
from compressor.types import (
    BlockRecord,
    Fallback,
    ModuleMetric,
    QTensor,
    StageResult,
    TokenBatch,
    WeightScheme,
)

_ON_GRID = ("its weights lie on the grid already", "they stay as they are")


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding; `fallback` is (reason, action) when not done as asked."""

    qtensor: QTensor
    fallback: tuple[str, str] | None = None


Solve = Callable[
    [Sequence[Tensor], Sequence[WeightScheme], Tensor | None, torch.dtype],
    list[Rounded],
]


@dataclass(frozen=True)
class Job:
    """What a rounder asks of the loop.

    Attributes:
        schemes: grid of every matrix to be rounded, by its name on disk without `.weight`.
        solve: rounds matrices [out, in] (fp32) that see the same input; gets their schemes, that
            input's Hessian [in, in] (None when no token reached it or none was asked for) and the
            dtype in which scales are stored.
        batches: calibration tokens; none when `solve` wants no Hessians.
        sublayers: measure inputs again after each group of matrices has been rounded.
    """

    schemes: Mapping[str, WeightScheme]
    solve: Solve
    batches: Sequence[TokenBatch]
    sublayers: bool = False


def round_model(
    stage: RounderConfig,
    solve: Solve,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
    *,
    sublayers: bool = False,
) -> StageResult:
    """Round the stage's matrices and write the new checkpoint with its codes.

    Args:
        stage: says which matrices, on which grids.
        solve: how they are rounded; see `Job`.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens; none when `solve` wants no Hessians.
        context: where to work and whom to tell.
        sublayers: let each matrix see inputs that passed through the rounded ones before it.

    Returns:
        The stage's result; `changed` names every tensor that rounding moved.
    """
    config = read_config(checkpoint)
    architecture = Architecture.from_config(config)
    job = Job(stage.schemes(architecture), solve, batches, sublayers)
    walk = BlockWalk(
        checkpoint,
        batches,
        device=context.device,
        dtype=context.dtype,
        scratch=context.scratch,
        memory_budget=context.activation_budget,
    )
    writer = CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("rounding blocks", architecture.layers) as task:
        task.advance(len(records))
        for block in walk.blocks(start=len(records)):
            codes, record = _round_block(job, block)
            writer.write_shard(shard_name(block.index), block.state())
            write_codes(context.folder / codes_name(block.index), codes)
            block.save_outputs()
            context.block_done(record)
            records.append(record)
            task.advance()
    records.append(_round_outside(job, walk, writer, context.folder))
    writer.finish(config, checkpoint, architecture.parameters)
    return _result(context.folder, records)


def _round_block(job: Job, block: Block) -> tuple[dict[str, QTensor], BlockRecord]:
    """Round the chosen matrices of one block in place."""
    groups = _chosen_groups(block.matrices, job.schemes)
    codes: dict[str, QTensor] = {}
    metrics: list[ModuleMetric] = []
    fallbacks: list[Fallback] = []
    for wave in _waves(groups, job.sublayers):
        hessians = _measure(block, groups, wave) if job.batches else {}
        for name in wave:
            hessian = hessians.pop(name).matrix() if name in hessians else None
            weights = [matrix.weight.float() for matrix in groups[name]]
            schemes = [job.schemes[matrix.info.name] for matrix in groups[name]]
            dtype = block.tensor(groups[name][0].info.tensor).dtype
            solved = job.solve(weights, schemes, hessian, dtype)
            for matrix, weight, rounded in zip(groups[name], weights, solved, strict=True):
                module = matrix.info.name
                codes[module] = rounded.qtensor
                metrics.append(_metric(module, weight, rounded.qtensor, hessian))
                if rounded.fallback:
                    fallbacks.append(Fallback(module, *rounded.fallback))
                original = block.tensor(matrix.info.tensor)
                matrix.set_weight(rounded.qtensor.dequantize())
                if torch.equal(block.tensor(matrix.info.tensor), original):
                    fallbacks.append(Fallback(module, *_ON_GRID))
    return codes, BlockRecord(block.index, tuple(metrics), tuple(fallbacks))


def _chosen_groups(
    matrices: Iterable[BlockMatrix], schemes: Collection[str]
) -> dict[str, list[BlockMatrix]]:
    """The matrices to be rounded, by the input they see, in order of execution."""
    groups: dict[str, list[BlockMatrix]] = {}
    for matrix in matrices:
        if matrix.info.name in schemes:
            groups.setdefault(matrix.info.input_group, []).append(matrix)
    return groups


def _waves(groups: Collection[str], sublayers: bool) -> Iterator[list[str]]:
    """Input groups measured together: all at once, or each after the ones before were rounded."""
    if sublayers:
        yield from ([name] for name in groups)
    else:
        yield list(groups)


def _measure(
    block: Block, groups: Mapping[str, Sequence[BlockMatrix]], wave: Collection[str]
) -> dict[str, HessianAccumulator]:
    """One pass of all calibration tokens through the block; a Hessian per input."""
    device = next(block.module.parameters()).device
    hessians = {name: HessianAccumulator(groups[name][0].info.shape[1], device) for name in wave}
    block.capture(lambda name, inputs, _: hessians[name].add(inputs), groups=wave)
    return {name: hessian for name, hessian in hessians.items() if hessian.tokens}


def _metric(module: str, weight: Tensor, qtensor: QTensor, hessian: Tensor | None) -> ModuleMetric:
    """Relative layer error beside that of plain rounding, on the same inputs."""
    simple = rtn(weight, qtensor.scheme, scale_dtype=qtensor.scale.dtype)
    shape = (weight.shape[0], weight.shape[1])
    return ModuleMetric(
        module=module,
        bits=bits_per_weight(shape, qtensor.scheme, _dtype_name(qtensor.scale.dtype)),
        loss=relative_loss(weight, qtensor.dequantize(), hessian),
        baseline_loss=relative_loss(weight, simple.dequantize(), hessian),
    )


def _round_outside(
    job: Job, walk: BlockWalk, writer: CheckpointWriter, folder: Path
) -> BlockRecord:
    """Write everything outside the blocks; embedding and head are rounded to nearest if chosen.

    An embedding is a table of rows that are looked up, not a product, so there is no Hessian.
    """
    tensors = {name: walk.tensor(name) for name in walk.rest()}
    codes: dict[str, QTensor] = {}
    metrics: list[ModuleMetric] = []
    fallbacks: list[Fallback] = []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in job.schemes:
            weight = tensor.float()
            codes[module] = rtn(weight, job.schemes[module], search="mse", scale_dtype=tensor.dtype)
            metrics.append(_metric(module, weight, codes[module], None))
            if torch.equal(codes[module].dequantize(), tensor):
                fallbacks.append(Fallback(module, *_ON_GRID))
    dense = {f"{module}.weight": qtensor.dequantize() for module, qtensor in codes.items()}
    writer.write_shard(shard_name("outside"), tensors | dense)
    if codes:
        write_codes(folder / codes_name("outside"), codes)
    return BlockRecord(-1, tuple(metrics), tuple(fallbacks))


def _result(folder: Path, records: Iterable[BlockRecord]) -> StageResult:
    """A matrix that lies on its grid has codes like any other, but its weights did not change."""
    metrics = tuple(metric for record in records for metric in record.metrics)
    fallbacks = tuple(fallback for record in records for fallback in record.fallbacks)
    same = {fallback.module for fallback in fallbacks if fallback.reason == _ON_GRID[0]}
    return StageResult(
        checkpoint=folder,
        changed=tuple(f"{metric.module}.weight" for metric in metrics if metric.module not in same),
        metrics=metrics,
        fallbacks=fallbacks,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    """As safetensors names it."""
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)
