"""What readers of units see: second moments of their inputs, by domain if domains have weights.

With the parent run beside, also what a reader's outputs lack for the residual stream to be the
parent's again. With h the stream before the reader and r the factor that its outputs y = W x (+ b)
enter the stream with, D = (h_parent + r y_parent - h - r y) / r; what the parent's stream holds at
the end of a block, or at its middle, is compared with what the pruned one's would hold if the
reader stayed whole. Tokens then count by the reciprocal of the mean square of the parent's stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model.architecture import Architecture
from compressor.model.block import Block, BlockMatrix, Observer
from compressor.numerics.hessian import HessianAccumulator, full_precision
from compressor.numerics.pruning import Level


@dataclass(frozen=True)
class Place:
    """A reader of units in the block that is in memory.

    Attributes:
        block: the block.
        reader: the matrix whose columns are units.
        levels: how many of them stay; empty where none go.
    """

    block: Block
    reader: BlockMatrix
    levels: tuple[Level, ...]

    @property
    def bias(self) -> str | None:
        """Name on disk of the reader's bias, if it has one."""
        name = f"{self.reader.info.name}.bias"
        return name if name in self.block.names else None


@dataclass(frozen=True)
class Inputs:
    """What calibration text says about the inputs X [in, N] of a reader.

    Attributes:
        hessian: H = (2/N) X diag(w) Xᵀ, fp32 [in, in]; w is 1 without the parent.
        mean: of every input, fp32 [in].
        drift: C = (2/N) D diag(w) Xᵀ, fp32 [out, in], where D is what the reader's outputs lack for
            the residual stream to be the parent's; None when the parent was not run beside.
    """

    hessian: Tensor
    mean: Tensor
    drift: Tensor | None = None


def paired(architecture: Architecture, expert: int | None) -> bool:
    """Whether an error of the residual stream can be undone in a reader's outputs.

    They must be added to the stream as they are, and for all tokens.
    """
    return architecture.prenorm and expert is None


class _Sums:
    """Sums over the tokens of one domain, or of all."""

    def __init__(self, out: int, width: int, device: torch.device, paired: bool) -> None:
        self.hessian = HessianAccumulator(width, device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(out, width, device=device) if paired else None

    def add(self, inputs: Tensor, drift: Tensor | None, weights: Tensor | None) -> None:
        self.total += inputs.sum(0, dtype=torch.float64)
        if weights is not None:
            roots = weights.sqrt()[:, None]
            inputs, drift = inputs * roots, None if drift is None else drift * roots
        self.hessian.add(inputs)
        if self.cross is not None and drift is not None:
            with full_precision():
                self.cross.addmm_(drift.T.to(self.cross), inputs.to(self.cross))

    def inputs(self) -> Inputs:
        tokens = self.hessian.tokens
        drift = None if self.cross is None else self.cross * (2.0 / tokens)
        return Inputs(self.hessian.matrix(), (self.total / tokens).float(), drift)


class _Seen:
    """Sums of one reader's inputs [in], apart by domain where domains have weights."""

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        paired: bool,
        weights: Sequence[float] | None,
    ) -> None:
        self.weights = weights
        self.sums = [_Sums(*shape, device, paired) for _ in (weights or (1.0,))]

    def add(
        self,
        inputs: Tensor,
        domains: Tensor,
        drift: Tensor | None,
        weights: Tensor | None = None,
    ) -> None:
        """Rows of one batch; weights [tokens] of their squared errors."""
        if self.weights is None:
            self.sums[0].add(inputs, drift, weights)
            return
        for domain, sums in enumerate(self.sums):
            rows = domains == domain
            if bool(rows.any()):
                parts = (None if part is None else part[rows] for part in (drift, weights))
                sums.add(inputs[rows], *parts)

    def inputs(self) -> Inputs | None:
        """Moments over all domains; a domain of which no token came has no say."""
        shares = self.weights or (1.0,)
        parts = [
            (share, sums.inputs())
            for share, sums in zip(shares, self.sums, strict=True)
            if sums.hessian.tokens
        ]
        if not parts:
            return None
        total = sum(share for share, _ in parts)
        drifts = [(s / total, part.drift) for s, part in parts if part.drift is not None]
        return Inputs(
            hessian=_mixed([(s / total, part.hessian) for s, part in parts]),
            mean=_mixed([(s / total, part.mean) for s, part in parts]),
            drift=_mixed(drifts) if drifts else None,
        )


