"""The work of the draft stages: text, the target's view of it, training, saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.decoding.binding import (
    Binding,
    Kind,
    fingerprint,
    tokenizer_sha256,
    write_binding,
)
from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Corpus, Head, TextOptions, draft_text
from compressor.decoding.standalone import chosen_blocks, standalone
from compressor.formats.files import copy_parent_files
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.quiet import quiet
from compressor.numerics.distillation import divergence
from compressor.stages.context import StageContext
from compressor.stages.draft_base import TrainedDraftConfig
from compressor.training import Fit, fit
from compressor.types import Fallback, StageResult

if TYPE_CHECKING:
    from compressor.stages.draft_standalone import DraftStandalone


def distil_standalone(
    config: DraftStandalone, checkpoint: Path, calibration: CalibrationSet, context: StageContext
) -> StageResult:
    """Distil some blocks of the target; the target's checkpoint is only read.

    Args:
        config: options.
        checkpoint: the target.
        calibration: text.
        context: `folder` receives the draft.
    """
    target = load_model(checkpoint, context.device, torch.float32)
    corpus = read_corpus(config, target, checkpoint, (), calibration, context)
    head = Head.of(target)
    blocks = chosen_blocks(config.blocks, config.layers, target.config.num_hidden_layers)
    student = standalone(target, blocks)
    trained = _trainable(student, config.train_embeddings)

    def loss(step: int) -> Tensor:
        number = corpus.at(step, config.seed)
        ids, mask = corpus.ids(number), corpus.mask(number)
        with torch.no_grad():
            teacher = head.logits(corpus.hidden(number)[mask]).softmax(-1)
        logits = student(ids, use_cache=False).logits[mask]
        everywhere = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return divergence(config.loss, logits, teacher, everywhere)

    done = train(config, trained, loss, context)
    _save_model(student, target, checkpoint, context.folder)
    return finish(config, "standalone", target, checkpoint, corpus, done, context)


def _trainable(student: Any, embeddings: bool) -> dict[str, Tensor]:
    """Parameters by name, without embedding and head unless they are asked for."""
    kept = {} if embeddings else {
        id(layer.weight)
        for layer in (student.get_input_embeddings(), student.get_output_embeddings())
    }  # fmt: skip
    found = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) not in kept)
        if parameter.requires_grad:
            found[name] = parameter
    return found


def _save_model(student: Any, target: Any, checkpoint: Path, folder: Path) -> None:
    """A plain checkpoint in the dtype of the target's, with its tokenizer."""
    dtype = getattr(torch, Architecture.from_config(read_config(checkpoint)).dtype)
    student.to(dtype)
    student.config.dtype = dtype
    with quiet():
        student.save_pretrained(folder)
    copy_parent_files(checkpoint, folder)


# ---------------------------------------------------------------------- what all drafts share


def read_corpus(
    config: TrainedDraftConfig,
    target: Any,
    checkpoint: Path,
    layers: tuple[int, ...],
    calibration: CalibrationSet,
    context: StageContext,
) -> Corpus:
    """Text of the target's and of the calibration, and hidden states at all of it."""
    options = TextOptions(
        tokens=config.tokens,
        length=config.length,
        generated=config.generated,
        prompt=config.prompt,
        temperatures=config.temperatures,
        batch=config.batch_size,
        seed=config.seed,
    )
    batches = draft_text(
        CachedModel(target),
        calibration.batches,
        load_tokenizer(checkpoint),
        options,
        context.scratch,
        context.observer,
    )
    budget = context.activation_budget
    return Corpus(target, batches, layers, context.scratch, budget, context.observer)


def train(
    config: TrainedDraftConfig, parameters: Mapping[str, Tensor], loss: Any, context: StageContext
) -> Fit:
    """Run the schedule, taking up what an interrupted run left."""
    context.scratch.mkdir(parents=True, exist_ok=True)
    return fit(parameters, loss, config.schedule(), context.scratch, context.observer)


def finish(
    config: TrainedDraftConfig,
    kind: Kind,
    target: Any,
    checkpoint: Path,
    corpus: Corpus,
    done: Fit,
    context: StageContext,
    layers: tuple[int, ...] = (),
    notes: Mapping[str, float] | None = None,
) -> StageResult:
    """Bind the draft to its target and say what was done."""
    mean = corpus.tokens / len(corpus.batches)
    seen = round(done.steps * mean)
    binding = Binding(
        kind=kind,
        target_sha256=fingerprint(target),
        tokenizer_sha256=tokenizer_sha256(checkpoint),
        layers=layers,
        trained_tokens=seen,
    )
    write_binding(context.folder, binding)
    own: dict[str, float] = {
        "training_steps": done.steps,
        "training_tokens": seen,
        "text_tokens": corpus.tokens,
    }
    own |= {"first_loss": done.mean_loss(slice(20)), "last_loss": done.mean_loss()}
    corpus.delete()
    return StageResult(
        checkpoint=context.folder,
        changed=(),
        notes={name: float(value) for name, value in (own | dict(notes or {})).items()},
        fallbacks=_cut_short(config, done),
    )


def _cut_short(config: TrainedDraftConfig, done: Fit) -> tuple[Fallback, ...]:
    if done.steps == config.steps:
        return ()
    reason = f"{config.minutes:g} minutes were over after {done.steps} of {config.steps} steps"
    return (Fallback("draft", reason, "the draft of that step was kept"),)
