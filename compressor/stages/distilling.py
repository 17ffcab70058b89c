"""Train a student to predict what its teacher predicts, and write it like its checkpoint.

What an update sees follows from its number, the seed and, with `dro`, from shares of domains that
are measured at fixed updates and kept beside the training checkpoint. A measurement behind the
checkpoint is made again, with the same outcome.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.calibration import CalibrationSet, build_batches, build_development
from compressor.errors import ModelError, TextError
from compressor.formats.atomic import atomic_write_text
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.numerics.recovery import logit_divergence
from compressor.numerics.robust import chi_square_weights, trusted_radius
from compressor.stages.context import StageContext
from compressor.training import Fit, Schedule, fit
from compressor.types import StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.recover_distill import RecoverDistill

_WARMUP = 0.05
_CLIP = 1.0
_EVERY = 50  # updates between two checkpoints of training
_HELD = 4  # windows of every domain that a student is measured on


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
    text = calibration if stage.mix is None else build_batches(stage.text(), tokenizer)
    if text is None:
        raise TextError("recover.distill has no text to train on", "name a `mix`")
    teacher, student = _pair(checkpoint, context, stage.checkpointing)
    rows = Rows(text.batches)
    held = build_development(tokenizer, longest=student.config.max_position_embeddings)
    judge = Judge(teacher, student, [batch for batch in held if batch.domains[0] in rows.domains])
    sampler = Sampler(stage, rows, judge, context.folder / "dro.jsonl")
    trained = _train(stage, teacher, student, rows, sampler, context)
    sampler.finish(trained.steps)
    return _write(checkpoint, student, context, sampler.notes() | _facts(trained, rows))


def _pair(checkpoint: Path, context: StageContext, checkpointing: bool) -> tuple[Any, Any]:
    """Teacher without gradients and student with them, both fp32 and without dropout."""
    if context.original is None:
        raise ModelError("recover.distill needs the original model to learn from")
    teacher = load_model(context.original, context.device, torch.float32).requires_grad_(False)
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
    parameters = dict(student.named_parameters())
    part = stage.batch // stage.accumulate
    mixed = context.device.type == "cuda"

    def loss(step: int) -> Tensor:
        """Of all parts of an update; gradients of all but the last are added up already."""
        chosen = rows.draw(sampler.shares(step), stage.batch, stage.seed, step)
        total = torch.zeros((), device=context.device)
        for start in range(0, stage.batch, part):
            batch = rows.batch(chosen[start : start + part])
            with torch.autocast(context.device.type, torch.bfloat16, enabled=mixed):
                found = distance(stage, teacher, student, batch) / stage.accumulate
            total = total + found
            if start + part < stage.batch:
                found.backward()  # type: ignore[no-untyped-call]
                total = total.detach()
        return total

    length = rows.mean_length
    schedule = Schedule(
        steps=max(1, round(stage.tokens / (stage.batch * length))),
        learning_rate=stage.learning_rate,
        warmup=_WARMUP,
        clip=_CLIP,
        weight_decay=stage.weight_decay,
        seconds=None if stage.minutes is None else 60 * stage.minutes,
        every=_EVERY,
    )
    return fit(parameters, loss, schedule, context.scratch, context.observer, "distilling")


def distance(stage: RecoverDistill, teacher: Any, student: Any, batch: TokenBatch) -> Tensor:
    """Mean loss of a token: the divergence, and the cross entropy by its weight."""
    device = next(student.parameters()).device
    ids, mask = batch.input_ids.to(device), batch.mask.to(device)
    with torch.no_grad():
        expected = teacher(ids, use_cache=False).logits[mask]
    logits = student(ids, use_cache=False).logits
    options = {"top": stage.top_k, "temperature": stage.temperature}
    total = logit_divergence(expected, logits[mask], **options).mean()  # type: ignore[arg-type]
    if stage.cross_entropy:
        labels = ids.masked_fill(~mask, -100)[:, 1:].flatten()
        own = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)
        total = total + stage.cross_entropy * own
    return total


class Rows:
    """Windows of text by domain, drawn by the number of the update.

    Args:
        batches: the text.
    """

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        found = [
            (domain, ids, mask)
            for batch in batches
            for domain, ids, mask in zip(batch.domains, batch.input_ids, batch.mask, strict=True)
        ]
        self.domains = tuple(sorted({domain for domain, _, _ in found}))
        self._rows = [(ids[: int(mask.sum())], domain) for domain, ids, mask in found]
        self._by_domain = [
            [number for number, row in enumerate(self._rows) if row[1] == domain]
            for domain in self.domains
        ]
        counts = torch.tensor([len(rows) for rows in self._by_domain], dtype=torch.float64)
        self.shares = counts / counts.sum()
        self.mean_length = sum(len(ids) for ids, _ in self._rows) / len(self._rows)
        self.seen = [0] * len(self.domains)

    def draw(self, shares: Tensor, count: int, seed: int, step: int) -> list[int]:
        """Numbers of the windows of an update: domains by their shares, any window of each."""
        generator = torch.Generator().manual_seed(seed * 2**32 + step)
        domains = torch.multinomial(shares, count, replacement=True, generator=generator)
        chosen = []
        for domain in domains.tolist():
            rows = self._by_domain[domain]
            place = int(torch.randint(len(rows), (), generator=generator))
            chosen.append(rows[place])
            self.seen[domain] += 1
        return chosen

    def batch(self, chosen: Sequence[int]) -> TokenBatch:
        """Windows of these numbers, padded on the right."""
        rows = [self._rows[number] for number in chosen]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, (row, _) in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = True
        return TokenBatch(ids, mask, tuple(domain for _, domain in rows))


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
    def measure(self) -> tuple[list[float], list[float]]:
        """Mean KL of every domain in nats per token, and its standard error over windows."""
        means, errors = [], []
        device = next(self.student.parameters()).device
        for batch in self.batches:
            found = []
            for ids, mask in zip(batch.input_ids[:_HELD], batch.mask[:_HELD], strict=True):
                row = ids[mask][None].to(device)
                pair = (
                    model(row, use_cache=False).logits[0] for model in (self.teacher, self.student)
                )
                found.append(logit_divergence(*pair).mean())
            values = torch.stack(found).double()
            means.append(float(values.mean()))
            spread = float(values.std()) if len(values) > 1 else 0.0
            errors.append(spread / len(values) ** 0.5)
        return means, errors


class Sampler:
    """Shares of the domains at every update.

    Args:
        stage: says whether they lean towards the worst domain.
        rows: the text, with the shares to begin with.
        judge: measures domains on held-out text.
        path: one JSON object a measurement: update, losses and shares by domain.
    """

    def __init__(self, stage: RecoverDistill, rows: Rows, judge: Judge, path: Path) -> None:
        self.stage, self.rows, self.judge, self.path = stage, rows, judge, path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.history: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def shares(self, step: int) -> Tensor:
        """q [domains] of an update; measured anew at every so many of them."""
        every = self.stage.measure_every
        if self.stage.sampler == "static":
            if step == 0:
                self._measure(0)
            return self.rows.shares
        if step % every == 0:
            self._measure(step)
        entry = next(e for e in reversed(self.history) if e["update"] <= step)
        return torch.tensor([entry["shares"][name] for name in self.rows.domains]).double()

    def finish(self, steps: int) -> None:
        """Measure the trained student."""
        self._measure(steps)

    def _measure(self, step: int) -> None:
        self.history = [entry for entry in self.history if entry["update"] < step]
        means, errors = self.judge.measure()
        shares = self._leaning(means, errors)
        entry = {
            "update": step,
            "loss": dict(zip(self.judge.domains, means, strict=True)),
            "shares": dict(zip(self.rows.domains, shares.tolist(), strict=True)),
        }
        self.history.append(entry)
        atomic_write_text(self.path, "".join(f"{json.dumps(e)}\n" for e in self.history))

    def _leaning(self, means: Sequence[float], errors: Sequence[float]) -> Tensor:
        """Domains without held-out text keep their share. The teacher itself is at distance 0."""
        base = self.rows.shares
        if self.stage.sampler == "static" or len(means) < len(self.rows.domains):
            return base
        losses = torch.tensor(means).double()
        radius = trusted_radius(self.stage.radius, losses, torch.tensor(errors))
        return chi_square_weights(base, losses, radius)

    def notes(self) -> dict[str, float]:
        """Losses and shares of the domains, before and after."""
        first, last = self.history[0], self.history[-1]
        found = {}
        for name in self.judge.domains:
            found[f"held-out KL before, {name}"] = first["loss"][name]
            found[f"held-out KL after, {name}"] = last["loss"][name]
        if self.stage.sampler == "dro":
            found |= {f"share at the end, {k}": v for k, v in last["shares"].items()}
        return found


def _facts(trained: Fit, rows: Rows) -> dict[str, float]:
    return {
        "updates": float(trained.steps),
        "training loss at the end": trained.mean_loss(),
        "windows of text": float(len(rows._rows)),
    }


def _write(
    checkpoint: Path, student: Any, context: StageContext, notes: dict[str, float]
) -> StageResult:
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
    return StageResult(checkpoint=context.folder, changed=tuple(changed), notes=notes)
