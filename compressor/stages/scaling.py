"""The loop of the scaling transforms: stream blocks, choose scales, fold them, write, go on.

All edges of a block are judged on the block as it came, then folded at once: a fold changes
neither the inputs of another edge nor, because grids follow the scale of a row, how the rows of
a producer round. Everything is folded in fp32 and rounded to the stored dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import VerificationError
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture, Matrix
from compressor.model.edges import Edge, edges
from compressor.model.experts import place
from compressor.model.files import read_config
from compressor.model.walk import Block, BlockWalk
from compressor.numerics.hessian import HessianAccumulator, row_losses
from compressor.numerics.scaling import (
    Choice,
    MagnitudeAccumulator,
    best_scale,
    candidates,
    fold_norm,
    int8_output_error,
    output_error,
    rounded_at,
    smoothing_scale,
    spread_heads,
    tie_heads,
    weight_magnitude,
)
from compressor.stages.context import StageContext
from compressor.types import BlockRecord, Fallback, ModuleMetric, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.transform_awq import TransformAwq
    from compressor.stages.transform_base import ScalingConfig
    from compressor.stages.transform_smoothquant import TransformSmoothquant

_UNREACHED = "no calibration token reached it"


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
    walk = BlockWalk(
        checkpoint,
        parts,
        device=context.device,
        dtype=context.dtype,
        scratch=context.scratch,
        memory_budget=context.activation_budget,
    )
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


# ---------------------------------------------------------------------- choosing


class AwqChooser:
    """The lowest output error after rounding, over a list of scales that has the identity.

    An error in q, k and v, or in gate and up, is judged by the output of the module that they
    are part of, on the sample; one in o or down by their own output, on all tokens.
    """

    def __init__(self, options: TransformAwq) -> None:
        self.options = options
        self.tokens = options.tokens

    def __call__(
        self, walk: BlockWalk, block: Block, found: Sequence[Edge], sample: Sample
    ) -> Iterator[Chosen]:
        """See `Chooser`."""
        device = walk.device
        linear = {edge.group for edge in found if edge.parent is None}
        widths = {edge.group: edge.readers[0].shape[1] for edge in found}
        sizes = {group: MagnitudeAccumulator(width, device) for group, width in widths.items()}
        moments = {group: HessianAccumulator(widths[group], device) for group in linear}

        def observe(group: str, inputs: Tensor, _: Tensor) -> None:
            sizes[group].add(inputs)
            if group in moments:
                moments[group].add(inputs)

        block.capture(observe, groups=widths)
        parents = {edge.parent for edge in found if edge.parent is not None}
        calls = recorded_calls(block, sorted(parents), sample)
        for edge in found:
            size = sizes[edge.group]
            if not size.tokens:
                fallback = Fallback(edge.name, _UNREACHED, "left unscaled")
                yield Chosen(edge, None, None, fallback)
            elif edge.parent is None:
                yield self._search(block, edge, size, moments.pop(edge.group))
            else:
                half = Half(walk.architecture, block, edge.parent, calls[edge.parent], sample)
                yield self._search(block, edge, size, half)

    def _search(
        self, block: Block, edge: Edge, size: MagnitudeAccumulator, judge: HessianAccumulator | Half
    ) -> Chosen:
        weights = [block.matrix(reader.name).weight.float() for reader in edge.readers]
        dtype = block.tensor(edge.readers[0].tensor).dtype

        def rounded(scale: Tensor) -> list[Tensor]:
            per_input = expanded(edge, scale)
            return [
                rounded_at(
                    weight,
                    per_input,
                    self.options.scheme,
                    search=self.options.grid,
                    energy=size.energy,
                    dtype=dtype,
                )
                for weight in weights
            ]

        if isinstance(judge, Half):
            energy, half = judge.energy, judge
            choice = best_scale(
                self._candidates(edge, size, weights),
                lambda scale: half.error(dict(zip(edge.readers, rounded(scale), strict=True))),
            )
        else:
            hessian = judge.matrix()
            energy = sum(row_losses(w.to(hessian), hessian).double().sum().item() for w in weights)
            choice = best_scale(
                self._candidates(edge, size, weights),
                lambda scale: output_error(weights, rounded(scale), hessian),
            )
        return Chosen(edge, choice.scale, _metric(edge, choice, energy, dtype))

    def _candidates(
        self, edge: Edge, size: MagnitudeAccumulator, weights: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Scales per channel of the producer; heads that share a value share its scale."""
        inputs = tied(edge, size.mean)
        magnitude = tied(edge, weight_magnitude(weights, self.options.scheme.group_size))
        kinds = {"ignore": (None,), "use": (magnitude,), "both": (None, magnitude)}
        return candidates(inputs, kinds[self.options.weights], self.options.steps)


