"""Checks that every stage and every export must pass before anything builds on it.

Each failure is one sentence naming the tensor and the rule; all of them are reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from compressor.errors import VerificationError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.types import Fallback, StageResult

_ROWS = 16  # of logits, looked at together
_HALF_SCALE = 2.0**-10  # rounding a scale to fp16 moves a weight by 2^-11 of itself


def verify_tensors(
    parent: Path,
    child: Path,
    changed: Collection[str],
    added: Collection[str] = (),
    *,
    removed: Collection[str] = (),
    resized: Collection[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Compare a stage's checkpoint with its parent, tensor by tensor.

    Every tensor in `changed` must differ from the parent's, every tensor in `added` must be new,
    every tensor in `removed` must be gone, and every tensor in `resized` must be smaller; unless it
    is in `changed` too, it must be made of the parent's rows or columns in their order. Every
    other tensor must be identical to the byte, under the parent's name that `renamed` has for it
    or else under its own. None may hold a NaN or an infinity or be all zero unless the parent's
    is.

    Raises:
        VerificationError: with every rule that is broken.
    """
    before, after = CheckpointReader(parent), CheckpointReader(child)
    origin = {name: renamed.get(name, name) for name in after if name not in set(added)}
    problems = [*_name_problems(set(before), set(after), set(added), set(removed), origin)]
    for name in sorted({*changed, *resized} - set(origin)):
        problems.append(f"{name} was to be changed, but the parent has no such tensor")
    for name in sorted(name for name in origin if origin[name] in before):
        pair = before[origin[name]], after[name]
        if name in resized:
            problems += _cut_problems(name, *pair, name in changed)
        else:
            problems += _tensor_problems(name, *pair, name in changed)
    for name in sorted(set(added) & set(after)):
        problems += value_problems(name, after[name])
    if problems:
        raise VerificationError(
            f"{child.name}: the checkpoint breaks {len(problems)} promises:\n  "
            + "\n  ".join(problems)
        )


def verify_result(parent: Path, result: StageResult) -> None:
    """Compare what a stage left with its parent: what its result says of tensors must be so.

    Raises:
        VerificationError: with every rule that is broken.
    """
    verify_tensors(
        parent,
        result.checkpoint,
        result.changed,
        result.added,
        removed=result.removed,
        resized=result.resized,
        renamed=result.renamed,
    )


def unread_tensors(checkpoint: Path, architecture: Architecture) -> list[Fallback]:
    """One entry for every tensor on disk that no module of the architecture reads."""
    return [
        Fallback(name, f"no module of {architecture.family} reads it", "kept but for GGUF files")
        for name in sorted(set(CheckpointReader(checkpoint)) - used_tensors(checkpoint))
    ]


def used_tensors(checkpoint: Path) -> set[str]:
    """Names of the tensors that a dense model computes with, as its configuration has it."""
    return {name for name, _ in Architecture.from_config(read_config(checkpoint)).tensors()}


def _name_problems(
    before: set[str],
    after: set[str],
    added: set[str],
    removed: set[str],
    origin: Mapping[str, str],
) -> Iterator[str]:
    used = set(origin.values())
    for name in sorted((before - removed - used) | (added - after)):
        yield f"{name} is missing"
    for name, source in sorted(origin.items()):
        if source not in before:
            yield f"{name} is new"
    for name in sorted(added & before):
        yield f"{name} was to be added, but the parent has it already"
    for name in sorted(removed & used):
        yield f"{name} was to be removed, but it is there"
    if len(used) < len(origin):
        yield "two tensors are made of the same one of the parent"


def _tensor_problems(name: str, before: Tensor, after: Tensor, changed: bool) -> Iterator[str]:
    if before.dtype != after.dtype or before.shape != after.shape:
        kinds = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (before, after))
        yield f"{name} went from {' to '.join(kinds)}"
        return
    same = torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (before, after)))
    if changed and same:
        yield f"{name} was to be changed, but is identical to the parent's"
    if not changed and not same:
        yield f"{name} was not to be changed, but differs from the parent's"
    if changed:
        yield from value_problems(name, after, may_be_zero=not before.any())


def _cut_problems(name: str, before: Tensor, after: Tensor, changed: bool) -> Iterator[str]:
    """What is wrong with a tensor that was to become smaller in exactly one dimension."""
    sizes = list(zip(before.shape, after.shape, strict=False))
    cut = [place for place, (old, new) in enumerate(sizes) if new != old]
    smaller = before.ndim == after.ndim and all(new <= old for old, new in sizes)
    if before.dtype != after.dtype or not smaller or len(cut) != 1:
        kinds = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (before, after))
        yield f"{name} was to become smaller in one dimension, but went from {' to '.join(kinds)}"
        return
    yield from value_problems(name, after, may_be_zero=changed or not before.any())
    if not changed and not _is_subsequence(*(_lines(tensor, cut[0]) for tensor in (after, before))):
        yield f"{name} was to be cut, but holds what the parent does not have"


