"""Which target a draft belongs to, recorded beside it and checked before it is used.

A draft speeds up the model it was distilled against; with another one it is merely slow, which
nothing would tell. The fingerprint is of the weights as they compute, so that a packed checkpoint
and its dense twin have the same one.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.decoding.results import LearningCurve
from compressor.errors import ModelError
from compressor.formats.atomic import atomic_write_text
from compressor.provenance import file_sha256

FILE = "draft.json"
Kind = Literal["standalone", "eagle3", "early_exit"]

# What compressed-tensors keeps beside weights that it has unpacked: `weight_scale`, `input_scale`.
_OF_PACKING = re.compile(r"\.(weight|input|output)_\w+$")


class Binding(BaseModel):
    """Content of `draft.json`.

    Attributes:
        kind: what the draft is.
        target_sha256: fingerprint of the target's weights.
        tokenizer_sha256: of the target's `tokenizer.json`; None when it has none.
        layers: hidden states of the target that the draft reads.
        rates: of an early exit, how often the target agreed after each of `layers`.
        curve: acceptance on development text while it was trained.
        trained_tokens: positions that training looked at, repetitions counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    target_sha256: str
    tokenizer_sha256: str | None
    layers: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    curve: LearningCurve | None = None
    trained_tokens: int = 0


def fingerprint(model: Any) -> str:
    """SHA-256 of names, shapes and values of all weights, cast to fp32.

    Args:
        model: as `load_model` gives it, in a precision that holds the checkpoint's values exactly.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if _OF_PACKING.search(name):
            continue
        value = parameter.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(folder: Path) -> str | None:
    """Hash of `tokenizer.json`; None when there is none."""
    path = folder / "tokenizer.json"
    return file_sha256(path) if path.is_file() else None


def write_binding(folder: Path, binding: Binding) -> None:
    """Write `draft.json`."""
    atomic_write_text(folder / FILE, binding.model_dump_json(indent=2) + "\n")


def read_binding(folder: Path) -> Binding:
    """Read `draft.json`.

    Raises:
        ModelError: the folder holds no draft of ours.
    """
    path = folder / FILE
    try:
        return Binding.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no {FILE}, so it is no draft") from None
    except ValidationError as error:
        raise ModelError(f"{path} is damaged: {error.errors()[0]['msg']}") from None


def require_target(folder: Path, target: Any, tokenizer: str | None) -> Binding:
    """The binding of a draft, after checking that it belongs to a target.

    Args:
        folder: of the draft.
        target: the loaded target.
        tokenizer: hash of the target's tokenizer.

    Raises:
        ModelError: it was distilled against other weights or another tokenizer.
    """
    binding = read_binding(folder)
    found = fingerprint(target)
    if found != binding.target_sha256:
        raise ModelError(
            f"the draft in {folder} was distilled against weights "
            f"{binding.target_sha256[:12]}…, and this target's are {found[:12]}…",
            "run the draft stage again on this target; a draft of another one is only slow",
        )
    if tokenizer != binding.tokenizer_sha256:
        raise ModelError(f"the draft in {folder} was distilled with another tokenizer")
    return binding
