"""How units are chosen: by a score of their columns, or by what refitting the others costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from compressor.model.architecture import Architecture
from compressor.model.load import load_model
from compressor.model.matrices import Matrix
from compressor.numerics.hessian import shrink
from compressor.numerics.pruning import (
    best_columns,
    flap_scores,
    obs_columns,
    refitted,
    ridged,
    shifted,
    wanda_scores,
)
from compressor.stages.context import StageContext
from compressor.stages.pruning import Align, Choice, Choose
from compressor.stages.unit_inputs import Inputs, Place
from compressor.types import TokenBatch

_UNREACHED = ("no calibration token reached it", "its channels were chosen by their weights")

Score = Callable[[Place, Inputs | None, Tensor], Tensor]
"""Scores [in] of the columns of a reader's weight [out, in]."""


def scored(score: Score, *, bias: bool = False) -> Choose:
    """Keep the units of highest score, as they are.

    Args:
        score: of columns.
        bias: add to the reader's bias, where it has one, what the columns that go put out on
            average (FLAP).
    """

    def choose(place: Place, inputs: Inputs | None) -> Choice:
        weight = place.reader.weight
        columns = best_columns(score(place, inputs, weight), place.levels)
        changed = None
        if bias and inputs and place.bias:
            gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            gone[columns] = False
            stored = place.block.tensor(place.bias)
            average = weight[:, gone] @ inputs.mean[gone]
            changed = stored.double() + average.to(stored.device, torch.float64)
        return Choice(columns, weight[:, columns], weight, changed)

    return choose


def compensated(damping: float, shrinkage: float, propagate: float) -> Choose:
    """Remove what costs least to make up for, and make up for it (OBS).

    Args:
        damping: ridge, as a share of the mean of H's diagonal.
        shrinkage: share by which correlations between inputs are scaled down before.
        propagate: share of the residual stream's error that readers aim to undo.
    """

    def choose(place: Place, inputs: Inputs | None) -> Choice:
        weight = place.reader.weight
        if inputs is None:
            columns = best_columns(weight.square().sum(0), place.levels)
            return Choice(columns, weight[:, columns], weight, fallback=_UNREACHED)
        target = weight.double()
        moment = ridged(shrink(inputs.hessian, shrinkage), damping)
        if inputs.drift is not None and propagate:
            target = shifted(target, moment, propagate * inputs.drift.double())
        columns = obs_columns(target, moment, place.levels)
        return Choice(columns, refitted(target, moment, columns), target)

    return choose


def aligned(damping: float, share: float) -> Align:
    """Fit a matrix to the parent's inputs from those that pruning has left: W (I + s C H⁻¹).

    Args:
        damping: ridge, as a share of the mean of H's diagonal.
        share: s, of what can be told from the inputs that are left.
    """

    def align(weight: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.drift is not None
        target = weight.double()
        lack = share * target @ inputs.drift.double()
        return shifted(target, ridged(inputs.hessian, damping), lack)

    return align


def wanda(place: Place, inputs: Inputs | None, weight: Tensor) -> Tensor:
    """See `wanda_scores`; an expert that no token reached has inputs of size one."""
    del place
    second = torch.ones_like(weight[0]) if inputs is None else inputs.hessian.diagonal() / 2
    return wanda_scores(weight, second)


def flap(place: Place, inputs: Inputs | None, weight: Tensor) -> Tensor:
    """See `flap_scores`; squared for attention, where FLAP ranks heads so."""
    if inputs is None:
        return weight.square().sum(0)
    scores = flap_scores(weight, inputs.hessian.diagonal() / 2, inputs.mean)
    return scores.square() if place.reader.info.role == "o" else scores


def random(seed: int) -> Score:
    """Numbers drawn per reader: what knowing nothing costs."""

    def score(place: Place, _: Inputs | None, weight: Tensor) -> Tensor:
        experts = (place.reader.info.expert or 0) + (place.reader.info.role == "o") * 10**6
        generator = torch.Generator().manual_seed(
            seed * 10**12 + place.block.index * 10**7 + experts
        )
        return torch.rand(weight.shape[1], generator=generator).to(weight)

    return score


LineSums = Callable[[Place, Matrix], tuple[Tensor, Tensor]]
"""Sums over every row [out] and every column [in] of one number per weight of a matrix, fp64."""


def coupled(architecture: Architecture, sums: LineSums) -> Score:
    """Sums over a column of the reader and over the rows that compute the input it reads."""

    def score(place: Place, _: Inputs | None, weight: Tensor) -> Tensor:
        reader = place.reader.info
        total = sums(place, reader)[1]
        for matrix in architecture.block(place.block.index):
            same = matrix.expert == reader.expert
            if same and (rows := _producing(architecture, matrix, reader)) is not None:
                total = total + rows(sums(place, matrix)[0])
        return total.to(weight.device)

    return score


def _producing(
    architecture: Architecture, matrix: Matrix, reader: Matrix
) -> Callable[[Tensor], Tensor] | None:
    """How sums of a producer's rows are laid out over the reader's columns; None if it is none."""
    heads, kv_heads, size = architecture.heads, architecture.kv_heads, architecture.head_dim
    attention = reader.role == "o"

    def shared(rows: Tensor) -> Tensor:
        """Rows of a key-value head, in equal parts to every query head that shares it."""
        parts = rows.view(kv_heads, 1, size) * (kv_heads / heads)
        return parts.expand(kv_heads, heads // kv_heads, size).flatten()

    def fused(rows: Tensor) -> Tensor:
        query, kv = heads * size, kv_heads * size
        return rows[:query] + shared(rows[query : query + kv]) + shared(rows[query + kv :])

    layouts: Mapping[str, Callable[[Tensor], Tensor]] = (
        {"q": lambda rows: rows, "k": shared, "v": shared, "qkv": fused}
        if attention
        else {
            "gate": lambda rows: rows,
            "up": lambda rows: rows,
            "fc_in": lambda rows: rows,
            "gate_up": lambda rows: rows[: len(rows) // 2] + rows[len(rows) // 2 :],
        }
    )
    return layouts.get(matrix.role)


def squares(place: Place, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Sums of squared weights: the magnitude of a unit."""
    values = place.block.matrix(matrix.name).weight.double().square()
    return values.sum(1), values.sum(0)


def sensitivities(
    checkpoint: Path,
    architecture: Architecture,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> LineSums:
    """Sums of |w·∂loss/∂w|: how much removing each weight of a unit moves the loss, to first order.

    Molchanov et al. 2016, arXiv:1611.06440, over coupled weights as in LLM-Pruner. The whole model
    is in memory with its gradients, which are summed over all of the text.
    """
    model = load_model(checkpoint, context.device, context.dtype)
    with context.observer.task("gradients", len(batches)) as task:
        for batch in batches:
            ids = batch.input_ids.to(context.device)
            labels = ids.masked_fill(~batch.mask.to(context.device), -100)[:, 1:]
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            task.advance()
    found = {}
    for matrix in architecture.matrices:
        if matrix.block is not None:
            parameter = model.get_parameter(architecture.module_tensor(matrix.tensor))
            values = (parameter.detach().double() * parameter.grad.double()).abs()
            values = values.T if matrix.transposed_on_disk else values
            found[matrix.name] = (values.sum(1), values.sum(0))
    return lambda _, matrix: found[matrix.name]
