"""In which precision stages compute, and calibration text runs through a model."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor import machine
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.reader import TensorReader


def working_dtype(checkpoint: Path, device: torch.device) -> torch.dtype:
    """The model's own dtype where the device has units for it, else fp32.

    A model stored in bf16 was trained and is served in it. Run in it, activations take half the
    memory and, with AMX, products a fifth to a tenth of the time.

    Args:
        checkpoint: directory of a checkpoint of a known family.
        device: where it is to run.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    reader = TensorReader(checkpoint)
    inner = [matrix.tensor for matrix in architecture.matrices if matrix.block is not None]
    stored = {reader.dtype(name) for name in inner}
    own = stored.pop() if len(stored) == 1 else torch.float32
    return own if has_units(device, own) else torch.float32


def stage_dtype(checkpoint: Path, device: torch.device) -> torch.dtype:
    """What a stage computes in that names no precision: bf16 on a GPU if the model is, or fp32.

    Weights come to it and leave it in this precision, which therefore holds all that are stored.
    How the outcome is measured has no say in it.
    """
    own = working_dtype(checkpoint, device)
    return own if device.type == "cuda" and own == torch.bfloat16 else torch.float32


def calibration_dtype(precision: str, checkpoint: Path, device: torch.device) -> torch.dtype:
    """What calibration text is computed in, behind `auto` or `fp32`."""
    return working_dtype(checkpoint, device) if precision == "auto" else torch.float32


def has_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies 16-bit numbers of this type faster than fp32."""
    if dtype == torch.bfloat16:
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return device.type == "cpu" and machine.multiplies_bf16()
    return dtype == torch.float16 and device.type == "cuda"


def trains_in_half(precision: str, device: torch.device) -> bool:
    """Whether products in training are in bf16, behind `auto`, `fp32` or `bf16`."""
    return precision == "bf16" or (precision == "auto" and has_units(device, torch.bfloat16))
