"""Exports that round what the chain left alone: llama.cpp's quantizer, or an embedding for GGUF.

The quantizer is a program of its own (`formats.llama_quantize`). It gets the dense weights that the
last stage left and the mean squares of their inputs; nothing of what it makes comes from our codes.
So its file is read back, unpacked, and measured against the original like what a stage leaves, and
the report gives it a row and says whose work it is.

An embedding that the chain left dense can be rounded for a GGUF file alone (`export.embedding`), to
nearest, by the package gguf. The rest of such a file are our codes, which is checked; but it is not
the model that the last stage left, so that it has its own row as well.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.calibration import CalibrationConfig, CalibrationSet
from compressor.errors import VerificationError
from compressor.formats import exporters, llama_quantize
from compressor.formats.gguf_types import MIXTURES, SUPER_BLOCK, QuantType
from compressor.formats.imatrix import write_imatrix
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import SizeReport
from compressor.importance import dataset_name, measure_importance
from compressor.machine import cores
from compressor.meter import Meter
from compressor.progress import Observer
from compressor.report.schema import Artifact, StageFacts, StageFallback, Variant
from compressor.sections import ExportConfig
from compressor.types import Fallback
from compressor.variants import size_of
from compressor.verify import used_tensors, value_problems, verify_weights

METHOD = "export.gguf"
_DENSE, _IMPORTANCE = "dense.gguf", "imatrix.gguf"


@dataclass(frozen=True)
class Text:
    """What an importance matrix is measured on."""

    config: CalibrationConfig
    tokens: CalibrationSet


@dataclass(frozen=True)
class Requantized:
    """An export of a second quantizer: a row of the report.

    Attributes:
        config: of the export.
        parent: id of the variant whose weights it rounded.
        facts: what `write` returned.
        artifact: the deliverable.
    """

    config: ExportConfig
    parent: str
    facts: Mapping[str, Any]
    artifact: Artifact

    @property
    def id(self) -> str:
        """Name of the row, and of the folder."""
        return self.config.name

    def row(self, size: SizeReport, base_bytes: int, kv_bytes_per_token: int) -> Variant:
        """Its row of the report."""
        config = self.config
        params: dict[str, Any] = {"type": config.type, "imatrix": config.imatrix}
        if config.blocks is not None:
            params = {"embedding": config.blocks}
        stage = StageFacts(
            method=METHOD,
            params={**params, "quantizer": self.facts["quantizer"]},
            seconds=self.facts["seconds"],
            peak_bytes=self.facts["peak_bytes"],
            device_peak_bytes=self.facts.get("device_peak_bytes", 0),
            fallbacks=tuple(StageFallback(**fallback) for fallback in self.facts["fallbacks"]),
            notes={"relative_weight_error": self.facts["relative_error"]},
        )
        return Variant(
            id=self.id,
            label=f"embedding {config.blocks}" if config.blocks else f"{config.type}, llama.cpp",
            parent=self.parent,
            stage=stage,
            size=size_of(size, base_bytes, kv_bytes_per_token),
            artifact=self.artifact,
            load_snippets=self.artifact.load_snippets,
        )


def write(
    config: ExportConfig,
    source: exporters.Source,
    out: Path,
    scratch: Path,
    text: Text | None,
    observer: Observer,
) -> dict[str, Any]:
    """Round what the chain left dense, and look at what was made.

    Args:
        config: has a type, or blocks for the embedding.
        source: weights, and codes that go in as they are unless there is a type.
        out: folder of the deliverable.
        scratch: for the dense GGUF file and the importance matrix, which later types use again.
        text: for the importance matrix; None without one.
        observer: told of progress.

    Returns:
        Facts for the journal: quantizer, seconds, peaks of memory, relative_error, fallbacks.

    Raises:
        ResourceError: the program is missing or failed.
        VerificationError: what it wrote is not the model.
    """
    with Meter() as meter:
        if config.type is None:
            quantizer = _round_embedding(source, out)
        else:
            quantizer = _round_all(config.type, source, out, scratch, text, observer)
        error = relative_error(out, source.checkpoint)
    narrow = [] if config.type is None else narrow_matrices(out, config.type)
    fallbacks = [asdict(fallback) for fallback in narrow]
    for fallback in fallbacks:
        observer.event("fallback", **fallback)
    return {
        "quantizer": quantizer,
        "seconds": meter.seconds,
        **meter.peaks(),
        "relative_error": error,
        "fallbacks": fallbacks,
    }


def _round_all(
    kind: QuantType,
    source: exporters.Source,
    out: Path,
    scratch: Path,
    text: Text | None,
    observer: Observer,
) -> str:
    """Let llama.cpp's quantizer round all matrices; its name and version."""
    program, gguf = llama_quantize.require_program(), exporters.exporter("gguf")
    dense, importance = scratch / _DENSE, scratch / _IMPORTANCE
    if not dense.is_file():
        gguf.write(replace(source, codes={}), scratch)
        (scratch / "model.gguf").replace(dense)
    if text is not None and not importance.is_file():
        found = measure_importance(source.checkpoint, text.tokens.batches, observer)
        name, chunk = dataset_name(text.config), text.config.length
        write_imatrix(importance, found, dataset=name, chunk=chunk)
    version = llama_quantize.quantize(
        program,
        dense,
        out / "model.gguf",
        kind,
        importance=None if text is None else importance,
        threads=cores(),
    )
    return f"{llama_quantize.PROGRAM} {version}"


