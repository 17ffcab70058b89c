"""Learned gates on the units of a live model, and the smaller model that fixed gates leave.

Gates multiply what enters the readers of units (the output matrix of attention, the second matrix
of a feed-forward half) and what both halves of a block put out. A gate at 0 computes the same as a
model without the unit, so that cutting it out changes nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_tokenizer
from compressor.model.shape import Shape, resized, shape_of
from compressor.model.surgery import BlockKeep, PruningPlan, cut_block, moved, pruned_config
from compressor.numerics.gates import BOUND, expected, hard, kept_probability, lagrangian, sampled
from compressor.stages.context import StageContext
from compressor.stages.distilling import (
    Judge,
    Part,
    accumulated,
    distance,
    facts,
    held_out,
    learned,
    make_sampler,
    pair,
    parts,
    sampling_notes,
    schedule,
    spread,
    too_late,
    trainable,
    training_rows,
)
from compressor.stages.pruning import size_notes
from compressor.stages.sampling import Rows, Sampler, Source
from compressor.team import ALONE, Team
from compressor.training import Fit, Group, fit
from compressor.types import Fallback, StageResult

if TYPE_CHECKING:
    from compressor.stages.prune_dro import PruneDro

_DOWN = ("down", "fc_out")
_STIFFNESS = 10.0  # λ₂ at first: a share that is off by a tenth costs 0.1 nats
_LEAST = 0.0  # parameter at which the unit that is worth least begins
_FISHER_WINDOWS = 48
_SLOWNESS = 0.1  # rate of the multipliers over that of the gates, or both swing about the target
_STREAM = 0x9E3779B9  # keeps draws of gates apart from those of text


def prune_with_masks(
    stage: PruneDro, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
) -> StageResult:
    """Learn gates and weights, fix the gates, and write what is left.

    Args:
        stage: how.
        checkpoint: the model; also the teacher where the context names no original.
        calibration: text to train on, unless the stage names its own.
        context: where to work and whom to tell.

    Raises:
        ModelError: the original has another vocabulary.
        TextError: there is no text, or too little.
        NumericalError: a loss is not finite; the same command goes on from the last checkpoint.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    rows = training_rows(stage, tokenizer, calibration)
    original = context.original or checkpoint
    teacher, student = pair(original, checkpoint, context, stage.checkpointing)
    spread(context, teacher, student)
    gates = Gates(
        student, architecture, stage.target(architecture), tuple(stage.kinds(architecture))
    )
    if stage.start == "fisher":
        gates.begin(fisher(student, gates, rows, stage.seed, context.team))
    judge = Judge(teacher, student, held_out(tokenizer, student, rows), context.team)

    def measure() -> dict[str, Tensor]:
        gates.measure()
        return judge.measure()

    sampler = make_sampler(stage, rows, Source(measure, gates.kept), context)
    trained = _train(stage, teacher, student, gates, rows, sampler, context)
    late = () if gates.fixed else (_late(stage, trained),)
    gates.fix()
    sampler.finish(trained.steps)
    weights = learned(student, context.team)
    if not context.team.leads:
        return StageResult(context.folder, changed=())
    result = write_pruned(checkpoint, architecture, gates, weights, context.folder)
    return replace(
        result,
        notes=result.notes | sampling_notes(sampler) | facts(trained, rows, context.team),
        mixture=sampler.mixture(),
        fallbacks=(
            *sampler.fallbacks(stage.method),
            *too_late(stage, trained, rows),
            *late,
        ),
    )


def _late(stage: PruneDro, trained: Fit) -> Fallback:
    return Fallback(
        stage.method,
        f"training ended after {trained.steps} updates, before gates were fixed",
        "they were fixed at the end, with no updates after",
    )


