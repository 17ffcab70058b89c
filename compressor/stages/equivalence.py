"""Prove that a transform left the function of a model alone: both models side by side.

The check streams blocks, so that its memory is bounded by a block. It compares what the transform
computed before rounding to the checkpoint's dtype: in bf16 storage alone moves the logits by more
than any mistake worth catching. That the disk holds these tensors, rounded once, is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compressor.errors import VerificationError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.walk import BlockWalk
from compressor.stages.context import StageContext
from compressor.types import TokenBatch

TOLERANCE = 1e-4
"""Largest difference of fp32 logits; relative to the largest logit where that is above 1."""

_SEQUENCES, _TOKENS = 2, 32

Exact = Callable[[Iterable[str]], dict[str, Tensor]]
"""Given names on disk, those of the tensors that a transform changes, in fp32 and not rounded."""


def logit_difference(
    parent: Path, child: Path, exact: Exact, context: StageContext, tolerance: float = TOLERANCE
) -> float:
    """Largest difference between the logits of a checkpoint and those of its transform, in fp32.

    The probe is random tokens: an identity of functions holds for any.

    Args:
        parent: checkpoint before the transform.
        child: checkpoint that the transform wrote, in any dtype.
        exact: what the transform computed for `child`.
        context: device, scratch folder, progress.
        tolerance: see `TOLERANCE`.

    Raises:
        VerificationError: above the tolerance, or `child` holds something else.
    """
    after = Architecture.from_config(read_config(child))
    walk = context.walk(parent, [_probe(after)], dtype=torch.float32, folder="equivalence")
    written = CheckpointReader(child)
    embedding, head = after.matrices[0].tensor, _head(after)

    def transformed(names: Iterable[str]) -> dict[str, Tensor]:
        tensors = exact(names)
        _require_written(tensors, written)
        return tensors

    # Embedding and head are the largest tensors of small models: one at a time.
    hidden = walk.embedded_with(0, _either(embedding, transformed([embedding]), walk))
    with context.observer.task("comparing the function", after.layers) as task:
        for block in walk.blocks():
            hidden = block.run_with(0, hidden, transformed(block.names))
            task.advance()
    inside = (embedding, head, f"{after.blocks_path}.")
    small = transformed([name for name in written if not name.startswith(inside)])
    expected = walk.logits(next(walk.final_hidden()))
    found = walk.logits_with(0, hidden, small, _either(head, transformed([head]), walk))
    return require_equal(expected, found, child.name, tolerance)


def require_equal(expected: Tensor, found: Tensor, stage: str, tolerance: float) -> float:
    """Largest difference of two tensors of logits.

    Raises:
        VerificationError: it is above `tolerance`, times the largest logit if that is above 1.
    """
    difference = float((expected - found).abs().max())
    bound = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= bound:
        raise VerificationError(
            f"{stage}: the stage must not change the model's function, but it moves a logit by "
            f"{difference:.3g} in fp32 (allowed: {bound:.2g})",
            "this is a fault of ours, or the model computes something that its config.json hides",
        )
    return difference


def _probe(architecture: Architecture) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, architecture.max_positions)
    ids = torch.randint(0, architecture.vocab, (_SEQUENCES, length), generator=generator)
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("probe",) * _SEQUENCES)


def _head(architecture: Architecture) -> str:
    role = "embed" if architecture.tied else "head"
    return next(matrix.tensor for matrix in architecture.matrices if matrix.role == role)


def _either(name: str, transformed: Mapping[str, Tensor], walk: BlockWalk) -> Tensor:
    return transformed[name] if name in transformed else walk.tensor(name)


def _require_written(transformed: Mapping[str, Tensor], written: CheckpointReader) -> None:
    for name, value in transformed.items():
        stored = written[name]
        # Rounding fp64 → fp32 → bf16 may differ from fp64 → bf16 by one unit in the last place.
        kind = torch.finfo(stored.dtype)
        unit = kind.eps * stored.float().abs() + kind.tiny
        if not bool(((stored.float() - value).abs() <= unit).all()):
            raise VerificationError(f"{name} is not stored as the transform computed it")
