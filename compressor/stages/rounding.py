"""The loop that every rounder shares: stream blocks, round the chosen matrices, write, go on.

A rounder supplies one function, `Solve`, that rounds the matrices which see the same input. Experts
whose matrices have the same shapes and grids are rounded together, as a batch.
Everything a block leaves (weights, codes, the activations that enter the next block) is on disk
before the block is reported done, so that an interrupted stage goes on at the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, repeat
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressor.formats.allocation import read_allocation
from compressor.formats.codes import codes_name, write_codes
from compressor.formats.shards import TORCH_DTYPES, CheckpointWriter, shard_name
from compressor.formats.sizes import bits_per_weight
from compressor.model.architecture import (
    MOMENTS_AT_ONCE,
    SOLVED_AT_ONCE,
    Architecture,
    solving_bytes,
)
from compressor.model.block import Block, BlockMatrix
from compressor.model.files import read_config
from compressor.model.lanes import Lanes
from compressor.model.memory import return_memory
from compressor.model.serving import serving_config
from compressor.model.walk import BlockWalk
from compressor.numerics.hessian import relative_losses
from compressor.numerics.rtn import rtn
from compressor.stages.context import StageContext
from compressor.stages.moments import Moments, MomentSums
from compressor.types import (
    ActivationScheme,
    BlockRecord,
    Fallback,
    ModuleMetric,
    QTensor,
    StageResult,
    TokenBatch,
    WeightScheme,
)

ON_GRID = ("its weights lie on the grid already", "they stay as they are")


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding, or a batch of matrices; `*` is its size or nothing.

    Attributes:
        qtensor: the codes.
        fallbacks: (reason, action) of every member of the batch that was not done as asked, by its
            place; a single matrix is member 0.
        target: fp32 [*, out, in], what the codes were to come close to, where not the weight
            itself.
    """

    qtensor: QTensor
    fallbacks: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    target: Tensor | None = None


Solve = Callable[
    [Sequence[Tensor], Sequence[WeightScheme], Moments | None, torch.dtype],
    list[Rounded],
]


@dataclass(frozen=True)
class Job:
    """What a rounder asks of the loop.

    Attributes:
        schemes: grid of every matrix to be rounded, by its name on disk without `.weight`.
        solve: rounds matrices [*, out, in] (fp32) that see the same input; gets their schemes, that
            input's moments (None when no token reached it or none were asked for) and the dtype
            in which scales are stored. `*` is a batch of experts, which comes with moments only,
            or nothing.
        batches: calibration tokens; none when `solve` wants no Hessians.
        sublayers: measure inputs again after each group of matrices has been rounded.
        balance: weighs the domains of the text; None counts every token once.
        inputs: how inputs of matrices are rounded, by matrix.
        together: experts that are alike come to `solve` as a batch.
    """

    schemes: Mapping[str, WeightScheme]
    solve: Solve
    batches: Sequence[TokenBatch]
    sublayers: bool = False
    balance: Balance | None = None
    inputs: Mapping[str, ActivationScheme] | None = None
    together: bool = True


class Rounder(Protocol):
    """What the loop asks a stage."""

    def schemes(self, architecture: Architecture) -> dict[str, WeightScheme]:
        """The grid of every matrix that the stage rounds, by name, in model order."""

    def rounded_inputs(self, architecture: Architecture) -> dict[str, ActivationScheme]:
        """How the inputs of matrices are rounded while the model runs, by name."""


class Balance(Protocol):
    """Weights of domains, set anew after every block by what its rounding did to held-out text."""

    @property
    def batches(self) -> Sequence[TokenBatch]:
        """Held-out tokens; they run behind the calibration tokens and enter no statistic."""

    @property
    def ratios(self) -> Mapping[str, float]:
        """What a token of each domain counts; 1 leaves the text's own proportions."""

    def settle(self, block: Block, original: Block | None) -> dict[str, float]:
        """Look at the held-out tokens behind a rounded block; what to journal with the block."""


RoundBlock = Callable[[Job, Block, Block | None], tuple[dict[str, QTensor], BlockRecord]]
"""Called with the job, a block and the parent's; gives codes by module, and the record."""


def architecture_of(checkpoint: Path) -> Architecture:
    """Of a checkpoint, with the grids that a stage before has chosen for the rounder."""
    architecture = Architecture.from_config(read_config(checkpoint))
    return architecture.with_allotment(read_allocation(checkpoint))


