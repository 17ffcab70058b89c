"""Calibration tokens of a mix, as every side reads them: `input_ids` int64 [rows, length]."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from compressor.calibration import CalibrationConfig, build_batches
from compressor.model.load import load_tokenizer


def write_tokens(model: Path, mix: str, samples: int, length: int, path: Path) -> None:
    """The very rows that a recipe with this `calibration` section calibrates on, in its order."""
    config = CalibrationConfig(mix=mix, samples=samples, length=length)
    found = build_batches(config, load_tokenizer(model))
    ids = torch.cat([batch.input_ids for batch in found.batches])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": ids}, path, {"mix": mix, "sha256": found.sha256})
