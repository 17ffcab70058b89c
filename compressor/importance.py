"""`compress imatrix MODEL`: what enters every matrix, on calibration text, for llama.cpp."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import CalibrationConfig, build_batches
from compressor.formats.imatrix import Importance, write_imatrix
from compressor.machine import activation_budget
from compressor.model.load import load_tokenizer, resolve
from compressor.model.walk import BlockWalk
from compressor.progress import Observer
from compressor.types import TokenBatch


class _Squares:
    """Sums over tokens by input group, in fp64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = defaultdict(int)

    def __call__(self, group: str, inputs: Tensor, domains: Tensor) -> None:
        del domains
        squares = inputs.double().square().sum(0).cpu()
        self.sums[group] = self.sums[group] + squares if group in self.sums else squares
        self.tokens[group] += len(inputs)


def measure_importance(
    checkpoint: Path, batches: tuple[TokenBatch, ...], observer: Observer
) -> dict[str, Importance]:
    """Sum of squared inputs of every matrix of the blocks; one block in memory at a time.

    Args:
        checkpoint: dense.
        batches: text; padding does not count.
        observer: told of progress.

    Raises:
        ModelError: unknown family or compressed weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Importance] = {}
    with tempfile.TemporaryDirectory(prefix="compress-imatrix-") as scratch:
        walk = BlockWalk(
            checkpoint,
            batches,
            device=device,
            scratch=Path(scratch),
            memory_budget=activation_budget(),
        )
        with observer.task("measuring blocks", walk.architecture.layers) as task:
            for block in walk.blocks():
                seen = _Squares()
                block.capture(seen, onward=True)
                for matrix in block.matrices:
                    group = matrix.info.input_group
                    if group in seen.sums:
                        entry = Importance(seen.sums[group].float(), seen.tokens[group])
                        found[matrix.info.name] = entry
                task.advance()
    return found


def write_importance(
    model: str, out: Path, calibration: CalibrationConfig, observer: Observer
) -> Path:
    """Measure a model on calibration text and write llama.cpp's file.

    Args:
        model: as typed.
        out: file to write.
        calibration: which text.
        observer: told of progress.

    Raises:
        ModelError: the model is unknown, compressed, or has matrices without a name in llama.cpp.
        TextError: the text is missing or too short.
    """
    source = resolve(model)
    text = build_batches(calibration, load_tokenizer(source.path))
    found = measure_importance(source.path, tuple(text.batches), observer)
    write_imatrix(out, found, dataset=dataset_name(calibration), chunk=calibration.length)
    return out


def dataset_name(calibration: CalibrationConfig) -> str:
    """Of a text, for the file; the folder that it lies in is nobody else's business."""
    if calibration.source is None:
        return f"mix {Path(calibration.mix).stem}"
    local = Path(calibration.source).exists()
    return Path(calibration.source).name if local else calibration.source