def round_model(
    stage: Rounder,
    solve: Solve,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
    *,
    sublayers: bool = False,
    reference: bool = False,
    balance: Balance | None = None,
    rounds: RoundBlock | None = None,
) -> StageResult:
    """Round the stage's matrices and write the new checkpoint with its codes.

    Args:
        stage: says which matrices, on which grids.
        solve: how they are rounded; see `Job`.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens; none when `solve` wants no Hessians.
        context: where to work and whom to tell.
        sublayers: let each matrix see inputs that passed through the rounded ones before it.
        reference: walk the parent beside, so that `solve` learns how the inputs drifted from its.
        balance: weighs the domains of the text.
        rounds: rounds a whole block in place, beside the parent's; `round_block` by default.

    Returns:
        The stage's result; `changed` names every tensor that rounding moved.
    """
    config = read_config(checkpoint)
    architecture = architecture_of(checkpoint)
    inputs = stage.rounded_inputs(architecture)
    lanes = Lanes() if rounds or not batches else Lanes.of(context.device)
    parts = batches if rounds else Lanes.parts(batches, context.device)
    job = Job(stage.schemes(architecture), solve, parts, sublayers, balance, inputs)
    walk, parent = open_walks(
        job, checkpoint, context, context.scratch, reference=reference, lanes=lanes
    )
    writer = CheckpointWriter(context.folder)
    records = list(context.finished)
    with context.observer.task("rounding blocks", architecture.layers) as task:
        task.advance(len(records))
        for block, original in lockstep(walk, parent, len(records)):
            codes, record = (rounds or round_block)(job, block, original)
            writer.write_shard(shard_name(block.index), block.state())
            write_codes(context.folder / codes_name(block.index), codes)
            if balance:
                record = replace(record, notes=record.notes | balance.settle(block, original))
            if original:
                original.save_outputs()
            block.save_outputs()
            context.block_done(record)
            records.append(record)
            task.advance()
    records.append(_round_outside(job, walk, writer, context.folder))
    writer.finish(serving_config(config, inputs), checkpoint, architecture.parameters)
    return _result(context.folder, records)


def open_walks(
    job: Job,
    checkpoint: Path,
    context: StageContext,
    scratch: Path,
    *,
    reference: bool,
    lanes: Lanes | None = None,
) -> tuple[BlockWalk, BlockWalk | None]:
    """The walk whose blocks are rounded, and that of the parent beside it if there is to be one.

    Both share the memory for activations. Held-out tokens come behind the calibration tokens.
    Inputs are rounded before any weight is, so that a solver makes up for that as well.
    """
    batches = [*job.batches, *(job.balance.batches if job.balance else ())]
    folders = [scratch, scratch / "reference"][: 2 if reference else 1]
    walks = [
        BlockWalk(
            checkpoint,
            batches,
            device=context.device,
            dtype=context.dtype,
            scratch=folder,
            memory_budget=context.activation_budget // len(folders),
            activations=job.inputs if folder == scratch else None,
            parks=True,
            lanes=lanes,
        )
        for folder in folders
    ]
    return walks[0], walks[1] if reference else None


def lockstep(
    walk: BlockWalk, parent: BlockWalk | None, start: int
) -> Iterator[tuple[Block, Block | None]]:
    """Each block of the walk with the parent's, which nobody changes."""
    originals: Iterator[Block | None] = parent.blocks(start) if parent else repeat(None)
    return zip(walk.blocks(start), originals, strict=False)


def round_block(
    job: Job, block: Block, original: Block | None
) -> tuple[dict[str, QTensor], BlockRecord]:
    """Codes by module of the block's chosen matrices, which are rounded in place."""
    groups = chosen_groups(block.matrices, job.schemes)
    codes: dict[str, QTensor] = {}
    metrics: list[ModuleMetric] = []
    fallbacks: list[Fallback] = []
    for wave in _waves(job, block, groups):
        measured = _measure(job, block, original, groups, wave) if job.batches and wave else {}
        return_memory()  # what forwards have freed is room for the solves
        done: dict[str, Sequence[_Done]] = {}
        for names in _batches(job, block, groups, wave, measured):
            members = [groups[name] for name in names]
            moments = _taken(measured, names, _ratios(job, block))
            done |= zip(names, _solve_together(job, block, members, moments), strict=True)
            del moments  # before the next are formed
        for one in (one for name in wave for one in done[name]):
            codes[one.metric.module] = one.qtensor
            metrics.append(one.metric)
            fallbacks += one.fallbacks
    return codes, BlockRecord(block.index, tuple(metrics), tuple(fallbacks))


@dataclass(frozen=True)
class _Done:
    """What became of one matrix."""

    qtensor: QTensor
    metric: ModuleMetric
    fallbacks: tuple[Fallback, ...]


