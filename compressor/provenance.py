"""What a result was made of: machine, software, file hashes."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import compressor
from compressor.formats.files import checkpoint_files
from compressor.report.schema import Environment, FileHash, Hardware

if TYPE_CHECKING:
    import torch

DECISIVE = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers")
"""Packages whose version may change the bytes of a result."""


def packages() -> dict[str, str]:
    """Versions of ourselves and of everything that decides the bytes of a result."""
    return {"compressor": compressor.__version__, **{name: version(name) for name in DECISIVE}}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path) -> tuple[FileHash, ...]:
    """Name, SHA-256 and size of every file needed to load a checkpoint."""
    return tuple(
        FileHash(
            path=path.relative_to(folder).as_posix(),
            sha256=file_sha256(path),
            bytes=path.stat().st_size,
        )
        for path in checkpoint_files(folder)
    )


def combined_sha256(files: tuple[FileHash, ...]) -> str:
    """One SHA-256 for a folder: of the sorted lines `sha256  path`, as sha256sum prints them."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def environment(device: torch.device) -> Environment:
    """The software and the machine."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Environment(
        package=compressor.__version__,
        commit=_commit(),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        compressed_tensors=version("compressed-tensors"),
        device=str(device),
        hardware=Hardware(
            cpu=_cpu_model(),
            cores=len(psutil.Process().cpu_affinity() or ()) or psutil.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            accelerator=accelerator,
        ),
        deterministic=device.type == "cpu",
    )


@cache
def _commit() -> str | None:
    """Commit of the checkout that the package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
