"""What `compress doctor` looks at. Tells whether a token exists, never what it is."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from compressor import __version__, machine

_CORE = ("torch", "transformers", "compressed-tensors", "safetensors", "datasets", "pydantic")
_EXTRAS = {
    "gguf": "gguf",
    "bnb": "bitsandbytes",
    "gptq": "gptqmodel",
    "eval": "lm-eval",
    "ray": "ray",
    "trackio": "trackio",
}


def examine() -> dict[str, Any]:
    """Versions, machine, storage, access to the Hub and optional extras."""
    return {
        "compressor": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _CORE},
        "machine": _machine(),
        "device": _device(),
        "hub": _hub(),
        "extras": {extra: _version(package) for extra, package in _EXTRAS.items()},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(machine.cores()),
        "instructions": ", ".join(machine.vector_extensions()) or "unknown",
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "disk": f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free here",
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def _hub() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1"
    return {
        "mode": "offline" if offline else "online",
        "token": "present" if get_token() else "absent: public models only",
        "cache": "present" if Path(constants.HF_HUB_CACHE).is_dir() else "empty",
    }
