"""What a checkpoint directory consists of. No torch, so that a plan starts fast."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import ModelError

INDEX = "model.safetensors.index.json"


def read_config(path: Path) -> dict[str, Any]:
    """Content of `config.json` in a checkpoint directory.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no config.json, so it is not a model") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must be a JSON object")
    return config


def weight_files(path: Path) -> tuple[Path, ...]:
    """Safetensors files of a checkpoint directory, as the index lists them if there is one.

    Raises:
        ModelError: there are none, one is missing, or the index names a file elsewhere.
    """
    index = path / INDEX
    if not index.is_file():
        whole = path / "model.safetensors"
        files = (whole,) if whole.is_file() else tuple(sorted(path.glob("*.safetensors")))
        if files:
            return files
        raise ModelError(*_no_weights(path))
    for name in _listed(index):
        if not (path / name).is_file():
            raise ModelError(f"{path} lacks {name}, which its index lists")
    return tuple(path / name for name in _listed(index))


def require_tensors(
    path: Path,
    stored: Mapping[str, tuple[int, ...]],
    expected: Iterable[tuple[str, tuple[int, ...]]],
) -> None:
    """Check that a checkpoint directory holds what its configuration calls for.

    Args:
        path: of the directory.
        stored: shapes on disk by name.
        expected: names and shapes.

    Raises:
        ModelError: naming the first tensor that is missing or has another shape.
    """
    for name, shape in expected:
        if name not in stored:
            raise ModelError(
                f"{path} lacks the tensor {name}, which its config.json calls for",
                "files older than transformers 5 may use other names: load the model with"
                " transformers and save_pretrained() it once",
            )
        if stored[name] != shape:
            raise ModelError(
                f"{name} has shape {list(stored[name])} on disk,"
                f" but config.json calls for {list(shape)}"
            )


def _listed(index: Path) -> list[str]:
    """Names of files in an index; every one must lie beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        listed = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index} is not an index of safetensors files") from None
    for name in listed:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} lists {name!r}, which is no safetensors file beside it")
    return listed


def _no_weights(path: Path) -> tuple[str, str]:
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickled:
        return (
            f"{path} holds its weights only as {pickled[0].name}; loading that would run code",
            "convert it once, where you trust it: load the model with transformers and call"
            " save_pretrained()",
        )
    return f"{path} holds no *.safetensors file", ""
