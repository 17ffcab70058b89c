"""Learned rounding of a whole block: the glue between its live module and `numerics.signround`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.model.block import Block, BlockMatrix
from compressor.numerics.grid import Grid, fit_grid
from compressor.numerics.signround import LearnedRounding, rate_at
from compressor.stages.grids import READ_TEXT
from compressor.stages.moments import Moments
from compressor.stages.rounding import (
    ON_GRID,
    Job,
    RoundBlock,
    Rounded,
    Solve,
    chosen_groups,
    round_block,
)
from compressor.stages.solving import compensated, nearest
from compressor.types import BlockRecord, Fallback, QTensor, WeightScheme

if TYPE_CHECKING:
    from compressor.stages.quantize_autoround import QuantizeAutoround

_NEVER = "learning never lowered the error of its block"
# Root mean square of the gradients of a block's output. In fp16 a thousandth of it is a normal
# number still, and ten thousand times as much, which sums over tokens can reach, is finite.
_GRADIENT = 2.0**-4
_KEPT = {"nearest": "rounded to nearest", "gptq": "the codes of GPTQ stay"}


def learned(options: QuantizeAutoround) -> RoundBlock:
    """Round a block by learning; the outputs of the parent's are the aim."""

    def rounds(
        job: Job, block: Block, original: Block | None
    ) -> tuple[dict[str, QTensor], BlockRecord]:
        assert original is not None
        groups = chosen_groups(block.matrices, job.schemes)
        chosen = [matrix for members in groups.values() for matrix in members]
        if not chosen:
            return round_block(job, block, None)
        start, begun = "nearest", dict[str, QTensor]()
        fallbacks: tuple[Fallback, ...] = ()
        if options.grid == "gptq":
            start, (begun, fallbacks) = "gptq", _compensated(job, block, original, chosen)
        elif options.grid in READ_TEXT:
            first = replace(job, solve=nearest(options.grid))
            begun, fallbacks = _begun(first, block, None, chosen)
        roundings = {
            matrix.info.name: _begin(job, matrix, block, options, begun) for matrix in chosen
        }
        outcome = _Bench(job, block, original, roundings).learn(options)
        in_turn = replace(job, solve=_in_turn(roundings), together=False)
        codes, record = round_block(in_turn, block, None)
        if not outcome.improved:
            fallbacks += tuple(Fallback(name, _NEVER, _KEPT[start]) for name in roundings)
        notes = {
            f"block_loss.{block.index:03d}": outcome.best,
            f"block_loss_{start}.{block.index:03d}": outcome.first,
        }
        return codes, replace(record, fallbacks=record.fallbacks + fallbacks, notes=notes)

    return rounds


def _compensated(
    job: Job, block: Block, original: Block, chosen: Sequence[BlockMatrix]
) -> tuple[dict[str, QTensor], tuple[Fallback, ...]]:
    """The codes that GPTQ gives the block with its defaults."""
    from compressor.stages.quantize_gptq import QuantizeGptq

    first = replace(job, solve=compensated(QuantizeGptq()), sublayers=True)
    return _begun(first, block, original, chosen)


def _begun(
    first: Job, block: Block, original: Block | None, chosen: Sequence[BlockMatrix]
) -> tuple[dict[str, QTensor], tuple[Fallback, ...]]:
    """The codes that another rounder gives the block, whose weights are as they were."""
    before = {matrix.info.name: matrix.weight for matrix in chosen}
    codes, record = round_block(first, block, original)
    for matrix in chosen:
        matrix.set_weight(before[matrix.info.name])
    return codes, tuple(known for known in record.fallbacks if known.reason != ON_GRID[0])


def _begin(
    job: Job,
    matrix: BlockMatrix,
    block: Block,
    options: QuantizeAutoround,
    begun: Mapping[str, QTensor],
) -> LearnedRounding:
    """At the grid that is there already, and GPTQ's codes, or at the nearest."""
    scheme, weight = job.schemes[matrix.info.name], matrix.weight.float()
    if matrix.info.name in begun:
        found = begun[matrix.info.name]
        codes = found.codes if options.grid == "gptq" else None
        return LearnedRounding(weight, Grid.of(found), scheme, codes)
    assert options.grid in ("minmax", "mse")
    dtype = block.tensor(matrix.info.tensor).dtype
    grid = fit_grid(weight, scheme, search=options.grid, scale_dtype=dtype)
    return LearnedRounding(weight, grid, scheme)


def _in_turn(roundings: Mapping[str, LearnedRounding]) -> Solve:
    """Hands out what was learned, in the order in which `round_block` asks for it."""
    waiting = iter(roundings.values())

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        del schemes, moments, dtype
        return [Rounded(rounding.quantized()) for rounding in islice(waiting, len(weights))]

    return solve


@dataclass(frozen=True)
class Outcome:
    """Errors of a block's output as shares of its energy: plain rounding, and the best state."""

    first: float
    best: float

    @property
    def improved(self) -> bool:
        """Whether learning found anything better."""
        return self.best < self.first


class _Bench:
    """A block whose rounding is learned, with the inputs it will see and the outputs to match."""

    def __init__(
        self,
        job: Job,
        block: Block,
        original: Block,
        roundings: Mapping[str, LearnedRounding],
    ) -> None:
        self._batches, self._block, self._original = len(job.batches), block, original
        self._roundings = roundings

    def learn(self, options: QuantizeAutoround) -> Outcome:
        """Leave the roundings in the state with the lowest error on all calibration tokens."""
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self._block.index)
        first = best = self._error()
        kept = self._state()
        checks = _checkpoints(options.steps, options.checks)
        for step in range(options.steps):
            place = int(torch.randint(self._batches, (1,), generator=generator))
            self._loss(place).backward()  # type: ignore[no-untyped-call]
            for rounding in self._roundings.values():
                rounding.step(rate_at(step, options.steps, options.first_rate))
            if step + 1 in checks and (error := self._error()) < best:
                best, kept = error, self._state()
        for name, rounding in self._roundings.items():
            rounding.restore(kept[name])
        return Outcome(first, best)

    def _state(self) -> dict[str, Sequence[Tensor]]:
        return {name: rounding.state() for name, rounding in self._roundings.items()}

    def _loss(self, place: int) -> Tensor:
        """Squared error of one batch's output, in a scale in which fp16 holds its gradients.

        Nothing but their signs is used.
        """
        weights = {name: rounding.dense() for name, rounding in self._roundings.items()}
        output = self._block.run_through(place, weights)
        wanted = self._original.output(place).to(output)
        lost = self._block.valid(place, output).float() - self._block.valid(place, wanted).float()
        size = lost.detach().square().mean().sqrt().clamp_min(torch.finfo(lost.dtype).tiny)
        return lost.square().sum() * (_GRADIENT / 2 / size)

    def _error(self) -> float:
        """Share of the original output's energy that is lost, over all calibration tokens."""
        lost = total = 0.0
        with torch.no_grad():
            weights = {name: rounding.dense() for name, rounding in self._roundings.items()}
            for place in range(self._batches):
                output = self._block.valid(place, self._block.run_through(place, weights))
                wanted = self._block.valid(place, self._original.output(place)).to(output)
                lost += (output - wanted).double().square().sum().item()
                total += wanted.double().square().sum().item()
        return lost / total if total else 0.0


def _checkpoints(steps: int, checks: int) -> frozenset[int]:
    """Steps after which the whole text is measured; the last one always."""
    return frozenset(-(-steps * (i + 1) // checks) for i in range(checks))
