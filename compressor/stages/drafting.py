"""The work of the draft stages: text, the target's view of it, training, saving."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compressor.calibration import CalibrationSet
from compressor.decoding.binding import (
    Binding,
    Kind,
    fingerprint,
    tokenizer_sha256,
    write_binding,
)
from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Corpus, Head, share
from compressor.decoding.decode import Limits, decode
from compressor.decoding.probes import Probes, probe_steps
from compressor.decoding.prompts import asking
from compressor.decoding.proposals import ModelDraft
from compressor.decoding.standalone import chosen_blocks, standalone
from compressor.decoding.writing import TextOptions, draft_text
from compressor.formats.files import copy_parent_files
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.precision import trains_in_half, working_dtype
from compressor.model.quiet import quiet
from compressor.numerics.distillation import divergence
from compressor.numerics.speculative import Sampling
from compressor.stages.base import in_seconds
from compressor.stages.context import StageContext
from compressor.stages.draft_base import TrainedDraftConfig
from compressor.stages.prune_width import PruneWidth
from compressor.team import Team
from compressor.training import Fit, cut_short, fit
from compressor.types import Fallback, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.draft_standalone import DraftStandalone


PROBES = "probes.json"
_HELD = 2**30  # bytes of hidden states that stay in memory; the others wait in files


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
    target = load_target(config, checkpoint, context)
    corpus = read_corpus(config, target, checkpoint, (), calibration, context)
    head = Head.of(target)
    blocks = chosen_blocks(config.blocks, config.layers, target.config.num_hidden_layers)
    student = standalone(target, blocks)
    if config.intermediate is not None:
        student = narrower(config.intermediate, student, checkpoint, calibration, context)
    trained = _trainable(student, config.train_embeddings)
    first = config.steps - round(config.on_policy * config.steps)

    def loss(step: int) -> Tensor:
        if step >= first:
            return on_policy_loss(config, student, target, corpus, step)
        number = corpus.at(step, config.seed)
        ids, mask = corpus.ids(number), corpus.mask(number)
        with half_products(config, corpus.device):
            with torch.no_grad():
                teacher = head.logits(corpus.hidden(number)).softmax(-1)
            logits = student(ids, use_cache=False).logits
        return _distance(config, logits, teacher, mask, corpus.team)

    probes = Probes(
        CachedModel(target),
        load_tokenizer(checkpoint),
        lambda: ModelDraft(CachedModel(student)),
        config.drafted,
        probe_steps(config.steps, config.probes),
        context.scratch / PROBES,
    )
    done = train(config, trained, loss, probes, context, _tables(student))
    if context.team.leads:
        _save_model(student, target, checkpoint, context.folder)
    return finish(config, "standalone", target, checkpoint, corpus, done, probes, context)


def on_policy_loss(
    config: DraftStandalone, student: Any, target: Any, corpus: Corpus, step: int
) -> Tensor:
    """The draft continues the beginnings of a batch; what it says there is compared.

    Args:
        config: options.
        student: the draft.
        target: judges.
        corpus: whose rows are begun with.
        step: which batch, and what is drawn.
    """
    team, batch = corpus.team, corpus.batches[corpus.at(step, config.seed)]
    rows = zip(batch.input_ids, batch.mask, strict=True)
    prompts = [ids[mask][: config.prompt].tolist() for ids, mask in rows]
    # One generator serves all rows of a batch, so one process writes them.
    written = team.hear(_continued(config, student, prompts, step) if team.leads else None)
    texts = [
        torch.tensor([*prompt, *tokens]) for prompt, tokens in zip(prompts, written, strict=True)
    ]
    ids = pad_sequence(texts, batch_first=True)
    places = torch.arange(ids.shape[1])[None]
    starts = torch.tensor([[len(prompt) - 1] for prompt in prompts])
    ends = torch.tensor([[len(text) - 1] for text in texts])
    own = share(TokenBatch(ids, (places >= starts) & (places < ends), batch.domains), team)
    ids, counts = own.input_ids.to(corpus.device), own.mask.to(corpus.device)
    with half_products(config, corpus.device):
        with torch.no_grad():
            teacher = target(ids, use_cache=False).logits.softmax(-1)
        logits = student(ids, use_cache=False).logits
    return _distance(config, logits, teacher, counts, corpus.team)


def _continued(
    config: DraftStandalone, student: Any, prompts: Sequence[Sequence[int]], step: int
) -> tuple[tuple[int, ...], ...]:
    limits, seed = Limits(config.continued), config.seed + step
    drawn = Sampling(1.0)
    return decode(CachedModel(student), prompts, limits, sampling=drawn, seed=seed).tokens


def _distance(
    config: DraftStandalone, logits: Tensor, teacher: Tensor, mask: Tensor, team: Team
) -> Tensor:
    """A process's part of the loss over the positions of all."""
    return divergence(config.loss, logits, teacher, mask, config.top_k, total=team.add)


def narrower(
    channels: int,
    student: Any,
    checkpoint: Path,
    calibration: CalibrationSet,
    context: StageContext,
) -> Any:
    """The draft with fewer feed-forward channels, those that `prune.width` keeps.

    Args:
        channels: that are left in each block.
        student: in fp32.
        checkpoint: the target, for the files beside the weights.
        calibration: text on which channels are compared.
        context: `scratch` is used.
    """
    whole, narrow = context.scratch / "whole", context.scratch / "narrow"
    if context.team.leads and not (narrow / "config.json").is_file():
        with quiet():
            student.save_pretrained(whole)
        copy_parent_files(checkpoint, whole)
        surroundings = replace(
            context,
            folder=narrow,
            scratch=context.scratch / "pruning",
            finished=(),
            block_done=lambda _: None,
        )
        PruneWidth(intermediate=channels, score="wanda").run(whole, calibration, surroundings)
    context.team.wait()
    return load_model(narrow, context.device, torch.float32)


