"""A draft from disk, of whichever kind, ready to propose for its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.decoding.binding import require_target
from compressor.decoding.cached import CachedModel
from compressor.decoding.eagle3 import load_eagle3
from compressor.decoding.early_exit import TrackedExitDraft
from compressor.decoding.proposals import ModelDraft, NetworkDraft
from compressor.model.load import load_model


def load_draft(folder: Path, target: Any, tokenizer: str | None) -> NetworkDraft:
    """The draft that a stage left in a folder.

    Args:
        folder: with its `draft.json`.
        target: the loaded model that it was distilled against.
        tokenizer: `tokenizer_sha256` of the target's folder.

    Raises:
        ModelError: it belongs to another target or tokenizer, or is damaged.
    """
    binding = require_target(folder, target, tokenizer)
    if binding.kind == "eagle3":
        return load_eagle3(folder, target, binding.layers)
    if binding.kind == "early_exit":
        return TrackedExitDraft(binding.layers, binding.rates)
    parameter = next(target.parameters())
    return ModelDraft(CachedModel(load_model(folder, parameter.device, parameter.dtype)))
