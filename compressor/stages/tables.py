"""Losses of what lies outside the blocks: the embedding, the head, or the one table of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.shards import TORCH_DTYPES
from compressor.formats.sizes import STORED
from compressor.model.backward import Gradients
from compressor.model.matrices import Matrix
from compressor.model.walk import BlockWalk
from compressor.numerics.hessian import HessianAccumulator
from compressor.numerics.sensitivity import (
    head_losses,
    lookup_losses,
    proportional_rows,
    rounding_errors,
    token_shares,
)
from compressor.types import TokenBatch, WeightScheme

_ROWS = 4  # times as many as of other matrices: the vocabulary is long and uneven


@dataclass(frozen=True)
class _Table:
    """A table with rows drawn from it.

    Attributes:
        uses: `embed`, `head` or both.
        schemes: grids to try.
        shares: of tokens, of the rows drawn [rows].
        rows: which were drawn.
        stands_for: how many rows each stands for.
        errors: of the rows on every grid, [rows, in] each.
    """

    uses: tuple[str, ...]
    schemes: tuple[WeightScheme, ...]
    shares: Tensor
    rows: Tensor
    stands_for: Tensor
    errors: tuple[Tensor, ...]

    def total(self, of_rows: Tensor) -> float:
        """The sum over all rows."""
        return float((of_rows * self.stands_for.to(of_rows)).sum())


def table_losses(
    walk: BlockWalk,
    schemes: Mapping[str, Sequence[WeightScheme | None]],
    batches: Sequence[TokenBatch],
    rows: int,
) -> dict[str, list[float]]:
    """Expected divergence, nats per token, of each table on each of its grids; 0 while dense.

    Args:
        walk: after `keep`, with the gradients of what enters block 0.
        schemes: grids by name, without `.weight`; None leaves the table dense.
        batches: text that says how frequent tokens are.
        rows: of other matrices that grids are tried on.
    """
    shares = token_shares(_counts(batches, walk.architecture.vocab)).to(walk.device)
    found = {}
    for matrix in walk.architecture.matrices:
        if matrix.name in schemes:
            grids = tuple(scheme for scheme in schemes[matrix.name] if scheme is not None)
            table = _drawn(walk, matrix, grids, shares, _ROWS * rows)
            losses = iter(_losses(walk, table))
            found[matrix.name] = [
                0.0 if scheme is None else next(losses) for scheme in schemes[matrix.name]
            ]
    return found


def _counts(batches: Sequence[TokenBatch], vocab: int) -> Tensor:
    """How often each token occurs, [vocab]."""
    counts = torch.zeros(vocab, dtype=torch.int64)
    for batch in batches:
        counts += batch.input_ids[batch.mask].cpu().bincount(minlength=vocab)
    return counts


def _drawn(
    walk: BlockWalk, matrix: Matrix, grids: tuple[WeightScheme, ...], shares: Tensor, rows: int
) -> _Table:
    uses = ("embed", "head") if walk.architecture.tied else (matrix.role,)
    weight = walk.tensor(matrix.tensor).to(walk.device)
    energy = weight.float().square().sum(1).double()
    drawn, stands_for = proportional_rows(shares * energy.clamp_min(1e-12), rows)
    dtype = TORCH_DTYPES[STORED[walk.architecture.dtype]]
    errors = tuple(rounding_errors(weight[drawn], grids, dtype))
    return _Table(uses, grids, shares[drawn], drawn, stands_for, errors)


def _losses(walk: BlockWalk, table: _Table) -> list[float]:
    losses = [0.0] * len(table.schemes)
    if "embed" in table.uses:
        moment = _gradient_moment(walk, table.errors[0].shape[1])
        for place, error in enumerate(table.errors):
            losses[place] += table.total(lookup_losses(error, moment, table.shares))
    if "head" in table.uses:
        for place, loss in enumerate(_of_head(walk, table)):
            losses[place] += loss
    return losses


def _gradient_moment(walk: BlockWalk, width: int) -> Tensor:
    """G [width, width] of the gradients of rows that are looked up."""
    moment = HessianAccumulator(width, walk.device)
    gradients = Gradients(walk)
    for batch, gradient in enumerate(gradients.at(0)):
        moment.add(gradients.of_lookups(batch, gradient))
    return moment.matrix() / 2


def _of_head(walk: BlockWalk, table: _Table) -> list[float]:
    """Mean over tokens of what the errors do to the predictions."""
    sums, tokens = [0.0] * len(table.errors), 0
    for inputs, logits in walk.predictions():
        chances = torch.softmax(logits.float(), -1)[:, table.rows]
        for place, error in enumerate(table.errors):
            sums[place] += table.total(head_losses(error, inputs, chances))
        tokens += len(inputs)
    return [of_grid / tokens for of_grid in sums]
