"""How scales are chosen: AWQ's search by output error, SmoothQuant's closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.edges import Edge
from compressor.model.experts import place
from compressor.model.matrices import Matrix
from compressor.model.walk import BlockWalk
from compressor.numerics.grid_search import TRIES
from compressor.numerics.hessian import HessianAccumulator, row_losses
from compressor.numerics.scaling import (
    Choice,
    MagnitudeAccumulator,
    best_scale,
    candidates,
    int8_output_error,
    output_error,
    rounded_at,
    shortlist,
    smoothing_scale,
    tie_heads,
    weight_magnitude,
)
from compressor.stages.scaling import Chosen, Sample, expanded
from compressor.types import Fallback, ModuleMetric

if TYPE_CHECKING:
    from compressor.stages.transform_awq import TransformAwq
    from compressor.stages.transform_smoothquant import TransformSmoothquant

# Candidates are ranked on grids searched with few tries; the best few, and no scale, on full ones.
_ROUGH = 6
_FINALISTS = 3
_UNREACHED = "no calibration token reached it"


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

        def rounded(scale: Tensor, tries: int) -> list[Tensor]:
            per_input = expanded(edge, scale)
            return [
                rounded_at(
                    weight,
                    per_input,
                    self.options.scheme,
                    search=self.options.grid,
                    energy=size.energy,
                    dtype=dtype,
                    tries=tries,
                )
                for weight in weights
            ]

        if isinstance(judge, Half):
            energy, half = judge.energy, judge

            def loss(scale: Tensor, tries: int = TRIES) -> float:
                return half.error(dict(zip(edge.readers, rounded(scale, tries), strict=True)))
        else:
            hessian = judge.matrix()
            energy = sum(row_losses(w.to(hessian), hessian).double().sum().item() for w in weights)

            def loss(scale: Tensor, tries: int = TRIES) -> float:
                return output_error(weights, rounded(scale, tries), hessian)

        tried = self._candidates(edge, size, weights)
        choice = best_scale(shortlist(tried, partial(loss, tries=_ROUGH), _FINALISTS), loss)
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