def _round_embedding(source: exporters.Source, out: Path) -> str:
    """Write our codes with a rounded embedding; the name and version of what rounded it.

    Raises:
        VerificationError: anything else is not what is in memory.
    """
    from compressor.formats.gguf import rounded_here

    exporters.exporter("gguf").write(source, out)
    own, rounded = CheckpointReader(source.checkpoint), rounded_here(source)
    others = ((name, own[name] if name in rounded else value) for name, value in _stored(out))
    required = used_tensors(source.checkpoint)
    verify_weights(others, source.checkpoint, source.codes, out.name, required)
    return f"gguf {importlib.metadata.version('gguf')}"


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    read = exporters.exporter("gguf").read
    assert read is not None
    return read(folder)


def relative_error(folder: Path, checkpoint: Path) -> float:
    """‖Ŵ − W‖ / ‖W‖ over all matrices, of a rounded file against its dense weights.

    Raises:
        VerificationError: a tensor is missing, has another shape, holds a NaN or nothing, or is
            further from its weights than all zeros are; or a vector was changed.
    """
    dense, left = CheckpointReader(checkpoint), set(CheckpointReader(checkpoint))
    error = norm = 0.0
    for name, value in _stored(folder):
        if name not in left:
            raise VerificationError(f"{folder.name}: {name} is not in the checkpoint, or is twice")
        left.remove(name)
        before = dense[name].float()
        if value.shape != before.shape:
            raise VerificationError(f"{folder.name}: {name} has the shape {list(value.shape)}")
        for problem in value_problems(name, value, may_be_zero=not before.any()):
            raise VerificationError(f"{folder.name}: {problem}")
        own, whole = (float(t.double().square().sum()) for t in (value.float() - before, before))
        if own > (whole if before.ndim > 1 else 0.0):
            raise VerificationError(f"{folder.name}: {name} is not the weight that was rounded")
        error, norm = error + own, norm + whole
    if missing := left & used_tensors(checkpoint):
        raise VerificationError(f"{folder.name}: {min(missing)} is missing")
    return math.sqrt(error / norm)


def narrow_matrices(folder: Path, kind: QuantType) -> list[Fallback]:
    """What the quantizer stored in other blocks, because the type's do not divide it."""
    import gguf

    if not MIXTURES[kind].instead:
        return []
    found: Counter[tuple[int, str]] = Counter()
    for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
        if len(tensor.shape) == 2 and tensor.shape[0] % SUPER_BLOCK:
            found[int(tensor.shape[0]), tensor.tensor_type.name] += 1
    return [
        Fallback(
            f"{count} matrices",
            f"blocks of {kind} have {SUPER_BLOCK} inputs, which do not divide {width}",
            f"llama-quantize stored them as {stored}",
        )
        for (width, stored), count in sorted(found.items())
    ]
