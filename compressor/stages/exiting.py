"""The work of `draft.early_exit`: how often each exit says what the whole model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.decoding.assisted import settings
from compressor.decoding.binding import (
    Binding,
    fingerprint,
    tokenizer_sha256,
    write_binding,
)
from compressor.decoding.early_exit import costs_of, guesses
from compressor.formats.atomic import atomic_write_json
from compressor.model.load import load_model
from compressor.numerics.exits import best_exit
from compressor.stages.context import StageContext
from compressor.types import StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.draft_early_exit import DraftEarlyExit

GENERATION = "generation_config.json"


def compare_exits(
    config: DraftEarlyExit, checkpoint: Path, calibration: CalibrationSet, context: StageContext
) -> StageResult:
    """Measure every exit; the target's checkpoint is only read.

    Args:
        config: options.
        checkpoint: the target.
        calibration: text.
        context: `folder` receives the draft: the binding and a generation_config.json.
    """
    target = load_model(checkpoint, context.device, torch.float32)
    costs = costs_of(target, config.candidates(target.config.get_text_config().num_hidden_layers))
    exits = tuple(costs)
    batches = _some(calibration, config.tokens)
    with context.observer.task("compare exits", len(batches)) as task:
        right, tokens = torch.zeros(len(exits)), 0
        for batch in batches:
            agreed = agreement(target, batch, exits)
            right, tokens = right + agreed.sum(0), tokens + len(agreed)
            task.advance()
    rates = tuple((right / max(1, tokens)).tolist())
    best = best_exit(rates, tuple(costs.values()), [1.0] * config.drafted)
    context.folder.mkdir(parents=True, exist_ok=True)
    write_binding(
        context.folder,
        Binding(
            kind="early_exit",
            target_sha256=fingerprint(target),
            tokenizer_sha256=tokenizer_sha256(checkpoint),
            layers=exits,
            rates=rates,
        ),
    )
    _write_settings(checkpoint, context.folder, exits[best.place], max(1, best.drafted))
    notes = {f"agreement_after_{exit_}": rate for exit_, rate in zip(exits, rates, strict=True)}
    notes |= {"compared_tokens": float(tokens), "predicted_before_measuring": best.predicted}
    return StageResult(checkpoint=context.folder, changed=(), notes=notes)


def _some(calibration: CalibrationSet, tokens: int) -> list[TokenBatch]:
    """The first batches with at least so many tokens; all if there are fewer."""
    found: list[TokenBatch] = []
    count = 0
    for batch in calibration.batches:
        if count < tokens:
            found.append(batch)
            count += int(batch.mask.sum())
    return found


@torch.inference_mode()
def agreement(target: Any, batch: TokenBatch, exits: tuple[int, ...]) -> Tensor:
    """Whether each exit has the whole model's likeliest token, fp32 [tokens, exits].

    Args:
        target: a causal language model.
        batch: right-padded text.
        exits: after so many blocks.
    """
    device = next(target.parameters()).device
    found = []
    for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
        output = target(ids[mask][None].to(device), output_hidden_states=True, use_cache=False)
        states = torch.stack([output.hidden_states[exit_][0] for exit_ in exits], 1)
        said = output.logits[0].argmax(-1, keepdim=True)
        found.append((guesses(target, states) == said).float().cpu())
    return torch.cat(found)


def _write_settings(checkpoint: Path, folder: Path, exit_: int, drafted: int) -> None:
    """The target's generation_config.json with what assisted generation reads."""
    path = checkpoint / GENERATION
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    atomic_write_json(folder / GENERATION, known | settings(drafted, exit_))
