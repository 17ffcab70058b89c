"""Frozen values that cross module borders. No behaviour beyond their own arithmetic.

Torch is imported for annotations only, so that the command line starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Symmetry = Literal["symmetric", "full_range", "asymmetric"]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it stands, the rule, what would work."""

    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: " if self.line else ""
        hint = f"\n  → {self.hint}" if self.hint else ""
        return f"{place}{self.message}{hint}"


@dataclass(frozen=True)
class WeightScheme:
    """An integer grid for a weight matrix of shape [out, in].

    Attributes:
        bits: width of one code, 2 to 8.
        group_size: inputs that share one scale; None means one scale per output channel.
        symmetry: `symmetric` (scale > 0, no zero-point), `full_range` (the scale is signed so
            that the element of largest magnitude lands on -2^(bits-1)), or `asymmetric`.
    """

    bits: int
    group_size: int | None
    symmetry: Symmetry = "symmetric"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; signed for every symmetry, as compressed-tensors has it."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups along an input dimension that the group size divides."""
        return 1 if self.group_size is None else in_features // self.group_size


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of a matrix are rounded while the model runs.

    Every token has one scale, which its own largest magnitude decides ("dynamic"), and no
    zero-point; nothing is calibrated and nothing stored.

    Attributes:
        number: what the inputs become: integers or floating-point numbers.
        bits: width of one of them.
    """

    number: Literal["int", "float"]
    bits: int

    @property
    def name(self) -> str:
        """As recipes write it, such as `int8`."""
        return f"{'int' if self.number == 'int' else 'fp'}{self.bits}"


ACTIVATIONS: Mapping[str, ActivationScheme] = {
    scheme.name: scheme for scheme in (ActivationScheme("int", 8),)
}
"""Every rounding of inputs that exists, by its name in recipes."""


@dataclass(frozen=True)
class QTensor:
    """What a rounder produced for one matrix: weight = scale * (codes - zero_point).

    Attributes:
        codes: int8 [out, in], within `scheme.code_range`.
        scale: [out, groups] in the dtype it is stored in (bf16, fp16 or fp32).
        zero_point: int8 [out, groups] within `scheme.code_range`, or None when symmetric.
        scheme: the grid.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: WeightScheme

    def dequantize(self) -> Tensor:
        """Dense weight [out, in] in the dtype of `scale`.

        The arithmetic (subtract and multiply in the scale's dtype) is the one that
        compressed-tensors performs at load, so that dense and packed checkpoints agree bit for bit.
        """
        out, in_features = self.codes.shape
        groups = self.scale.shape[1]
        codes = self.codes.to(self.scale.dtype).view(out, groups, in_features // groups)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(self.scale.dtype).unsqueeze(-1)
        return (codes * self.scale.unsqueeze(-1)).view(out, in_features)


@dataclass(frozen=True)
class Fallback:
    """A method did something other than what was asked; recorded, never silent."""

    module: str
    reason: str
    action: str


@dataclass(frozen=True)
class ModuleMetric:
    """What a stage did to one matrix.

    Attributes:
        module: name of the matrix on disk, without `.weight`.
        bits: bits per weight including scales and zero-points.
        loss: relative layer error tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - Ŵ (H = I without data).
        baseline_loss: the same for the simple method (round to nearest on a min-max grid).
    """

    module: str
    bits: float
    loss: float
    baseline_loss: float


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Attributes:
        checkpoint: directory of a plain, loadable Hugging Face checkpoint.
        changed: names on disk of every tensor the stage was meant to change.
        added: names on disk of every tensor that the parent does not have.
        removed: names on disk of every tensor of the parent that is gone.
        resized: names of tensors that are smaller than the parent's; unless they are in `changed`
            too, they are made of the parent's rows or columns, in order.
        renamed: by name here, the parent's name of every tensor that moved (blocks move up when
            earlier ones go). All other fields but `removed` use the name here.
        metrics: one entry per matrix.
        fallbacks: everything that was done otherwise than asked.
        notes: facts for the report, by name (for example the mean layer loss).
    """

    checkpoint: Path
    changed: tuple[str, ...]
    metrics: tuple[ModuleMetric, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids that go through a model together.

    Attributes:
        input_ids: int64 [batch, length], right-padded.
        mask: bool [batch, length], False on padding; padding never enters a statistic.
        domains: the domain of each row.
    """

    input_ids: Tensor
    mask: Tensor
    domains: tuple[str, ...]


@dataclass(frozen=True)
class Device:
    """Where and in what precision a model is run."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class BlockRecord:
    """What a stage did to one decoder block; journaled when the block is safely on disk.

    `notes` hold what the stage learned on the way and needs to go on behind this block.
    """

    block: int
    metrics: tuple[ModuleMetric, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)
