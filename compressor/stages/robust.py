"""Choices of GPTQ that the worst domain decides: damping, propagation, weights of domains.

All are judged on held-out text, six domains of it, that neither calibrates nor evaluates:

1. A few pairs of damping and β are tried on the first blocks of the model, with the other blocks
   as they are, and the one whose worst domain has the lowest KL to the original is taken.
2. Before every block the domains of the calibration text are weighed anew by the χ²-ball rule of
   `numerics.robust`: those on which the rounded model has drifted furthest so far count more.

Both leave notes that are journaled with each block, so that a resumed stage goes on with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet, build_development
from compressor.evaluation.divergence import log_probabilities, rows_per_chunk
from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.files import read_config
from compressor.model.lanes import Lanes
from compressor.model.load import load_tokenizer
from compressor.model.walk import BlockWalk
from compressor.numerics.robust import chi_square_weights, trusted_radius
from compressor.stages.context import StageContext
from compressor.stages.rounding import (
    Job,
    architecture_of,
    lockstep,
    open_walks,
    round_block,
    round_model,
)
from compressor.stages.solving import compensated
from compressor.types import BlockRecord, MixturePoint, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.quantize_gptq import QuantizeGptq

DAMPING, SHARE = "robust.damping", "robust.propagate"
_STANDARD_ERRORS = 3
NATS, WEIGHT, TRIED = "robust.nats.", "robust.weight.", "robust.kl."

Windows = dict[str, list[float]]
"""One number a window, by domain."""

Pair = tuple[float, float]
"""Damping and β."""


def robust_gptq(
    stage: QuantizeGptq, checkpoint: Path, calibration: CalibrationSet, context: StageContext
) -> StageResult:
    """`quantize.gptq` with `robust: true`."""
    architecture = Architecture.from_config(read_config(checkpoint))
    held_out = build_development(load_tokenizer(checkpoint), longest=architecture.max_positions)
    balance = DomainBalance(calibration.tokens, held_out, stage.radius)
    if context.finished:
        balance.take_up(context.finished[-1].notes)
    else:
        balance.begin(choose(stage, checkpoint, calibration.batches, balance, context))
    chosen = stage.model_copy(update=balance.choice)
    records = list(context.finished)

    def block_done(record: BlockRecord) -> None:
        records.append(record)
        context.block_done(record)

    result = round_model(
        chosen,
        compensated(chosen),
        checkpoint,
        calibration.batches,
        replace(context, block_done=block_done),
        sublayers=stage.sequential == "sublayer",
        reference=True,
        balance=balance,
    )
    return replace(result, mixture=_mixture(records), mixture_unit="block")


def _mixture(records: Sequence[BlockRecord]) -> tuple[MixturePoint, ...]:
    """Weights of the domains behind every block."""
    return tuple(
        MixturePoint(
            record.block,
            {n.removeprefix(WEIGHT): w for n, w in record.notes.items() if n.startswith(WEIGHT)},
        )
        for record in records
    )


class DomainBalance:
    """`rounding.Balance`: the χ²-ball rule on the drift of the residual stream.

    Args:
        tokens: calibration tokens by domain; their shares are the centre of the ball.
        held_out: held-out tokens, rows of one domain a batch or mixed.
        radius: of the ball.
    """

    def __init__(
        self, tokens: Mapping[str, int], held_out: Sequence[TokenBatch], radius: float
    ) -> None:
        self.domains = tuple(sorted(tokens))
        total = sum(tokens.values())
        self._base = _fp64([tokens[name] / total for name in self.domains])
        self.batches = tuple(held_out)
        self._radius = radius
        self._weights = self._base
        self._notes: dict[str, float] = {}

    @property
    def ratios(self) -> Mapping[str, float]:
        """q/p by domain."""
        return dict(zip(self.domains, (self._weights / self._base).tolist(), strict=True))

    @property
    def choice(self) -> dict[str, float]:
        """Damping and β that were chosen."""
        return {"damping": self._notes[DAMPING], "propagate": self._notes[SHARE]}

    def begin(self, choice: Choice) -> None:
        """Start with what the search found; its KL by domain gives the first weights."""
        trial = choice.trial
        self._notes = dict(choice.notes)
        for name, drift in _means(trial.drift).items():
            # On its grid already, a model does not drift and no domain differs from another.
            self._notes[NATS + name] = _means(trial.kl)[name] / drift if drift else 1.0
        self._set(trial.kl)

    def take_up(self, notes: Mapping[str, float]) -> None:
        """Go on behind a block with its journaled notes."""
        self._notes = {k: v for k, v in notes.items() if not k.startswith(WEIGHT)}
        self._weights = _fp64([notes[WEIGHT + name] for name in self.domains])

    def settle(self, block: Block, original: Block | None) -> dict[str, float]:
        """Weigh the domains by how far the held-out tokens have drifted; notes for the journal."""
        assert original is not None
        start = len(block.inputs) - len(self.batches)
        drift: Windows = {}
        for place, batch in enumerate(self.batches, start):
            found = relative_drift(original.output(place), block.output(place), batch.mask)
            nats = [self._notes[NATS + domain] for domain in batch.domains]
            _sort_in(drift, batch, (found * torch.tensor(nats).to(found)).tolist())
        self._set(drift)
        weights = dict(zip(self.domains, self._weights.tolist(), strict=True))
        return self._notes | {WEIGHT + name: value for name, value in weights.items()}

    def _set(self, losses: Windows) -> None:
        """Domains without held-out text of their own, such as the user's, keep their share."""
        known = [i for i, name in enumerate(self.domains) if name in losses]
        if len(known) < 2:
            return
        windows = [_fp64(losses[self.domains[i]]) for i in known]
        means = torch.stack([values.mean() for values in windows])
        errors = torch.stack([values.std() / len(values) ** 0.5 for values in windows])
        base = self._base[known]
        radius = trusted_radius(self._radius, means, errors)
        self._weights = self._base.clone()
        self._weights[known] = chi_square_weights(base / base.sum(), means, radius) * base.sum()


