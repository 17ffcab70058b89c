"""Train a student to predict what its teacher predicts, and write it like its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.calibration import CalibrationSet, build_batches, build_development
from compressor.errors import ModelError, TextError
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.precision import trains_in_half
from compressor.numerics.recovery import hidden_distance, logit_divergence
from compressor.stages.adapters import adapt, merged
from compressor.stages.base import in_seconds
from compressor.stages.context import StageContext
from compressor.stages.sampling import Leaning, Rows, Sampler, Source
from compressor.team import ALONE, Team
from compressor.training import Fit, Schedule, cut_short, fit
from compressor.types import Fallback, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.recover_distill import RecoverDistill
    from compressor.stages.train_base import TrainConfig

_WARMUP = 0.05
_CLIP = 1.0
_EVERY = 50  # updates between two checkpoints of training
_HELD = 8  # windows of every domain that a student is measured on


def distill(
    stage: RecoverDistill,
    checkpoint: Path,
    calibration: CalibrationSet | None,
    context: StageContext,
) -> StageResult:
    """Train and write.

    Args:
        stage: how.
        checkpoint: the student.
        calibration: text to train on, unless the stage names its own.
        context: where to work; `original` is the teacher.

    Raises:
        ModelError: there is no teacher, or it has another vocabulary.
        TextError: there is no text.
        NumericalError: the loss is not finite.
    """
    tokenizer = load_tokenizer(checkpoint)
    teacher, student = pair(context.original, checkpoint, context, stage.checkpointing)
    _require_comparable(stage, teacher, student)
    if stage.adapters:
        adapt(student, architecture_of(student), stage.adapters, stage.seed)
    spread(context, teacher, student)
    rows = training_rows(stage, tokenizer, calibration)
    judge = Judge(teacher, student, held_out(tokenizer, student, rows), context.team)
    sampler = make_sampler(stage, rows, Source(judge.measure), context)
    trained = _train(stage, teacher, student, rows, sampler, context)
    sampler.finish(trained.steps)
    weights = learned(student, context.team)
    if not context.team.leads:
        return StageResult(context.folder, changed=())
    result = _write(checkpoint, weights, context)
    return replace(
        result,
        notes=sampling_notes(sampler) | facts(trained, rows, context.team),
        mixture=sampler.mixture(),
        fallbacks=(*sampler.fallbacks(stage.method), *too_late(stage, trained, rows)),
    )


def _require_comparable(stage: RecoverDistill, teacher: Any, student: Any) -> None:
    widths = [model.config.hidden_size for model in (teacher, student)]
    if stage.hidden_states and widths[0] != widths[1]:
        raise ModelError(
            f"`hidden_states` compares states of one width, and the original has {widths[0]} "
            f"channels where the model has {widths[1]}",
            "leave it out behind prune.hidden",
        )


def training_rows(stage: TrainConfig, tokenizer: Any, calibration: CalibrationSet | None) -> Rows:
    """The text to train on.

    Raises:
        TextError: there is none, or not enough of a domain.
    """
    text = calibration if stage.mix is None else build_batches(stage.text(), tokenizer)
    if text is None:
        raise TextError(f"{stage.method} has no text to train on", "name a `mix`")
    rows = Rows(text.batches)
    for _, message, hint in stage.repeat_faults(rows.counts, stage.updates(rows.mean_length)):
        raise TextError(message, hint)
    return rows


def leaning(stage: TrainConfig) -> Leaning:
    """How a stage's sampler leans."""
    options = (stage.sampler, stage.radius, stage.reference, stage.drift)
    return Leaning(*options, every=stage.measure_every, batch=stage.batch)


def make_sampler(stage: TrainConfig, rows: Rows, source: Source, context: StageContext) -> Sampler:
    """Shares of the domains, kept in `dro.jsonl` beside the checkpoint."""
    path, steps = context.folder / "dro.jsonl", stage.updates(rows.mean_length)
    return Sampler(
        leaning(stage), rows, source, steps, path, context.observer, writes=context.team.leads
    )


def architecture_of(model: Any) -> Architecture:
    """The map of a live model."""
    return Architecture.from_config(model.config.to_dict())


