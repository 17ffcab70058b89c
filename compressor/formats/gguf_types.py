"""What llama.cpp's own quantizer makes: its types, what they need and weigh. No torch.

A type such as `Q4_K_M` is a mixture: the quantizer chooses a kind of block for each matrix, more
bits for those that matter more. K- and I-quants have blocks of 256 inputs; where these do not
divide a matrix, it takes blocks of 32 (`tensor_type_fallback` in llama.cpp's `llama-quant.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

QuantType = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M",
    "IQ4_NL", "IQ4_XS",
]  # fmt: skip

GgufType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
"""Blocks of 32 inputs, which hold our codes and which the package gguf rounds to."""

SUPER_BLOCK = 256  # inputs
_BITS = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q6_K": 6.5625,
    "IQ4_NL": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """A type of the quantizer.

    Attributes:
        bits: of a weight of Llama-3.1-8B, as llama.cpp's documents have it (embeddings counted);
            of every weight, where all matrices get one kind of block.
        instead: kind of block for matrices that blocks of 256 do not divide; empty for types whose
            blocks have 32 inputs.
        needs_importance: whether the quantizer refuses to work without an importance matrix.
    """

    bits: float
    instead: str = ""
    needs_importance: bool = False


MIXTURES: Mapping[QuantType, Mixture] = {
    "Q4_0": Mixture(4.5),
    "Q4_1": Mixture(5.0),
    "Q5_0": Mixture(5.5),
    "Q5_1": Mixture(6.0),
    "Q8_0": Mixture(8.5),
    "Q2_K": Mixture(3.1593, "Q4_0"),
    "Q2_K_S": Mixture(2.9697, "Q4_0", needs_importance=True),
    "Q3_K_S": Mixture(3.6429, "Q4_0"),
    "Q3_K_M": Mixture(3.9960, "Q4_0"),
    "Q3_K_L": Mixture(4.2979, "Q4_0"),
    "Q4_K_S": Mixture(4.6672, "Q5_0"),
    "Q4_K_M": Mixture(4.8944, "Q5_0"),
    "Q5_K_S": Mixture(5.5704, "Q5_1"),
    "Q5_K_M": Mixture(5.7036, "Q5_1"),
    "Q6_K": Mixture(6.5633, "Q8_0"),
    "IQ1_S": Mixture(2.0042, "IQ4_NL", needs_importance=True),
    "IQ1_M": Mixture(2.1460, "IQ4_NL", needs_importance=True),
    "IQ2_XXS": Mixture(2.3824, "IQ4_NL", needs_importance=True),
    "IQ2_XS": Mixture(2.5882, "IQ4_NL", needs_importance=True),
    "IQ2_S": Mixture(2.7403, "IQ4_NL", needs_importance=True),
    "IQ2_M": Mixture(2.9294, "IQ4_NL", needs_importance=True),
    "IQ3_XXS": Mixture(3.2548, "IQ4_NL", needs_importance=True),
    "IQ3_XS": Mixture(3.4977, "IQ4_NL", needs_importance=True),
    "IQ3_S": Mixture(3.6606, "IQ4_NL"),
    "IQ3_M": Mixture(3.7628, "IQ4_NL"),
    "IQ4_NL": Mixture(4.6818),
    "IQ4_XS": Mixture(4.4597, "IQ4_NL"),
}


def matrix_bits(kind: QuantType, shape: tuple[int, int], *, outer: bool = False) -> float:
    """Bits of a weight of one matrix, estimated: the mean of the mixture, or of what stands in.

    Args:
        kind: type of the quantizer.
        shape: [out, in].
        outer: of an embedding or a head, which K- and I-quants keep in Q6_K or Q8_0.
    """
    mixture = MIXTURES[kind]
    divides = shape[1] % SUPER_BLOCK == 0
    if not mixture.instead:
        return mixture.bits
    if outer:
        return _BITS["Q6_K" if divides else "Q8_0"]
    return mixture.bits if divides else _BITS[mixture.instead]


def estimated_bytes(kind: QuantType, shapes: Iterable[tuple[tuple[int, int], bool]]) -> int:
    """Of matrices (shape, whether embedding or head) together."""
    bits = sum(math.prod(shape) * matrix_bits(kind, shape, outer=outer) for shape, outer in shapes)
    return round(bits / 8)


def instead(kind: QuantType) -> str:
    """Kind of block, and its bits, of matrices that blocks of 256 do not divide."""
    name = MIXTURES[kind].instead
    return f"{name} ({_BITS[name]} bits)"


def undivided(kind: QuantType, shapes: Iterable[tuple[int, int]]) -> int:
    """How many matrices have widths that the blocks of the type do not divide."""
    if not MIXTURES[kind].instead:
        return 0
    return sum(shape[1] % SUPER_BLOCK != 0 for shape in shapes)