def _train(
    stage: PruneDro,
    teacher: Any,
    student: Any,
    gates: Gates,
    rows: Rows,
    sampler: Sampler,
    context: StageContext,
) -> Fit:
    steps = stage.updates(rows.mean_length)
    opening = max(1, round(steps * (1 - stage.settle)))
    rise, slow = max(1.0, stage.ramp * opening), _SLOWNESS * stage.mask_rate

    def penalised(part: Part, step: int) -> Tensor:
        """The distance, and what the targets ask for; gates are drawn alike for all parts."""
        penalty = gates.draw(stage.seed, step, min(1.0, step / rise)) if step < opening else 0.0
        return distance(stage, teacher, student, part) + penalty / context.team.size

    def loss(step: int) -> Tensor:
        gates.bound()
        if step >= opening:
            gates.fix()
        drawn = parts(stage, rows, sampler.shares(step), step, context.team)
        return accumulated(drawn, lambda part: penalised(part, step))

    return fit(
        trainable(student),
        loss,
        schedule(stage, steps),
        context.scratch,
        context.observer,
        "pruning and distilling",
        beside=(
            Group(gates.named("logits", gates.logits), stage.mask_rate),
            Group(gates.named("multipliers", gates.multipliers), slow, maximize=True),
        ),
        team=context.team,
    )


