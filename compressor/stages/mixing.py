"""Drop blocks and narrow the others in one stage; try several sizes and keep the best.

What a trial found is on disk before the next one begins, so that an interrupted search goes on with
the next mix, and the final pass at its next block.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.calibration import build_development
from compressor.formats.atomic import atomic_write_json
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer
from compressor.model.shape import Shape, resized, shape_of
from compressor.model.walk import BlockWalk
from compressor.numerics.robust import chi_square_weights, trusted_radius
from compressor.stages.context import StageContext
from compressor.stages.depth import greedy, one_shot, spread_rows, write_layers
from compressor.stages.prune_depth import PruneDepth
from compressor.stages.pruning import Job, domains_of, prune_widths, size_notes
from compressor.stages.unit_choice import aligned, compensated
from compressor.types import MixturePoint, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.prune_obs import PruneObs
    from compressor.stages.prune_search import PruneSearch

_ALIGN_DAMPING = 0.1  # what norms put out is narrower and better conditioned than what readers see
_HELD = 2  # windows of every domain that a mix is judged on


@dataclass(frozen=True)
class Mix:
    """A size with the blocks that stay for it.

    Attributes:
        shape: sizes that are left.
        layers: the parent's blocks that stay, ascending.
        damping, shrinkage, propagate, align: of the least squares; see `prune.obs`.
        weights: of domains in second moments; None counts tokens.
    """

    shape: Shape
    layers: tuple[int, ...]
    damping: float
    shrinkage: float
    propagate: float
    align: float
    weights: Mapping[str, float] | None = None


def search(
    stage: PruneSearch, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Try every mix of the stage on some of the text, and do the best on all of it.

    Args:
        stage: says which mixes, and what decides.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    shapes = stage.mixes(architecture)
    order = _dropping_order(stage, shapes, checkpoint, batches, context)
    mixes = [
        Mix(
            shape,
            tuple(
                sorted(
                    set(range(architecture.layers))
                    - set(order[: architecture.layers - shape.layers])
                )
            ),
            stage.damping,
            stage.shrinkage,
            stage.propagate,
            stage.align,
        )
        for shape in shapes
    ]
    if len(mixes) == 1:
        return prune_mix(mixes[0], checkpoint, batches, context)
    found = _tried(stage, mixes, checkpoint, batches, context)
    scores = [_score(stage, distances) for distances in found]
    best = min(range(len(mixes)), key=lambda number: (scores[number], number))
    result = prune_mix(mixes[best], checkpoint, batches, context)
    tried = (
        f"{s.layers} blocks, {s.heads}/{s.kv_heads} heads, {s.channels} channels" for s in shapes
    )
    notes = {f"held-out KL, {mix}": score for mix, score in zip(tried, scores, strict=True)}
    return replace(result, notes=result.notes | notes)


def _score(stage: PruneSearch, distances: Mapping[str, float]) -> float:
    values = list(distances.values())
    return max(values) if stage.objective == "worst" else sum(values) / len(values)


def _dropping_order(
    stage: PruneSearch,
    shapes: Sequence[Shape],
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> list[int]:
    """The blocks that go first to last, as many as any mix loses."""
    layers = Architecture.from_config(read_config(checkpoint)).layers
    most = layers - min(shape.layers for shape in shapes)
    if not most:
        return []
    choose = greedy if stage.order == "greedy" else one_shot
    return choose(PruneDepth(layers=layers - most), most, checkpoint, batches, context).blocks


def _tried(
    stage: PruneSearch,
    mixes: Sequence[Mix],
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> list[dict[str, float]]:
    """KL to the parent in nats per token by domain, for every mix."""
    progress = context.scratch / "trials.json"
    found: list[dict[str, float]] = json.loads(progress.read_text()) if progress.is_file() else []
    rows = spread_rows(batches, stage.trial_tokens)
    with context.observer.task("trying mixes", len(mixes)) as task:
        task.advance(len(found))
        held = Held(checkpoint, context)
        for mix in mixes[len(found) :]:
            found.append(held.trial(mix, rows)["mean"])
            atomic_write_json(progress, found)
            task.advance()
    return found


def prune_robustly(
    stage: PruneObs,
    shape: Shape,
    checkpoint: Path,
    batches: Sequence[TokenBatch],
    context: StageContext,
) -> StageResult:
    """Prune with weights of domains in second moments that protect the worst domain.

    Round by round, the model pruned with the present weights is measured on development text, and
    the weights lean from the text's own shares towards the domains that are farthest from the
    parent, in the χ² ball of DRPruning (arXiv:2411.14055) that noise leaves. The round whose worst
    domain is nearest decides; the first is the plain one.

    Args:
        stage: rounds, radius and the least squares.
        shape: sizes that are left.
        checkpoint: the parent.
        batches: calibration tokens.
        context: where to work and whom to tell.
    """
    layers = tuple(range(Architecture.from_config(read_config(checkpoint)).layers))
    names = domains_of(batches)
    base = _shares(batches)
    rows = spread_rows(batches, stage.trial_tokens)
    progress = context.scratch / "rounds.json"
    rounds: list[dict[str, dict[str, float]]] = (
        json.loads(progress.read_text()) if progress.is_file() else []
    )
    held = Held(checkpoint, context) if len(rounds) < stage.rounds else None
    weights = base
    with context.observer.task("weighing domains", stage.rounds) as task:
        for number in range(stage.rounds):
            if number == len(rounds):
                assert held is not None
                shares = dict(zip(names, weights.tolist(), strict=True))
                rounds.append(
                    {"weights": shares} | held.trial(stage.mix(shape, layers, shares), rows)
                )
                atomic_write_json(progress, rounds)
            weights = _leaning(base, rounds[number], names, stage.radius)
            task.advance()
    worst = [max(found["mean"].get(name, 0.0) for name in names) for found in rounds]
    best = min(range(len(rounds)), key=lambda number: (worst[number], number))
    mix = stage.mix(shape, layers, rounds[best]["weights"])
    result = prune_mix(mix, checkpoint, batches, context)
    notes = {f"worst held-out KL, round {number}": kl for number, kl in enumerate(worst, 1)}
    notes |= {f"weight of {name}": share for name, share in rounds[best]["weights"].items()}
    mixture = tuple(
        MixturePoint(number, found["weights"], found["mean"])
        for number, found in enumerate(rounds, 1)
    )
    return replace(result, notes=result.notes | notes, mixture=mixture, mixture_unit="round")


def _shares(batches: Sequence[TokenBatch]) -> Tensor:
    """Share of every domain, sorted by name, in the tokens; fp64."""
    names = domains_of(batches)
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        for domain, mask in zip(batch.domains, batch.mask, strict=True):
            counts[domain] += int(mask.sum())
    tokens = torch.tensor([counts[name] for name in names]).double()
    return tokens / tokens.sum()


def _leaning(
    base: Tensor, found: Mapping[str, Mapping[str, float]], names: Sequence[str], radius: float
) -> Tensor:
    """Shares for the next round; the user's own text has no development text to lean by."""
    if any(name not in found["mean"] for name in names):
        return base
    means, errors = (torch.tensor([found[k][n] for n in names]).double() for k in ("mean", "error"))
    return chi_square_weights(base, means, trusted_radius(radius, means, errors))