def _mixed(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    mixed = parts[0][1] if parts[0][0] == 1 else parts[0][0] * parts[0][1]
    for share, tensor in parts[1:]:
        mixed = mixed + share * tensor
    return mixed


def measure(
    architecture: Architecture,
    places: Sequence[Place],
    original: Block | None,
    *,
    onward: bool,
    shares: Sequence[float] | None,
) -> dict[str, Inputs]:
    """One pass of all tokens through the block as it is now, up to the readers' inputs.

    Args:
        architecture: of the model.
        places: readers of one half of a block, at least one.
        original: the parent's block beside, already run; None when it is not.
        onward: whether the readers are those of the second half.
        shares: weight of every domain; None counts tokens.

    Returns:
        By input group; a reader that no token reached is absent.
    """
    block = places[0].block
    device = next(block.module.parameters()).device
    beside = original if paired(architecture, places[0].reader.info.expert) else None
    found = {
        place.reader.info.input_group: _Seen(
            place.reader.info.shape, device, beside is not None, shares
        )
        for place in places
    }
    factor = _residual_factor(architecture)
    for batch in range(len(block.inputs)):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        block.capture(_into(seen), list(found), [batch], onward=onward and beside is not None)
        drift, weights = None, None
        if beside:
            stream = beside.outputs[batch] if onward else beside.inputs[batch]
            weights = token_weights(block.valid(batch, stream))
        if beside and onward:
            drift = _lack_after(places[0], beside, batch) / factor
        elif beside:
            inputs = seen[places[0].reader.info.input_group][0]
            drift = _lack_between(places[0], beside, batch, factor, inputs) / factor
        for group, (inputs, domains) in seen.items():
            found[group].add(inputs, domains, drift, weights)
    moments = {group: sums.inputs() for group, sums in found.items()}
    return {group: inputs for group, inputs in moments.items() if inputs is not None}


def compare(
    block: Block, original: Block, role: str, shares: Sequence[float] | None
) -> Inputs | None:
    """What a matrix of the block reads, and what it lacks to be what the parent's reads.

    Args:
        block: as it is now.
        original: the parent's block beside.
        role: of the matrix.
        shares: weight of every domain; None counts tokens.

    Returns:
        With `drift` C = (2/N) (X_parent - X) Xᵀ, fp32 [in, in]; None without any token.
    """
    group, parents = (
        next(matrix.info.input_group for matrix in one.matrices if matrix.info.role == role)
        for one in (block, original)
    )
    width = next(m.info.shape[1] for m in block.matrices if m.info.role == role)
    device = next(block.module.parameters()).device
    sums = _Seen((width, width), device, True, shares)
    for batch in range(len(block.inputs)):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        beside: dict[str, tuple[Tensor, Tensor]] = {}
        block.capture(_into(seen), [group], [batch])
        original.capture(_into(beside), [parents], [batch])
        inputs, domains = seen[group]
        weights = token_weights(block.valid(batch, original.inputs[batch]))
        sums.add(inputs, domains, beside[parents][0] - inputs, weights)
    return sums.inputs()


def _into(seen: dict[str, tuple[Tensor, Tensor]]) -> Observer:
    def observe(group: str, inputs: Tensor, domains: Tensor) -> None:
        seen[group] = (inputs, domains)

    return observe


def token_weights(stream: Tensor) -> Tensor:
    """One over the mean square of the parent's stream, fp32 [tokens]: what norms divide by.

    The next norm undoes the size of a token's stream, so that an error counts relative to it. The
    first token's can be a thousand times that of others, and would be all that is fitted.
    """
    return stream.float().square().mean(1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()


def _lack_after(place: Place, original: Block, batch: int) -> Tensor:
    """What the stream lacks at the end of the block, [valid tokens, hidden]."""
    block = place.block
    return block.valid(batch, original.outputs[batch]) - block.valid(batch, block.outputs[batch])


def _lack_between(
    place: Place, original: Block, batch: int, factor: float, inputs: Tensor
) -> Tensor:
    """What the stream lacks behind attention, [valid tokens, hidden]."""
    block = place.block
    # The parent's block may have another number, where blocks before it are gone.
    group = next(m.info.input_group for m in original.matrices if m.info.role == "o")
    parents: dict[str, tuple[Tensor, Tensor]] = {}
    original.capture(_into(parents), [group], [batch])
    before = block.valid(batch, original.inputs[batch]) - block.valid(batch, block.inputs[batch])
    return before + factor * ((parents[group][0] - inputs) @ place.reader.weight.T)


def _residual_factor(architecture: Architecture) -> float:
    """What the outputs of both halves are multiplied by before they enter the stream."""
    factor = architecture.config.get("residual_multiplier", 1.0)
    return float(factor) if isinstance(factor, (int, float)) else 1.0
