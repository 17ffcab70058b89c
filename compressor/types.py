"""Frozen values that cross module borders. No behaviour beyond their own arithmetic.

Torch is imported for annotations only, so that the command line starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Symmetry = Literal["symmetric", "full_range", "asymmetric"]
Number = Literal["int", "float", "nf4", "absmax"]
Scales = Literal["dense", "e8m0", "e4m3"]

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Dtypes as the header of a safetensors file names them -> as torch does."""


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
    """A grid for a weight matrix of shape [out, in].

    Attributes:
        bits: width of one code: 2 to 8 for integers, 4 (e2m1) or 8 (e4m3) for floats.
        group_size: inputs that share one scale; None means one scale per output channel.
        symmetry: `symmetric` (scale > 0, no zero-point), `full_range` (the scale is signed so
            that the element of largest magnitude lands on -2^(bits-1)), or `asymmetric`.
        number: what a code stands for before it is scaled: itself; a floating-point number; and,
            with the largest magnitude of a group as its scale (bitsandbytes), an entry of `NF4`
            or, in `absmax`, the code over 127.
        scales: how scales are stored: `dense`, like the weights they replace; `e8m0`, powers of
            two; `e4m3`, 8-bit floats that one fp32 number for the whole matrix divides.
        rows: output channels that share one scale.
    """

    bits: int
    group_size: int | None
    symmetry: Symmetry = "symmetric"
    number: Number = "int"
    scales: Scales = "dense"
    rows: int = 1

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; signed for every symmetry, as compressed-tensors has it.

        A float's code is the bit pattern of its magnitude under its sign, so that codes are in the
        order of what they stand for: e2m1 ends at 6 (code 7), e4m3 at 448 (code 126).
        """
        if self.number == "absmax":
            return -127, 127
        if self.number == "float":
            largest = (1 << (self.bits - 1)) - (1 if self.bits == 4 else 2)  # e4m3 ends in a NaN
            return -largest, largest
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups along an input dimension that the group size divides."""
        return 1 if self.group_size is None else in_features // self.group_size


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of a matrix are rounded while the model runs.

    Every token has one scale, or one for each group of inputs, which its own largest magnitude
    decides ("dynamic"), and no zero-point; nothing is calibrated and nothing stored.

    Attributes:
        number: what the inputs become: integers or floats (e4m3).
        bits: width of one of them.
        group_size: inputs of a token that share one scale; None for all of them.
        threshold: of number `absmax` (LLM.int8): inputs of this magnitude, and all others in their
            columns of the tokens that go through together, are not rounded; 0 for none of them.
    """

    number: Number
    bits: int
    group_size: int | None = None
    threshold: float = 0.0

    @property
    def kernel(self) -> str:
        """What engines know the rounding by: its name without the threshold."""
        return self.name.partition(_UP_TO)[0]

    @property
    def name(self) -> str:
        """Such as `int8`, `fp8-g128` or `llm-int8-below-6.0`."""
        if self.number == "absmax":
            return f"llm-int8{_UP_TO}{self.threshold!r}"
        group = "" if self.group_size is None else f"-g{self.group_size}"
        return f"{'int' if self.number == 'int' else 'fp'}{self.bits}{group}"


_UP_TO = "-below-"

ACTIVATIONS: Mapping[str, ActivationScheme] = {
    scheme.name: scheme
    for scheme in (
        ActivationScheme("int", 8),
        ActivationScheme("float", 8),
        ActivationScheme("float", 8, 128),
    )
}
"""Every rounding of inputs that has no threshold, by name."""


def activation_scheme(name: str) -> ActivationScheme | None:
    """The rounding of inputs of that name; None when there is none."""
    kernel, _, threshold = name.partition(_UP_TO)
    if kernel != "llm-int8":
        return ACTIVATIONS.get(name)
    try:
        return ActivationScheme("absmax", 8, threshold=float(threshold))
    except ValueError:
        return None


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are rounded on their way into the cache: to floats of 8 bits (e4m3).

    Attributes:
        scales: by block, what keys and what values are divided by before; empty while planned.
    """

    name: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8

    scales: tuple[tuple[float, float], ...] = ()


FLOATS: Mapping[int, tuple[int, int]] = {4: (1, 1), 8: (3, 7)}
"""Bits of the mantissa and bias of the exponent, by width: e2m1 and e4m3 (OCP, 2023)."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What codes -8 to 7 stand for: quantiles of a Gaussian (QLoRA, arXiv:2305.14314, appendix E)."""

_OVER_127 = 7.874015718698502e-3  # as bitsandbytes has it