def fisher(
    student: Any, gates: Gates, rows: Rows, seed: int, team: Team = ALONE
) -> dict[str, Tensor]:
    """What units are worth, by kind: E (∂ loss / ∂ gate)² with gates open.

    The diagonal of the Fisher information (Kwon et al. 2022, "A Fast Post-Training Pruning
    Framework for Transformers", arXiv:2204.09656). The distance to the original would not do: where
    the model still is the original, its gradient is 0.
    """
    found = {kind: torch.zeros_like(logits) for kind, logits in gates.logits.items()}
    chosen = rows.draw(rows.shares, _FISHER_WINDOWS, seed, 2**31)
    for turn, kept in team.turns(len(chosen)):
        values = gates.trial()
        ids = rows.batch([chosen[turn]]).input_ids.to(next(student.parameters()).device)
        logits = student(ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        gradients = torch.autograd.grad(loss, list(values.values()))
        for kind, gradient in zip(values, gradients, strict=True):
            found[kind] += kept * gradient.square()
    return {kind: team.add(worth) for kind, worth in found.items()}


class Gates:
    """Gates of a live model; hooks apply those that were set last.

    Args:
        student: the model as the library loads it.
        architecture: its map.
        target: sizes that are left.
        kinds: sizes that have gates: `layers`, `kv_heads`, `heads` (those of one key-value head)
            and `channels`.

    Attributes:
        logits: parameters by kind, fp32 [rows, units].
        multipliers: λ₁ and λ₂ by kind, fp32 [2].
        fixed: whether gates are 0 or 1 for good.
    """

    def __init__(
        self, student: Any, architecture: Architecture, target: Shape, kinds: tuple[str, ...]
    ) -> None:
        now, device = shape_of(architecture), next(student.parameters()).device
        shared = now.heads // now.kv_heads
        shapes = {
            "layers": (1, now.layers),
            "kv_heads": (now.layers, now.kv_heads),
            "heads": (now.layers * now.kv_heads, shared),
            "channels": (now.layers, now.channels),
        }
        self._keep = {
            "layers": target.layers,
            "kv_heads": target.kv_heads,
            "heads": target.heads // target.kv_heads,
            "channels": target.channels,
        }
        self.target, self._architecture = target, architecture
        self.logits = {k: torch.full(shapes[k], BOUND, device=device) for k in kinds}
        self.multipliers = {k: torch.tensor([0.0, _STIFFNESS], device=device) for k in kinds}
        for tensor in (*self.logits.values(), *self.multipliers.values()):
            tensor.requires_grad_(True)
        self.fixed = False
        self._first = dict.fromkeys(kinds, float(1 - kept_probability(torch.tensor(BOUND))))
        self._open = {k: torch.ones(shape, device=device) for k, shape in shapes.items()}
        self._values: Mapping[str, Tensor] = self._open
        after = resized(architecture, target).parameters
        self._goes = 1 - after / architecture.parameters
        self._hook(student)

    @torch.no_grad()
    def begin(self, worth: Mapping[str, Tensor]) -> None:
        """Spread parameters by what units are worth, within every row.

        Args:
            worth: by kind, as `logits`.
        """
        for kind, logits in self.logits.items():
            units = logits.shape[-1]
            place = worth[kind].argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
            logits.copy_(_LEAST + (BOUND - _LEAST) * place / (units - 1))
            self._first[kind] = float(1 - kept_probability(logits).mean())

    def trial(self) -> dict[str, Tensor]:
        """Set gates that are open and take gradients, by kind."""
        values = {kind: torch.ones_like(logits) for kind, logits in self.logits.items()}
        self._values = self._open | {k: value.requires_grad_(True) for k, value in values.items()}
        return values

    def named(self, what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names for the training checkpoint."""
        return {f"gates.{what}.{kind}": tensor for kind, tensor in tensors.items()}

    @torch.no_grad()
    def bound(self) -> None:
        """Keep parameters where gates can still be moved."""
        for tensor in self.logits.values():
            tensor.clamp_(-BOUND, BOUND)

    def draw(self, seed: int, step: int, progress: float) -> Tensor:
        """Set random gates, the same for the same seed and step; the Lagrangian's value.

        Args:
            progress: share of the targets that is asked for now.
        """
        generator = torch.Generator().manual_seed((seed * 2**32 + step) ^ _STREAM)
        penalty, drawn = torch.zeros(()), {}
        for kind, logits in self.logits.items():
            uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            drawn[kind] = sampled(logits, uniform.to(logits))
            first = self._first[kind]
            asked = first + progress * (self._closing(kind) - first)
            penalty = penalty.to(logits) + lagrangian(logits, asked, self.multipliers[kind])
        self._values = self._open | drawn
        return penalty

    def _closing(self, kind: str) -> float:
        """Share of a kind's gates that is to close."""
        return 1 - self._keep[kind] / self.logits[kind].shape[-1]

    @torch.no_grad()
    def measure(self) -> None:
        """Set the gates that a measurement sees: soft ones until they are fixed."""
        if not self.fixed:
            soft = {
                kind: expected(logits.clamp(-BOUND, BOUND)) for kind, logits in self.logits.items()
            }
            self._values = self._open | soft

    @torch.no_grad()
    def fix(self) -> None:
        """Set gates to 0 and 1 for good, as many of each as the target says."""
        if not self.fixed:
            found = {kind: hard(logits, self._keep[kind]) for kind, logits in self.logits.items()}
            self._values, self.fixed = self._open | found, True

    @torch.no_grad()
    def kept(self) -> float:
        """Share of the parameters that is left, by how near every kind of gate is to its goal."""
        if self.fixed:
            return 1 - self._goes
        near = [
            min(1.0, float(1 - kept_probability(logits).mean()) / self._closing(kind))
            for kind, logits in self.logits.items()
        ]
        return 1 - self._goes * sum(near) / len(near)

    def plan(self) -> PruningPlan:
        """What stays, by fixed gates."""
        layers = _kept(self._values["layers"][0])
        return PruningPlan(layers, {layer: self._block(layer) for layer in layers})

    def _block(self, layer: int) -> BlockKeep:
        kv_heads = _kept(self._values["kv_heads"][layer])
        keep = BlockKeep()
        if {"kv_heads", "heads"} & set(self.logits):
            keep = replace(keep, kv_heads=kv_heads, heads=_kept(self._heads(layer).flatten()))
        if "channels" in self.logits:
            keep = replace(keep, channels={None: _kept(self._values["channels"][layer])})
        return keep

    def _heads(self, layer: int) -> Tensor:
        """Gates of a block's query heads [key-value heads, heads of each]."""
        groups = self._values["kv_heads"].shape[-1]
        own = self._values["heads"][layer * groups : (layer + 1) * groups]
        return self._values["kv_heads"][layer][:, None] * own

    def _hook(self, student: Any) -> None:
        """Only on what has gates."""
        architecture, kinds = self._architecture, set(self.logits)
        for matrix in architecture.matrices:
            if matrix.block is None or matrix.role not in ("o", *_DOWN):
                continue
            name = architecture.module_tensor(matrix.tensor).removesuffix(".weight")
            module, attention = student.get_submodule(name), matrix.role == "o"
            if (kinds & {"kv_heads", "heads"}) if attention else "channels" in kinds:
                module.register_forward_pre_hook(self._before(matrix.block, attention))
            if "layers" in kinds:
                module.register_forward_hook(self._after(matrix.block))

    def _before(self, layer: int, attention: bool) -> Any:
        def multiply(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if attention:
                size = self._architecture.head_dim
                gates = self._heads(layer).flatten().repeat_interleave(size)
            else:
                gates = self._values["channels"][layer]
            return (inputs[0] * gates.to(inputs[0]), *inputs[1:])

        return multiply

    def _after(self, layer: int) -> Any:
        def multiply(_: Any, __: Any, output: Tensor) -> Tensor:
            return output * self._values["layers"][0, layer].to(output)

        return multiply


def _kept(gates: Tensor) -> list[int]:
    places: list[int] = gates.nonzero()[:, 0].tolist()
    return places


def write_pruned(
    checkpoint: Path,
    architecture: Architecture,
    gates: Gates,
    weights: Mapping[str, Tensor],
    folder: Path,
) -> StageResult:
    """Trained weights without the units whose gates are closed, in the dtypes on disk.

    Args:
        checkpoint: the parent.
        architecture: of the parent.
        gates: fixed ones.
        weights: of the trained model, by the library's names.
        folder: where the smaller checkpoint goes.
    """
    plan, smaller = gates.plan(), resized(architecture, gates.target)
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(folder)
    path = f"{architecture.blocks_path}."
    origin, changed, cut = {}, set(), set()

    def take(names: Iterable[str], old: int | None, new: int | None) -> dict[str, Tensor]:
        """Tensors of a block, or of none, under their new names."""
        before = {name: reader[name] for name in names}
        after = {name: _trained(architecture, weights, name, before[name]) for name in before}
        if old is not None:
            keep = plan.blocks[old]
            before, after = (cut_block(architecture, old, keep, both) for both in (before, after))
        found = {}
        for name, tensor in after.items():
            here = name if new is None else moved(architecture, name, new)
            found[here], origin[here] = tensor, name
            if not torch.equal(tensor, before[name]):
                changed.add(here)
            if tuple(tensor.shape) != reader.shape(name):
                cut.add(here)
        return found

    for new, old in enumerate(plan.layers):
        names = [name for name in reader if name.startswith(f"{path}{old}.")]
        writer.write_shard(shard_name(new), take(names, old, new))
    outside = take([name for name in reader if not name.startswith(path)], None, None)
    writer.write_shard(shard_name("outside"), outside)
    config = pruned_config(checkpoint, architecture, gates.target, plan.layers)
    writer.finish(config, checkpoint, smaller.parameters)
    return StageResult(
        checkpoint=folder,
        changed=tuple(sorted(changed)),
        removed=tuple(sorted(set(reader) - set(origin.values()))),
        resized=tuple(sorted(cut)),
        renamed={here: name for here, name in origin.items() if here != name},
        notes=size_notes(architecture, smaller),
    )


def _trained(
    architecture: Architecture, weights: Mapping[str, Tensor], name: str, before: Tensor
) -> Tensor:
    """A tensor of the student in the dtype on disk; what it does not learn stays."""
    weight = weights.get(architecture.module_tensor(name))
    return before if weight is None else weight.cpu().to(before.dtype)
