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
from compressor.stages.adapters import adapt, merge
from compressor.stages.context import StageContext
from compressor.stages.sampling import Leaning, Rows, Sampler, Source
from compressor.training import Fit, Schedule, fit
from compressor.types import StageResult, TokenBatch

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
    rows = training_rows(stage, tokenizer, calibration)
    steps = stage.updates(rows.mean_length)
    judge = Judge(teacher, student, held_out(tokenizer, student, rows))
    path = context.folder / "dro.jsonl"
    source = Source(judge.measure)
    sampler = Sampler(leaning(stage), rows, source, steps, path, context.observer)
    trained = _train(stage, teacher, student, rows, sampler, context)
    merge(student)
    sampler.finish(trained.steps)
    result = _write(checkpoint, student, context)
    return replace(
        result,
        notes=sampling_notes(sampler) | facts(trained, rows),
        mixture=sampler.mixture(),
        fallbacks=sampler.fallbacks(stage.method),
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
    teacher = load_model(original, context.device, torch.float32).requires_grad_(False)
    student = load_model(checkpoint, context.device, torch.float32)
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


def _train(
    stage: RecoverDistill,
    teacher: Any,
    student: Any,
    rows: Rows,
    sampler: Sampler,
    context: StageContext,
) -> Fit:
    def loss(step: int) -> Tensor:
        return accumulated(
            stage, rows, sampler, step, lambda b: distance(stage, teacher, student, b)
        )

    architecture = Architecture.from_config(student.config.to_dict())
    return fit(
        adapt(student, architecture, stage.adapters, stage.seed)
        if stage.adapters
        else dict(student.named_parameters()),
        loss,
        schedule(stage, stage.updates(rows.mean_length)),
        context.scratch,
        context.observer,
        "distilling",
    )


def schedule(stage: TrainConfig, steps: int) -> Schedule:
    """How long and how fast a stage trains."""
    return Schedule(
        steps=steps,
        learning_rate=stage.learning_rate,
        warmup=_WARMUP,
        clip=_CLIP,
        weight_decay=stage.weight_decay,
        seconds=None if stage.minutes is None else 60 * stage.minutes,
        every=_EVERY,
    )


def accumulated(
    stage: TrainConfig,
    rows: Rows,
    sampler: Sampler,
    step: int,
    loss: Callable[[TokenBatch], Tensor],
) -> Tensor:
    """Loss over all parts of an update; gradients of all but the last are added up already."""
    chosen, part = rows.draw(sampler.shares(step), stage.batch, stage.seed, step), stage.batch
    part //= stage.accumulate
    total = torch.zeros(())
    for start in range(0, stage.batch, part):
        found = loss(rows.batch(chosen[start : start + part])) / stage.accumulate
        total = total.to(found) + found
        if start + part < stage.batch:
            found.backward()  # type: ignore[no-untyped-call]
            total = total.detach()
    return total


def distance(stage: TrainConfig, teacher: Any, student: Any, batch: TokenBatch) -> Tensor:
    """Mean loss of a token: the divergence, and the others by their weights."""
    device = next(student.parameters()).device
    ids, mask = batch.input_ids.to(device), batch.mask.to(device)
    half = trains_in_half(stage.precision, device)
    asked = {"use_cache": False, "output_hidden_states": stage.hidden_states > 0}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        with torch.no_grad():
            expected = teacher(ids, **asked)
        found = student(ids, **asked)
    logits, options = found.logits, {"top": stage.top_k, "temperature": stage.temperature}
    total = logit_divergence(expected.logits[mask], logits[mask], **options).mean()  # type: ignore[arg-type]
    if stage.hidden_states:
        pair = (model.hidden_states[-1][mask].float() for model in (expected, found))
        total = total + stage.hidden_states * hidden_distance(*pair)
    if stage.cross_entropy:
        labels = ids.masked_fill(~mask, -100)[:, 1:].flatten()
        own = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)
        total = total + stage.cross_entropy * own
    return total


@dataclass
class Judge:
    """Distance of a student to its teacher on held-out text, a batch a domain."""

    teacher: Any
    student: Any
    batches: Sequence[TokenBatch]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that have held-out text."""
        return tuple(batch.domains[0] for batch in self.batches)

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """KL of every window in nats per token, fp64 [windows], by domain."""
        losses, device = {}, next(self.student.parameters()).device
        for batch in self.batches:
            found = []
            for ids, mask in zip(batch.input_ids[:_HELD], batch.mask[:_HELD], strict=True):
                row = ids[mask][None].to(device)
                logits = (
                    model(row, use_cache=False).logits[0] for model in (self.teacher, self.student)
                )
                found.append(logit_divergence(*logits).mean())
            losses[batch.domains[0]] = torch.stack(found).double().cpu()
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


def facts(trained: Fit, rows: Rows) -> dict[str, float]:
    """What the report says about the training."""
    return {
        "updates": float(trained.steps),
        "training loss at the end": trained.mean_loss(),
        "windows of text": float(len(rows)),
    }


def _write(checkpoint: Path, student: Any, context: StageContext) -> StageResult:
    """The student's weights under the names, in the dtypes and shards of its checkpoint."""
    config = read_config(checkpoint)
    architecture = Architecture.from_config(config)
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(context.folder)
    learned: Mapping[str, Tensor] = dict(student.named_parameters())
    changed = []

    def trained(names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            parameter = learned.get(architecture.module_tensor(name))
            before = reader[name]
            found[name] = before if parameter is None else parameter.detach().cpu().to(before.dtype)
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