@dataclass(frozen=True)
class QTensor:
    """What a rounder produced for one matrix: weight = scale * (codes - zero_point).

    Codes of a float grid stand for floats, which take the place of `codes - zero_point`, and so do
    those of `nf4`; those of `absmax` are divided by 127. Matrices of one shape may come as a batch;
    `*` is its size, and nothing for a single matrix.

    Attributes:
        codes: int8 [*, out, in], within `scheme.code_range`.
        scale: [*, out / rows, groups] in the dtype of the dense weight (bf16, fp16 or fp32); what
            the scheme stores in fewer bits is exact in it.
        zero_point: int8 [*, out, groups] within `scheme.code_range`, or None when symmetric.
        scheme: the grid.
        divisor: fp32 [*, 1], by which every scale is divided; None unless scales are `e4m3`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: WeightScheme
    divisor: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Dense weight [*, out, in] in the dtype of `scale`.

        The arithmetic (subtract and multiply in the scale's dtype, in fp32 if scales are divided
        or largest magnitudes) is the one that compressed-tensors or bitsandbytes performs, so that
        dense and packed checkpoints agree bit for bit.
        """
        scale = step_sizes(self.scale, self.divisor, self.scheme)
        grouped = self.numbers().to(scale.dtype).view(*scale.shape, -1)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(scale.dtype).unsqueeze(-1)
        weight = grouped * scale.unsqueeze(-1)
        if self.scheme.number == "absmax":
            weight = weight * _OVER_127
        return weight.flatten(-2).to(self.scale.dtype)

    def numbers(self) -> Tensor:
        """What the codes [*, out, in] stand for before zero-point and scale: int8, or fp32."""
        if self.scheme.number in ("int", "absmax"):
            return self.codes
        if self.scheme.number == "nf4":
            return self.codes.float().new_tensor(NF4)[self.codes.int() + 8]
        mantissa_bits, bias = FLOATS[self.scheme.bits]
        magnitude = self.codes.int().abs()
        exponent = magnitude >> mantissa_bits
        normal = exponent.clamp_max(1)  # exponent 0: subnormal, without the leading one
        fraction = (magnitude & (1 << mantissa_bits) - 1) + (normal << mantissa_bits)
        units = fraction << (exponent - normal)
        return (units * self.codes.sign()).float() * 2.0 ** (1 - bias - mantissa_bits)

    def rows(self, start: int, stop: int) -> QTensor:
        """The part that belongs to output channels from `start` up to `stop`.

        Both are multiples of the channels that share a scale.
        """
        zero_point = None
        if self.zero_point is not None:
            zero_point = self.zero_point[..., start:stop, :].contiguous()
        shared = self.scheme.rows
        scale = self.scale[..., start // shared : stop // shared, :].contiguous()
        codes = self.codes[..., start:stop, :].contiguous()
        divisor = None if self.divisor is None else self.divisor.clone()  # parts share no memory
        return replace(self, codes=codes, scale=scale, zero_point=zero_point, divisor=divisor)

    def members(self) -> list[QTensor]:
        """The matrices of a batch; a single one is its only member."""
        if self.codes.ndim == 2:
            return [self]
        zeros = repeat(None) if self.zero_point is None else self.zero_point
        divisors = repeat(None) if self.divisor is None else self.divisor
        parts = zip(self.codes, self.scale, zeros, divisors, strict=False)
        return [QTensor(c, s, zero, self.scheme, divisor) for c, s, zero, divisor in parts]


def step_sizes(scale: Tensor, divisor: Tensor | None, scheme: WeightScheme) -> Tensor:
    """What numbers are multiplied with, [*, out, groups], from scales as they are stored."""
    if scheme.number in ("nf4", "absmax"):
        return scale.float()
    divided = scale if divisor is None else scale.float() / divisor.unsqueeze(-1)
    return divided if scheme.rows == 1 else divided.repeat_interleave(scheme.rows, -2)


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
        baseline_loss: the same for the simple method: round to nearest on a min-max grid,
            deletion without compensation, or rounding without the transform.
    """

    module: str
    bits: float
    loss: float
    baseline_loss: float


@dataclass(frozen=True)
class MixturePoint:
    """Domains at one moment of a stage that weighs them.

    Attributes:
        at: number of the update, block or round.
        shares: of every domain, summing to 1.
        losses: nats per token on held-out text, of the domains that have some.
    """

    at: int
    shares: dict[str, float]
    losses: dict[str, float] = field(default_factory=dict)


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
        mixture: shares of the domains over time; empty when the stage weighs none.
        mixture_unit: what `MixturePoint.at` counts: `update`, `block` or `round`.
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
    mixture: tuple[MixturePoint, ...] = ()
    mixture_unit: str = "update"


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