def held_out(tokenizer: Any, student: Any, rows: Rows) -> list[TokenBatch]:
    """Development text of the domains that are trained on, a batch a domain."""
    found = build_development(tokenizer, longest=student.config.max_position_embeddings)
    return [batch for batch in found if batch.domains[0] in rows.domains]


def pair(
    original: Path | None, checkpoint: Path, context: StageContext, checkpointing: bool
) -> tuple[Any, Any]:
    """Teacher without gradients and student with them, both fp32 and without dropout.

    Raises:
        ModelError: there is no teacher, or it has another vocabulary.
    """
    if original is None:
        raise ModelError("recover.distill needs the original model to learn from")
    device = context.device if context.team.alone else "cpu"  # `spread` moves what it leaves
    teacher = load_model(original, device, torch.float32).requires_grad_(False)
    student = load_model(checkpoint, device, torch.float32)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"the original predicts {sizes[0]} tokens and the student {sizes[1]}")
    if checkpointing:
        # The library checkpoints in training mode only, which also turns dropout on: off again.
        student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return teacher, student


def spread(context: StageContext, *models: Any) -> None:
    """Leave every process its share of these models."""
    for model in models:
        context.team.shard(model, architecture_of(model).blocks_path, context.device)


def learned(student: Any, team: Team) -> dict[str, Tensor]:
    """The weights as trained, whole, by the library's names; only the leader has them.

    Adapters are added to what they adapt.
    """
    found = {}
    with torch.no_grad():
        for name, tensor in (*student.named_parameters(), *merged(student)):
            whole = team.whole(tensor)
            if team.leads:
                found[name] = whole if team.alone else whole.cpu()
    return found


def _train(
    stage: RecoverDistill,
    teacher: Any,
    student: Any,
    rows: Rows,
    sampler: Sampler,
    context: StageContext,
) -> Fit:
    def loss(step: int) -> Tensor:
        drawn = parts(stage, rows, sampler.shares(step), step, context.team)
        return accumulated(drawn, lambda part: distance(stage, teacher, student, part))

    return fit(
        trainable(student),
        loss,
        schedule(stage, stage.updates(rows.mean_length)),
        context.scratch,
        context.observer,
        "distilling",
        team=context.team,
    )