def _lines(tensor: Tensor, dimension: int) -> list[bytes]:
    """Bytes of every row (or column) in order."""
    lines = tensor.movedim(dimension, 0).contiguous()
    return [line.reshape(-1).view(torch.uint8).numpy().tobytes() for line in lines]


def _is_subsequence(part: list[bytes], whole: list[bytes]) -> bool:
    rest = iter(whole)
    return all(line in rest for line in part)


def value_problems(name: str, after: Tensor, *, may_be_zero: bool = False) -> Iterator[str]:
    """What no tensor of a checkpoint may be: NaN or infinite anywhere, or zero everywhere."""
    numbers = after.float() if after.itemsize == 1 else after  # torch looks into no 8-bit float
    if not torch.isfinite(numbers).all():
        yield f"{name} holds a NaN or an infinity"
    if not may_be_zero and not numbers.any():
        yield f"{name} is all zero"


def verify_divergence(parent_logits: Tensor, child_logits: Tensor, stage: str) -> float:
    """KL(parent || child) in nats per token on a probe text, which must be below guessing.

    A model that knows nothing predicts every token alike, at KL = ln V - H(parent); a stage
    whose output is further from its parent than that has destroyed the model.

    Args:
        parent_logits: [tokens, vocabulary].
        child_logits: the same shape.
        stage: for the message.

    Raises:
        VerificationError: at or above the bound, or not a number.
    """
    kl, negative_entropy = 0.0, 0.0
    # In fp64 a row takes five times the memory of its two rows of logits: a few at a time.
    for rows in _few_at_a_time(parent_logits, child_logits):
        parent, child = (torch.log_softmax(logits.double(), -1) for logits in rows)
        kl += float(torch.linalg.vecdot(parent.exp(), parent - child).sum())
        negative_entropy += float(torch.linalg.vecdot(parent.exp(), parent).sum())
    tokens, vocabulary = parent_logits.shape
    kl, bound = kl / tokens, math.log(vocabulary) + negative_entropy / tokens
    if not kl < bound:
        raise VerificationError(
            f"{stage}: the model is destroyed: KL to its parent is {kl:.3g} nats per token, "
            f"and a uniform guess is at {bound:.3g}",
            "use more bits, smaller groups, or another method",
        )
    return kl


def _few_at_a_time(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few rows of both."""
    return zip(*(torch.split(logits, _ROWS) for logits in (first, second)), strict=True)


def verify_export(memory: Tensor, disk: Tensor, name: str, tolerance: float = 0.0) -> float:
    """Largest difference between the logits in memory and those of the export read from disk.

    Raises:
        VerificationError: above `tolerance`.
    """
    pairs = _few_at_a_time(memory, disk)
    found = torch.stack([(a.float() - b.float()).abs().max() for a, b in pairs])
    difference = float(found.max())  # NaN if any is
    if not difference <= tolerance:
        raise VerificationError(
            f"{name}: read back from disk, its logits differ from those in memory by "
            f"{difference:.3g} (allowed: {tolerance:g})"
        )
    return difference


def verify_weights(
    stored: Iterable[tuple[str, Tensor]],
    checkpoint: Path,
    rounded: Collection[str],
    name: str,
    required: Collection[str] | None = None,
) -> float:
    """Compare the dense weights that an export holds with the checkpoint it was made from.

    Matrices with codes may differ by what fp16 does to a scale; everything else is identical.

    Args:
        stored: tensors of the checkpoint, by their names there, as read from the export.
        checkpoint: dense.
        rounded: modules (matrices without `.weight`) that have codes.
        name: for the message.
        required: names that must be among them; all of the checkpoint's by default.

    Returns:
        The largest difference, relative to the largest weight of its matrix; 0 when identical.

    Raises:
        VerificationError: a tensor is missing, is there twice, or differs by more.
    """
    dense, worst = CheckpointReader(checkpoint), 0.0
    left = set(dense)
    for tensor, value in stored:
        if tensor not in left:
            raise VerificationError(f"{name}: {tensor} is not in the checkpoint, or is there twice")
        left.remove(tensor)
        difference = _relative_difference(value, dense[tensor])
        allowed = _HALF_SCALE if tensor.removesuffix(".weight") in rounded else 0.0
        if not difference <= allowed:
            raise VerificationError(
                f"{name}: read back from disk, {tensor} differs from memory by {difference:.3g} "
                f"of its largest value (allowed: {allowed:.3g})"
            )
        worst = max(worst, difference)
    if missing := left if required is None else left & set(required):
        raise VerificationError(f"{name}: {min(missing)} is missing")
    return worst


def _relative_difference(stored: Tensor, dense: Tensor) -> float:
    if stored.shape != dense.shape:
        return math.inf
    largest = float(dense.float().abs().max())
    difference = float((stored.float() - dense.float()).abs().max())
    return difference / largest if largest else difference
