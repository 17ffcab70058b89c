"""Open a session: what measuring needs to know of a base and of this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.scoring import resolve_dtype
from compressor.evaluation.session import Session
from compressor.machine import activation_budget
from compressor.model.architecture import Architecture
from compressor.model.load import read_config
from compressor.progress import Observer
from compressor.provenance import combined_sha256, hash_files
from compressor.report.schema import FileHash


def default_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_session(
    base: Path,
    config: EvaluateConfig,
    *,
    folder: Path,
    cache: Path,
    observer: Observer,
    seen: frozenset[str] | None = None,
    files: tuple[FileHash, ...] | None = None,
) -> Session:
    """A session that compares variants with `base`; nothing is measured yet.

    Args:
        base: checkpoint.
        config: text, protocol, statistics.
        folder: where results go.
        cache: where the base's hidden states go; may be thrown away.
        observer: told of progress.
        seen: domains of the calibration text; None when nothing was calibrated.
        files: the base's, where they have been hashed already.
    """
    device = default_device()
    return Session(
        config=config,
        base=base,
        base_sha256=combined_sha256(files or hash_files(base)),
        context_length=Architecture.from_config(read_config(base)).max_positions,
        seen=seen,
        folder=folder,
        cache=cache,
        device=device,
        dtype=resolve_dtype(config.dtype, device),
        activation_budget=activation_budget(),
        observer=observer,
    )