def _trainable(student: Any, embeddings: bool) -> dict[str, Tensor]:
    """Parameters by name, without embedding and head unless they are asked for."""
    kept = set() if embeddings else {id(table) for table in _tables(student)}
    found = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) not in kept)
        if parameter.requires_grad:
            found[name] = parameter
    return found


def _tables(model: Any) -> tuple[Tensor, Tensor]:
    """Embedding and head; the same tensor where they are tied."""
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def _save_model(student: Any, target: Any, checkpoint: Path, folder: Path) -> None:
    """A plain checkpoint in the dtype of the target's, with its tokenizer."""
    dtype = getattr(torch, Architecture.from_config(read_config(checkpoint)).dtype)
    student.to(dtype)
    student.config.dtype = dtype
    with quiet():
        student.save_pretrained(folder)
    copy_parent_files(checkpoint, folder)


# ---------------------------------------------------------------------- what all drafts share


def load_target(config: TrainedDraftConfig, checkpoint: Path, context: StageContext) -> Any:
    """The target, in its own precision where products are in bf16 and the device has units for it.

    Args:
        config: options.
        checkpoint: the target.
        context: where it is put.
    """
    half = trains_in_half(config.precision, context.device)
    dtype = working_dtype(checkpoint, context.device) if half else torch.float32
    return load_model(checkpoint, context.device, dtype)


def half_products(config: TrainedDraftConfig, device: torch.device) -> torch.autocast:
    """Within it, products are in bf16 if the options say so."""
    half = trains_in_half(config.precision, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


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
        rows=config.rows,
        length=config.length,
        generated=config.generated,
        prompt=config.prompt,
        temperatures=config.temperatures,
        batch=config.batch_size,
        seed=config.seed,
        own_requests=config.requests == "own",
        seconds=in_seconds(config.writing_minutes),
    )
    batches = draft_text(
        CachedModel(target),
        calibration.batches,
        load_tokenizer(checkpoint),
        options,
        context.scratch,
        context.observer,
        context.team,
    )
    # An update reads one batch: more in memory than this saves no time.
    budget = min(context.activation_budget, _HELD)
    return Corpus(target, batches, layers, context.scratch, budget, context.observer, context.team)


def train(
    config: TrainedDraftConfig,
    parameters: Mapping[str, Tensor],
    loss: Any,
    probes: Probes,
    context: StageContext,
    tables: Collection[Tensor],
) -> Fit:
    """Run the schedule, taking up what an interrupted run left.

    Args:
        config: options.
        parameters: of the draft, by name.
        loss: of a step.
        probes: look at acceptance meanwhile, in the process that leads.
        context: `scratch` keeps checkpoints.
        tables: embedding and head, a row a token: no maps between spaces, as Muon wants them.
    """
    context.scratch.mkdir(parents=True, exist_ok=True)
    rows = {id(table) for table in tables}
    matrices = {
        name
        for name, parameter in parameters.items()
        if parameter.ndim == 2 and id(parameter) not in rows
    }
    return fit(
        parameters,
        loss,
        config.schedule(),
        context.scratch,
        context.observer,
        watch=probes if context.team.leads else None,
        matrices=matrices,
        team=context.team,
    )


def finish(
    config: TrainedDraftConfig,
    kind: Kind,
    target: Any,
    checkpoint: Path,
    corpus: Corpus,
    done: Fit,
    probes: Probes,
    context: StageContext,
    layers: tuple[int, ...] = (),
    notes: Mapping[str, float] | None = None,
) -> StageResult:
    """Bind the draft to its target and say what was done; the leader does."""
    team = context.team
    corpus.delete()
    team.wait()  # what the engine deletes is written to no more
    if not team.leads:
        return StageResult(context.folder, changed=())
    mean = corpus.tokens / len(corpus.batches)
    seen = round(done.steps * mean)
    binding = Binding(
        kind=kind,
        target_sha256=fingerprint(target),
        tokenizer_sha256=tokenizer_sha256(checkpoint),
        layers=layers,
        curve=probes.curve(mean),
        trained_tokens=seen,
    )
    write_binding(context.folder, binding)
    own: dict[str, float] = {
        "training_steps": done.steps,
        "training_tokens": seen,
        "text_tokens": corpus.tokens,
    }
    own |= {"first_loss": done.mean_loss(slice(20)), "last_loss": done.mean_loss()}
    own |= {} if team.alone else {"processes": team.size}
    return StageResult(
        checkpoint=context.folder,
        changed=(),
        notes={name: float(value) for name, value in (own | dict(notes or {})).items()},
        fallbacks=(
            *_without_template(config, checkpoint),
            *_less_text(config, sum(len(batch.mask) for batch in corpus.batches)),
            *cut_short("draft", done, config.steps, config.minutes),
        ),
    )


def _without_template(config: TrainedDraftConfig, checkpoint: Path) -> tuple[Fallback, ...]:
    if config.requests == "text" or asking(load_tokenizer(checkpoint)) is not None:
        return ()
    reason = "requests: own asks for a chat template, and the tokenizer has none that can be split"
    return (Fallback("draft", reason, "it continued beginnings of calibration text"),)


def _less_text(config: TrainedDraftConfig, rows: int) -> tuple[Fallback, ...]:
    """What the time box of writing left out."""
    if rows >= config.rows:
        return ()
    reason = f"{config.writing_minutes:g} minutes were over after {rows} of {config.rows} rows"
    return (Fallback("draft", reason, "it was distilled on less text"),)