def prune_mix(
    mix: Mix, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """Drop the blocks of a mix and narrow the others.

    Args:
        mix: what stays.
        checkpoint: the parent.
        batches: calibration tokens.
        context: where to work and whom to tell.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    whole = len(mix.layers) == architecture.layers
    shallow, shorter = checkpoint, None
    if not whole:
        shape = replace(shape_of(architecture), layers=len(mix.layers))
        shallow = context.scratch / "shallow"
        inner = replace(context, folder=shallow, finished=(), block_done=lambda _: None)
        shorter = write_layers(checkpoint, architecture, shape, mix.layers, inner, {})
    beside = architecture.prenorm and (mix.propagate > 0 or mix.align > 0)
    parent = checkpoint if beside else None
    job = Job(
        mix.shape,
        compensated(mix.damping, mix.shrinkage, mix.propagate),
        batches,
        refits=True,
        parent=parent,
        undoes=mix.propagate > 0,
        layers=None if whole else mix.layers,
        domain_weights=mix.weights,
        align=aligned(_ALIGN_DAMPING, mix.align) if mix.align > 0 else None,
    )
    result = prune_widths(job, shallow, context)
    if shorter is None:
        return result
    notes = size_notes(architecture, resized(architecture, mix.shape))
    gone = sorted(set(range(architecture.layers)) - set(mix.layers))
    notes |= {f"block dropped, {number}": float(block) for number, block in enumerate(gone, 1)}
    return replace(result, removed=shorter.removed, renamed=shorter.renamed, notes=notes)


class Held:
    """Development text, and what the parent predicts on it.

    Args:
        checkpoint: the parent.
        context: device, precision and scratch folder.
    """

    def __init__(self, checkpoint: Path, context: StageContext) -> None:
        self._checkpoint, self._context = checkpoint, context
        longest = Architecture.from_config(read_config(checkpoint)).max_positions
        self.batches = [
            TokenBatch(batch.input_ids[:_HELD], batch.mask[:_HELD], batch.domains[:_HELD])
            for batch in build_development(load_tokenizer(checkpoint), longest=longest)
        ]
        self._parent, self._states = self._run(checkpoint)

    def trial(self, mix: Mix, batches: Sequence[TokenBatch]) -> dict[str, dict[str, float]]:
        """`distances` of the model that a mix makes on these tokens, which is not kept."""
        folder = self._context.scratch / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        context = replace(
            self._context,
            folder=folder / "checkpoint",
            scratch=folder / "scratch",
            finished=(),
            block_done=lambda _: None,
        )
        result = prune_mix(mix, self._checkpoint, batches, context)
        found = self.distances(result.checkpoint)
        shutil.rmtree(folder)
        return found

    def distances(self, checkpoint: Path) -> dict[str, dict[str, float]]:
        """KL to the parent in nats per token by domain: `mean`, and `error`, that of the mean."""
        walk, states = self._run(checkpoint)
        found: dict[str, dict[str, float]] = {"mean": {}, "error": {}}
        for batch, expected, other in zip(self.batches, self._states, states, strict=True):
            values = []
            for row, valid in enumerate(batch.mask):
                p = torch.log_softmax(
                    self._parent.logits(expected[row : row + 1, valid]).double(), -1
                )
                q = torch.log_softmax(walk.logits(other[row : row + 1, valid]).double(), -1)
                values.append(float((p.exp() * (p - q)).sum(-1).mean()))
            windows = torch.tensor(values).double()
            error = float(windows.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
            found["mean"][batch.domains[0]] = float(windows.mean())
            found["error"][batch.domains[0]] = error
        return found

    def _run(self, checkpoint: Path) -> tuple[BlockWalk, list[Tensor]]:
        """The model, and what enters its head."""
        walk = self._context.walk(checkpoint, self.batches, dtype=torch.float32, folder="held")
        for block in walk.blocks():
            block.forward()
        return walk, list(walk.final_hidden())