def trainable(student: Any) -> dict[str, Tensor]:
    """Parameters that take gradients, by name."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def schedule(stage: TrainConfig, steps: int) -> Schedule:
    """How long and how fast a stage trains."""
    return Schedule(
        steps=steps,
        learning_rate=stage.learning_rate,
        warmup=_WARMUP,
        clip=_CLIP,
        weight_decay=stage.weight_decay,
        seconds=in_seconds(stage.minutes),
        every=_EVERY,
    )


@dataclass(frozen=True)
class Part:
    """What a process sees of the windows that are run at once.

    Attributes:
        batch: its share of them.
        tokens, labels: of all of them: what is compared, and what is predicted.
        team: who has the others.
    """

    batch: TokenBatch
    tokens: int
    labels: int
    team: Team = ALONE


def parts(stage: TrainConfig, rows: Rows, shares: Tensor, step: int, team: Team) -> list[Part]:
    """What a process sees of an update, one part after the other.

    Args:
        stage: says how many windows, in how many parts.
        rows: windows to draw from.
        shares: of the domains.
        step: number of the update.
        team: who shares the windows of every part.
    """
    chosen, size = rows.draw(shares, stage.batch, stage.seed, step), stage.windows_at_once
    found = []
    for start in range(0, stage.batch, size):
        numbers = chosen[start : start + size]
        tokens = sum(rows.tokens(number) for number in numbers)
        batch = rows.batch(team.share(numbers))
        found.append(Part(batch, tokens, tokens - len(numbers), team))
    return found


def accumulated(drawn: Sequence[Part], loss: Callable[[Part], Tensor]) -> Tensor:
    """Loss over all parts of an update; gradients of all but the last are added up already."""
    total = torch.zeros(())
    for number, part in enumerate(drawn, 1):
        found = loss(part) / len(drawn)
        total = total.to(found) + found
        if number < len(drawn):
            found.backward()  # type: ignore[no-untyped-call]
            total = total.detach()
    return total


def distance(stage: TrainConfig, teacher: Any, student: Any, part: Part) -> Tensor:
    """Loss of a process's windows as its share of the mean over a token.

    The divergence, and the others by their weights.
    """
    device = next(student.parameters()).device
    ids, mask = part.batch.input_ids.to(device), part.batch.mask.to(device)
    half = trains_in_half(stage.precision, device)
    asked = {"use_cache": False, "output_hidden_states": stage.hidden_states > 0}
    # Without the cache, which would hold the weights of a sharded model whole.
    with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        with torch.no_grad():
            expected = teacher(ids, **asked)
        found = student(ids, **asked)
    logits, options = found.logits, {"top": stage.top_k, "temperature": stage.temperature}
    pair = (found.flatten(0, 1) for found in (expected.logits, logits))
    divergence = logit_divergence(*pair, **options)  # type: ignore[arg-type]
    total = divergence[mask.flatten()].sum() / part.tokens
    if stage.hidden_states:
        aim, here = (model.hidden_states[-1][mask].float() for model in (expected, found))
        energy = part.team.add(aim.square().sum())
        total = total + stage.hidden_states * hidden_distance(aim, here, energy)
    if stage.cross_entropy:
        labels = ids.masked_fill(~mask, -100)[:, 1:].flatten()
        predicted = logits[:, :-1].flatten(0, 1).float()
        own = functional.cross_entropy(predicted, labels, reduction="sum") / part.labels
        total = total + stage.cross_entropy * own
    return total


@dataclass
class Judge:
    """Distance of a student to its teacher on held-out text, a batch a domain."""

    teacher: Any
    student: Any
    batches: Sequence[TokenBatch]
    team: Team = ALONE

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that have held-out text."""
        return tuple(batch.domains[0] for batch in self.batches)

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """KL of every window in nats per token, by domain, fp64 [windows], on every process."""
        losses, device = {}, next(self.student.parameters()).device
        for batch in self.batches:
            count = min(_HELD, len(batch.input_ids))
            found = torch.zeros(count, dtype=torch.float64, device=device)
            for number, kept in self.team.turns(count):
                row = batch.input_ids[number][batch.mask[number]][None].to(device)
                logits = (
                    model(row, use_cache=False).logits[0] for model in (self.teacher, self.student)
                )
                value = logit_divergence(*logits).mean()
                if kept:
                    found[number] = value
            losses[batch.domains[0]] = self.team.add(found).cpu()
        return losses


def sampling_notes(sampler: Sampler) -> dict[str, float]:
    """Losses and shares of the domains, before and after."""
    first, last = sampler.history[0], sampler.history[-1]
    found = {}
    for name in last["loss"]:
        found[f"held-out KL before, {name}"] = first["loss"][name]
        found[f"held-out KL after, {name}"] = last["loss"][name]
    if first["shares"] != last["shares"] or last["radius"]:
        found |= {f"share at the end, {k}": v for k, v in last["shares"].items()}
    return found


def too_late(stage: TrainConfig, trained: Fit, rows: Rows) -> tuple[Fallback, ...]:
    """What the stage's time box left out."""
    return cut_short(stage.method, trained, stage.updates(rows.mean_length), stage.minutes)


def facts(trained: Fit, rows: Rows, team: Team) -> dict[str, float]:
    """What the report says about the training."""
    found = {
        "updates": float(trained.steps),
        "training loss at the end": trained.mean_loss(),
        "windows of text": float(len(rows)),
    }
    return found if team.alone else found | {"processes": float(team.size)}


def _write(checkpoint: Path, weights: Mapping[str, Tensor], context: StageContext) -> StageResult:
    """Trained weights under the names, in the dtypes and shards of their checkpoint."""
    config = read_config(checkpoint)
    architecture = Architecture.from_config(config)
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(context.folder)
    changed = []

    def trained(names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            weight = weights.get(architecture.module_tensor(name))
            before = reader[name]
            found[name] = before if weight is None else weight.cpu().to(before.dtype)
            if not torch.equal(found[name], before):
                changed.append(name)
        return found

    path = f"{architecture.blocks_path}."
    for index in range(architecture.layers):
        names = [name for name in reader if name.startswith(f"{path}{index}.")]
        writer.write_shard(shard_name(index), trained(names))
    outside = trained([name for name in reader if not name.startswith(path)])
    writer.write_shard(shard_name("outside"), outside)
    writer.finish(config, checkpoint, architecture.parameters)
    return StageResult(checkpoint=context.folder, changed=tuple(changed))
