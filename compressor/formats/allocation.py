"""The grids that a stage chose for a rounder, in a file beside the checkpoint. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.errors import ModelError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.headers import read_json
from compressor.types import WeightScheme

ALLOCATION = "allocation.json"


def write_allocation(
    folder: Path, schemes: Mapping[str, WeightScheme], expected: Mapping[str, float]
) -> None:
    """Store a grid per matrix and what rounding to it is expected to cost.

    Args:
        folder: of the checkpoint that is to be rounded.
        schemes: grid of each matrix, by its name on disk without `.weight`.
        expected: divergence from the dense model, nats per token, of each matrix.

    Raises:
        ResourceError: the file system refused.
    """
    content = {
        name: asdict(scheme) | {"expected_loss": expected[name]} for name, scheme in schemes.items()
    }
    atomic_write_json(folder / ALLOCATION, content)


def read_allocation(folder: Path) -> dict[str, WeightScheme]:
    """The grids beside a checkpoint, by name of the matrix; none when nothing was allocated.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / ALLOCATION
    if not path.is_file():
        return {}
    try:
        return {name: _scheme(entry) for name, entry in read_json(path).items()}
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None


def _scheme(entry: Mapping[str, Any]) -> WeightScheme:
    fields = {key: value for key, value in entry.items() if key != "expected_loss"}
    return WeightScheme(**fields)