def _fp64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _means(windows: Windows) -> dict[str, float]:
    return {domain: sum(values) / len(values) for domain, values in windows.items()}


def relative_drift(original: Tensor, rounded: Tensor, mask: Tensor) -> Tensor:
    """Mean over a window's tokens of ‖x̃ - x‖²/‖x‖², fp64 [windows].

    Args:
        original: X [windows, length, hidden].
        rounded: X̃, the same tokens in the rounded model.
        mask: bool [windows, length].
    """
    lost = (rounded.double() - original.double()).square().sum(-1)
    share = lost / original.double().square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
    valid = mask.to(share)
    return (share * valid).sum(1) / valid.sum(1)


# ---------------------------------------------------------------------- damping and β


@dataclass(frozen=True)
class Trial:
    """What one pair of options did, window by window.

    Attributes:
        kl: to the original model, nats, by domain.
        drift: of the hidden states behind the rounded blocks, by domain; see `relative_drift`.
    """

    kl: Windows
    drift: Windows

    @property
    def worst(self) -> float:
        """KL of the worst domain."""
        return max(_means(self.kl).values())

    def beats(self, other: Trial) -> bool:
        """Whether the other's worst domain gains by more than three standard errors here.

        The windows are the same, so their differences are compared. Three rather than two,
        because several pairs are tried on few windows.
        """
        domain = max(other.kl, key=lambda name: _means(other.kl)[name])
        pairs = zip(other.kl[domain], self.kl[domain], strict=True)
        gains = _fp64([theirs - own for theirs, own in pairs])
        error = float(gains.std() / len(gains) ** 0.5)
        return self.worst < other.worst and float(gains.mean()) > _STANDARD_ERRORS * error


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        notes: the options taken, and the worst domain's KL of every pair tried.
        trial: of the pair taken.
    """

    notes: dict[str, float]
    trial: Trial


def choose(
    stage: QuantizeGptq,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    balance: DomainBalance,
    context: StageContext,
) -> Choice:
    """Try every damping at the recipe's β, then the other β at the best damping.

    The recipe's values stay unless another pair beats them by more than noise.
    """
    bench = _Bench(stage, checkpoint, batches, balance, context)
    dampings, shares = stage.tried
    best = own = (stage.damping, stage.propagate)
    found = bench.trials([(damping, own[1]) for damping in dampings])
    best = _best(found, own)
    found |= bench.trials([(best[0], share) for share in shares if share != own[1]])
    best = _best(found, own)
    notes = {f"{TRIED}damping {d:g}, propagate {s:g}": t.worst for (d, s), t in found.items()}
    return Choice(notes | {DAMPING: best[0], SHARE: best[1]}, found[best])


def _best(found: Mapping[Pair, Trial], own: Pair) -> Pair:
    better = [pair for pair, trial in found.items() if trial.beats(found[own])]
    return min(better, key=lambda pair: found[pair].worst, default=own)


class _Bench:
    """Rounds the first blocks with given options and measures what that does to whole models."""

    def __init__(
        self,
        stage: QuantizeGptq,
        checkpoint: Path,
        batches: Sequence[TokenBatch],
        balance: DomainBalance,
        context: StageContext,
    ) -> None:
        self._stage, self._checkpoint, self._context = stage, checkpoint, context
        # In the parts that the whole model will be rounded with: sums then have the same order.
        self._batches, self._balance = Lanes.parts(batches, context.device), balance
        self._architecture = architecture_of(checkpoint)
        self._prefix = stage.tried_blocks(self._architecture.layers)
        self._scratch = context.scratch / "trial"

    def trials(self, pairs: Sequence[Pair]) -> dict[Pair, Trial]:
        """Round the first blocks with every pair; then one walk measures all of them."""
        with self._context.observer.task("trying options", len(pairs)) as task:
            hidden = []
            for pair in pairs:
                hidden.append(self._behind_prefix(*pair))
                task.advance()
        found = self._measure(hidden)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return dict(zip(pairs, found, strict=True))

    def _behind_prefix(self, damping: float, share: float) -> list[Tensor]:
        """Hidden states of the held-out tokens behind the rounded first blocks, by batch."""
        options = self._stage.model_copy(update={"damping": damping, "propagate": share})
        job = Job(
            self._stage.schemes(self._architecture),
            compensated(options),
            self._batches,
            self._stage.sequential == "sublayer",
            self._balance,
            self._stage.rounded_inputs(self._architecture),
        )
        walks = open_walks(job, self._checkpoint, self._context, self._scratch, reference=share > 0)
        hidden: list[Tensor] = []
        for block, original in islice(lockstep(*walks, 0), self._prefix):
            round_block(job, block, original)
            if block.index + 1 == self._prefix:  # the calibration tokens need not go on
                with torch.no_grad():
                    places = range(len(self._batches), len(block.inputs))
                    hidden = [block.run(place).cpu() for place in places]  # like those of a walk
        return hidden

    def _measure(self, candidates: Sequence[list[Tensor]]) -> list[Trial]:
        """Drift behind the prefix, and KL when all blocks behind it are the original's."""
        walk = BlockWalk(
            self._checkpoint,
            self._balance.batches,
            device=self._context.device,
            dtype=torch.float32,  # a KL of 0.01 would not survive logits in bf16
            scratch=self._scratch / "rest",
            memory_budget=self._context.activation_budget,
        )
        trials = [Trial({}, {}) for _ in candidates]
        for block in walk.blocks():
            if block.index + 1 == self._prefix:
                for trial, hidden in zip(trials, candidates, strict=True):
                    for place, batch in enumerate(walk.batches):
                        drift = relative_drift(block.output(place), hidden[place], batch.mask)
                        _sort_in(trial.drift, batch, drift.tolist())
            if block.index >= self._prefix:
                for hidden in candidates:
                    hidden[:] = [block.run_with(i, rows, {}).cpu() for i, rows in enumerate(hidden)]
        for place, expected in enumerate(walk.final_hidden()):
            for trial, hidden in zip(trials, candidates, strict=True):
                own = walk.finish(place, hidden[place])
                kl = [_divergence(walk, *rows) for rows in zip(expected, own, strict=True)]
                _sort_in(trial.kl, walk.batches[place], kl)
        return trials


def _sort_in(windows: Windows, batch: TokenBatch, values: Sequence[float]) -> None:
    for domain, value in zip(batch.domains, values, strict=True):
        windows.setdefault(domain, []).append(value)


def _divergence(walk: BlockWalk, expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats over the tokens [tokens, width] of a window without padding."""
    rows = rows_per_chunk(walk.architecture.vocab, walk.device)
    total = 0.0
    for base, own in zip(torch.split(expected, rows), torch.split(found, rows), strict=True):
        p, q = (log_probabilities(walk.logits(part)) for part in (base, own))
        total += float((p.exp() * (p - q).nan_to_num_(nan=0.0)).sum(dtype=torch.float64))
    return total / len(expected)