class SmoothChooser:
    """The closed form of SmoothQuant; the report compares W8A8 outputs with and without it."""

    def __init__(self, options: TransformSmoothquant) -> None:
        self.options = options
        self.tokens = options.tokens

    def __call__(
        self, walk: BlockWalk, block: Block, found: Sequence[Edge], sample: Sample
    ) -> Iterator[Chosen]:
        """See `Chooser`."""
        widths = {edge.group: edge.readers[0].shape[1] for edge in found}
        sizes = {g: MagnitudeAccumulator(width, walk.device) for g, width in widths.items()}
        block.capture(lambda group, inputs, _: sizes[group].add(inputs), groups=widths)
        rows: dict[str, list[Tensor]] = {group: [] for group in widths}
        block.capture(
            lambda group, inputs, _: rows[group].append(inputs),
            groups=widths,
            batches=sample.places,
        )
        for edge in found:
            weights = [block.matrix(reader.name).weight.float() for reader in edge.readers]
            columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            scale = smoothing_scale(sizes[edge.group].peak, columns, self.options.alpha)
            inputs = torch.cat(rows[edge.group])
            losses = [int8_output_error(inputs, weights, s) for s in (scale, scale**0)]
            dtype = block.tensor(edge.readers[0].tensor).dtype
            yield Chosen(edge, scale, ModuleMetric(edge.name, 8.0 * dtype.itemsize, *losses))


def tied(edge: Edge, values: Tensor) -> Tensor:
    """Values per input of the readers, averaged to one per channel of the producer."""
    return values if edge.heads is None else tie_heads(values, *edge.heads)


def expanded(edge: Edge, scale: Tensor) -> Tensor:
    """A scale per channel of the producer as one per input of the readers."""
    return scale if edge.heads is None else spread_heads(scale, *edge.heads)


def _metric(edge: Edge, choice: Choice, energy: float, dtype: torch.dtype) -> ModuleMetric:
    """Share of the output's energy that rounding costs, with the scale and without it."""
    total = energy or 1.0
    bits = 8.0 * dtype.itemsize  # the weights stay dense
    return ModuleMetric(edge.name, bits, choice.loss / total, choice.identity_loss / total)


# ---------------------------------------------------------------------- halves of a block


@dataclass(frozen=True)
class Call:
    """The arguments a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def recorded_calls(block: Block, paths: Iterable[str], sample: Sample) -> dict[str, list[Call]]:
    """What modules of the block are called with on the batches of the sample."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    if not calls:
        return calls

    def keep(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: calls[path].append(Call(args, dict(kwargs)))

    handles = [
        block.module.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True)
        for path in calls
    ]
    try:
        with torch.no_grad():
            for place_ in sample.places:
                block.run(place_)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Half:
    """Attention or the feed-forward half of a block, which can be run with other weights.

    Args:
        architecture: of the model.
        block: as it came.
        path: of the module below the block.
        calls: what it is called with on the sample.
        sample: says which tokens count.
    """

    def __init__(
        self,
        architecture: Architecture,
        block: Block,
        path: str,
        calls: Sequence[Call],
        sample: Sample,
    ) -> None:
        self._architecture = architecture
        self._prefix = f"{architecture.blocks_path}.{block.index}.{path}."
        self._module: nn.Module = block.module.get_submodule(path)
        self._calls, self._masks = calls, sample.masks
        self._outputs = list(self._run({}))

    @property
    def energy(self) -> float:
        """Σ y² over the sample."""
        return sum(rows.double().square().sum().item() for rows in self._outputs)

    def error(self, weights: Mapping[Matrix, Tensor]) -> float:
        """Σ (ŷ - y)² over the sample when these matrices [out, in] stand in for theirs."""
        outputs = self._run(self._parameters(weights))
        return sum(
            (changed - rows).double().square().sum().item()
            for changed, rows in zip(outputs, self._outputs, strict=True)
        )

    def _run(self, parameters: dict[str, Tensor]) -> Iterator[Tensor]:
        """Outputs [tokens, width] of the valid tokens, batch by batch."""
        for call, mask in zip(self._calls, self._masks, strict=True):
            with torch.no_grad():
                output = torch.func.functional_call(
                    self._module, parameters, call.args, dict(call.kwargs)
                )
            rows: Tensor = output[0] if isinstance(output, tuple) else output
            yield rows.reshape(-1, rows.shape[-1])[mask.flatten().to(rows.device)]

    def _parameters(self, weights: Mapping[Matrix, Tensor]) -> dict[str, Tensor]:
        """Parameters of the module with the matrices in place; experts share a parameter."""
        found: dict[str, Tensor] = {}
        for matrix, weight in weights.items():
            spot = place(self._architecture, matrix)
            name = spot.parameter.removeprefix(self._prefix)
            if name not in found:
                found[name] = self._module.get_parameter(name).detach().clone()
            spot.view(found[name]).copy_(weight)
        return found


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