def _batches(
    job: Job,
    block: Block,
    groups: Mapping[str, Sequence[BlockMatrix]],
    wave: Sequence[str],
    measured: Mapping[str, MomentSums],
) -> Iterator[Sequence[str]]:
    """Inputs whose matrices are solved together: of experts that are alike, as memory allows.

    An expert that no token reached is left alone: without moments there is little to solve.
    """
    alike: dict[object, list[str]] = {}
    for name in wave:
        reached = name in measured and measured[name].reached
        kind: object = name
        if job.together and reached and groups[name][0].info.expert is not None:
            kind = tuple(_kind(job, block, matrix) for matrix in groups[name])
        alike.setdefault(kind, []).append(name)
    for names in alike.values():
        working = solving_bytes([matrix.info for matrix in groups[names[0]]])
        most = max(SOLVED_AT_ONCE // working, 1)
        yield from (names[start : start + most] for start in range(0, len(names), most))


def _kind(job: Job, block: Block, matrix: BlockMatrix) -> object:
    """Matrices of which this is the same can be parts of a batch."""
    info = matrix.info
    return info.shape, job.schemes[info.name], block.dtype(info.tensor)


def _taken(
    measured: dict[str, MomentSums], names: Sequence[str], ratios: Sequence[float]
) -> Moments | None:
    """Moments of inputs, a batch if there are several; the sums behind them are let go of."""
    parts = [measured.pop(name).moments(ratios) for name in names if name in measured]
    found = [part for part in parts if part]
    if len(found) < 2:
        return found[0] if found else None
    return Moments(torch.stack([part.hessian for part in found]))  # experts have no drift


def _solve_together(
    job: Job, block: Block, members: Sequence[Sequence[BlockMatrix]], moments: Moments | None
) -> Iterable[Sequence[_Done]]:
    """Round the matrices of an input, or of several inputs as a batch; by input."""
    roles = list(zip(*members, strict=True))  # such as all gates, all ups
    weights = [_stacked([matrix.weight.float() for matrix in alike]) for alike in roles]
    schemes = [job.schemes[matrix.info.name] for matrix in members[0]]
    dtype = block.dtype(members[0][0].info.tensor)
    solved = job.solve(weights, schemes, moments, dtype)
    hessian = moments.hessian if moments else None
    every = zip(roles, weights, solved, strict=True)
    return zip(*(_place(block, *one, hessian) for one in every), strict=True)


def _stacked(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.stack(weights)


def _place(
    block: Block,
    matrices: Sequence[BlockMatrix],
    weight: Tensor,
    rounded: Rounded,
    hessian: Tensor | None,
) -> list[_Done]:
    """Put a matrix, or every member of a batch, into the block."""
    metrics = _metrics([matrix.info.name for matrix in matrices], weight, rounded, hessian)
    done = []
    for i, (matrix, qtensor) in enumerate(zip(matrices, rounded.qtensor.members(), strict=True)):
        reasons = [rounded.fallbacks[i]] if i in rounded.fallbacks else []
        before = block.tensor(matrix.info.tensor)
        matrix.set_weight(qtensor.dequantize())
        if torch.equal(block.tensor(matrix.info.tensor), before):
            reasons.append(ON_GRID)
        fallbacks = tuple(Fallback(matrix.info.name, *reason) for reason in reasons)
        done.append(_Done(qtensor, metrics[i], fallbacks))
    return done


def chosen_groups(
    matrices: Iterable[BlockMatrix], schemes: Collection[str]
) -> dict[str, list[BlockMatrix]]:
    """The matrices to be rounded, by the input they see, in order of execution."""
    groups: dict[str, list[BlockMatrix]] = {}
    for matrix in matrices:
        if matrix.info.name in schemes:
            groups.setdefault(matrix.info.input_group, []).append(matrix)
    return groups


def _waves(
    job: Job, block: Block, groups: Mapping[str, Sequence[BlockMatrix]]
) -> Iterator[list[str]]:
    """Input groups measured together: all at once, or each after the ones before were rounded.

    Experts do not feed each other: their inputs go together, and after them what enters their
    down matrices, as many as memory for moments allows.
    """
    parts = len(block.domains) + 1 if job.balance else 1  # of each domain, and mixed
    if not job.sublayers:
        yield list(groups)
        return
    expert = {name: members[0].info.expert for name, members in groups.items()}
    for routed, run in groupby(groups, lambda name: expert[name] is not None):
        if not routed:
            yield from ([name] for name in run)
            continue
        for _, side in groupby(sorted(run, key=_is_inner), _is_inner):
            widths = {name: groups[name][0].info.shape[1] for name in groups}
            yield from _bounded(side, widths, parts)


def _is_inner(group: str) -> bool:
    """Whether an expert's group is what enters its down matrix."""
    return group.endswith(".out")


def _bounded(names: Iterable[str], widths: Mapping[str, int], parts: int) -> Iterator[list[str]]:
    """Cut into lists whose fp32 moments [in, in], `parts` of each, fit `MOMENTS_AT_ONCE`."""
    wave: list[str] = []
    most = MOMENTS_AT_ONCE // (4 * parts)
    for name in names:
        if wave and sum(widths[other] ** 2 for other in [*wave, name]) > most:
            yield wave
            wave = []
        wave.append(name)
    yield wave


def _ratios(job: Job, block: Block) -> list[float]:
    """What a token of each domain of the walk counts, by the walk's index of domains."""
    ratios = job.balance.ratios if job.balance else {}
    return [ratios.get(domain, 1.0) for domain in block.domains]


def _measure(
    job: Job,
    block: Block,
    original: Block | None,
    groups: Mapping[str, Sequence[BlockMatrix]],
    wave: Sequence[str],
) -> dict[str, MomentSums]:
    """One pass of all calibration tokens through the block, and through the parent's beside it.

    Inputs of routed experts are not paired: the parent may send a token to another expert.
    """
    device = next(block.module.parameters()).device
    infos = {name: groups[name][0].info for name in wave}
    paired = {name for name in wave if original and infos[name].expert is None}
    found = {
        name: MomentSums(
            info.shape[1], device, paired=name in paired, apart=job.balance is not None
        )
        for name, info in infos.items()
    }
    last = wave[-1] == list(groups)[-1]

    def run(batch: int) -> tuple[_Seen, _Seen]:
        """What enters the parent's groups and the block's from the same tokens."""
        reference, own = _Seen(), _Seen()
        if original and (paired or last):
            original.capture(reference.keep, paired, [batch], onward=last, ahead=True)
        block.capture(own.keep, wave, [batch])
        return reference, own

    # Sums are formed out here, in the order of batches, so that they have the same bits every time.
    for reference, own in block.lanes.each(run, range(len(job.batches))):
        for name, (inputs, domains) in own.items():
            found[name].add(inputs, reference[name][0] if name in paired else None, domains)
    if original and last:  # held-out tokens only go onward
        rest = range(len(job.batches), len(block.inputs))
        original.capture(_Seen().keep, (), rest, onward=True)
    return found


class _Seen(dict[str, tuple[Tensor, Tensor]]):
    """What entered input groups [tokens, in], and the domains of these tokens."""

    def keep(self, name: str, inputs: Tensor, domains: Tensor) -> None:
        """An observer."""
        self[name] = inputs, domains


def _metrics(
    modules: Sequence[str], weight: Tensor, rounded: Rounded, hessian: Tensor | None
) -> list[ModuleMetric]:
    """Relative layer error beside that of plain rounding, on the same inputs, to one target."""
    qtensor = rounded.qtensor
    simple = rtn(weight, qtensor.scheme, scale_dtype=qtensor.scale.dtype)
    target = weight if rounded.target is None else rounded.target
    losses = relative_losses(target, [qtensor.dequantize(), simple.dequantize()], hessian)
    shape = (weight.shape[-2], weight.shape[-1])
    bits = bits_per_weight(shape, qtensor.scheme, _dtype_name(qtensor.scale.dtype))
    pairs = zip(*(loss.reshape(-1).tolist() for loss in losses), strict=True)
    return [ModuleMetric(module, bits, *pair) for module, pair in zip(modules, pairs, strict=True)]


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
            metrics += _metrics([module], weight, Rounded(codes[module]), None)
            if torch.equal(codes[module].dequantize(), tensor):
                fallbacks.append(Fallback(module, *ON_GRID))
    dense = {f"{module}.weight": qtensor.dequantize() for module, qtensor in codes.items()}
    writer.write_shard(shard_name("outside"), tensors | dense)
    if codes:
        write_codes(folder / codes_name("outside"), codes)
    return BlockRecord(-1, tuple(metrics), tuple(fallbacks))


def _result(folder: Path, records: Sequence[BlockRecord]) -> StageResult:
    """A matrix that lies on its grid has codes like any other, but its weights did not change."""
    metrics = tuple(metric for record in records for metric in record.metrics)
    fallbacks = tuple(fallback for record in records for fallback in record.fallbacks)
    same = {fallback.module for fallback in fallbacks if fallback.reason == ON_GRID[0]}
    return StageResult(
        checkpoint=folder,
        changed=tuple(f"{metric.module}.weight" for metric in metrics if metric.module not in same),
        metrics=metrics,
        fallbacks=fallbacks,
        notes={name: value for record in records for name, value in record.notes.items()},
    )


def _dtype_name(dtype: torch.dtype) -> str:
    """As safetensors names it."""
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)
