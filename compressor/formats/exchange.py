"""What GPTQ, AWQ and GGUF can hold of our grids, and its bytes by formula. No torch.

- *GPTQ* (AutoGPTQ's layout, `quant_method: gptq`): 2, 3, 4, 8 bits, packed along the input, with
  packed zero-points along the output, so both dimensions must fill 32-bit words. Linear layers.
- *AWQ* (`version: gemm`): 4 bits, packed along the output in words of eight; one grid for all.
- *bitsandbytes*: NF4 in blocks, or LLM.int8's rows, of linear layers, one of the two in a
  model; nothing else, and no other container holds those.
- *GGUF*: blocks of 32 inputs with an fp16 scale, so any group that 32 divides is repeated block
  by block, which is exact, and costs more bits than larger groups would need. Codes of 2, 3 and 4
  bits go into Q4_0 (symmetric) or Q4_1; 5 into Q5_0 or Q5_1; 6 to 8, symmetric, into Q8_0.
- *llama-quantize*: the same file, rounded by llama.cpp's quantizer from weights that nothing has
  rounded before.

Scales are fp16 in GPTQ, AWQ and GGUF. A bf16 scale is an fp16 number between 2^-17 and 65504;
exporters check every scale, and refuse one that fp16 would change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from compressor.formats.capabilities import ENVIRONMENTS, Container
from compressor.formats.gguf_types import GgufType
from compressor.formats.sizes import PackedSize, packed_bytes
from compressor.formats.support import (
    ABSMAX,
    LAYOUTS,
    Target,
    export_problems,
    layout_of,
    loads_beside_others,
)
from compressor.types import WeightScheme

GGUF_BLOCK = 32  # inputs
GPTQ_BITS = (2, 3, 4, 8)
GGUF_FAMILIES: Mapping[str, str] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
"""`model_type` -> llama.cpp's architecture, of the families whose tensors we can name."""

GGUF_BLOCK_BYTES: Mapping[GgufType, int] = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34,
}  # fmt: skip
_SYMMETRIC_TYPES: Mapping[int, GgufType] = {
    2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0",
}  # fmt: skip
_ASYMMETRIC_TYPES: Mapping[int, GgufType] = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}


def gguf_type(scheme: WeightScheme) -> GgufType | None:
    """The block type that holds codes of this scheme exactly; None when there is none."""
    asymmetric = scheme.symmetry == "asymmetric"
    return (_ASYMMETRIC_TYPES if asymmetric else _SYMMETRIC_TYPES).get(scheme.bits)


def container_problems(
    targets: Sequence[Target], container: Container, model_type: str = ""
) -> list[str]:
    """Why these matrices cannot be exported to `container`; one sentence per broken rule.

    Args:
        targets: every matrix of the model.
        container: `dense` and graphs hold anything.
        model_type: of the configuration.
    """
    if container in LAYOUTS:
        return export_problems(targets, container)
    if container == "dense" or container in ENVIRONMENTS:  # weights as they compute
        return []
    if container == "llama-quantize":
        return [*_rounded_twice(targets), *_family_problems(model_type)]
    quantized = [(target, target.scheme) for target in targets if target.scheme is not None]
    rule = _RULES[container]
    others = [(target, scheme) for target, scheme in quantized if scheme.number in ABSMAX]
    if others and container != "bitsandbytes":
        target, scheme = others[0]
        return [f"{target.name} is {ABSMAX[scheme.number]}, which only bitsandbytes holds"]
    floats = [target for target, scheme in quantized if scheme.number == "float"]
    if floats and container != "bitsandbytes":
        return [f"{floats[0].name} has a float grid, and {container} holds integer codes"]
    problems = [sentence for target, scheme in quantized for sentence in rule(target, scheme)]
    if container == "awq" and len(schemes := {scheme for _, scheme in quantized}) > 1:
        problems.append(f"AWQ has one grid for all matrices, and here there are {len(schemes)}")
    if container == "bitsandbytes" and not problems:
        problems += _mixed_problems(quantized)
    if container == "gguf":
        problems += _family_problems(model_type)
    return problems


def _family_problems(model_type: str) -> Iterable[str]:
    if model_type not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        yield f"GGUF export names the tensors of {known}, not of {model_type or '?'}"


def _rounded_twice(targets: Iterable[Target]) -> Iterable[str]:
    for target in targets:
        if target.scheme is not None:
            yield (
                f"{target.name} is rounded to {target.scheme.bits} bits by the chain; llama.cpp's "
                "quantizer would round it a second time"
            )


def _linear_only(target: Target, name: str) -> Iterable[str]:
    if target.kind not in ("linear", "head"):
        yield f"{target.name} is an {target.kind}; {name} holds linear layers"


def _grouped(target: Target, scheme: WeightScheme) -> Iterable[str]:
    if scheme.group_size is not None and target.shape[1] % scheme.group_size:
        yield f"{target.name} has {target.shape[1]} inputs, not a multiple of {scheme.group_size}"


def _gptq_problems(target: Target, scheme: WeightScheme) -> Iterable[str]:
    yield from _linear_only(target, "GPTQ")
    yield from _grouped(target, scheme)
    if scheme.bits not in GPTQ_BITS:
        yield f"{target.name} has {scheme.bits}-bit codes; GPTQ packs 2, 3, 4 and 8"
    elif any(size * scheme.bits % 32 for size in target.shape):
        shape = list(target.shape)
        yield f"{target.name} is {shape}; rows of {scheme.bits}-bit codes must fill 32-bit words"


def _awq_problems(target: Target, scheme: WeightScheme) -> Iterable[str]:
    yield from _linear_only(target, "AWQ")
    yield from _grouped(target, scheme)
    if scheme.bits != 4:
        yield f"{target.name} has {scheme.bits}-bit codes; AWQ packs 4"
    if target.shape[0] % 8:
        yield f"{target.name} has {target.shape[0]} outputs; AWQ packs eight to a word"


def _gguf_problems(target: Target, scheme: WeightScheme) -> Iterable[str]:
    if target.kind in ("expert", "router", "conv1d"):
        yield f"{target.name} is an {target.kind}, which GGUF export does not write quantized"
    yield from _grouped(target, scheme)
    if gguf_type(scheme) is None:
        yield f"{target.name} is {scheme.bits}-bit {scheme.symmetry}; no block of GGUF holds it"
    if (scheme.group_size or target.shape[1]) % GGUF_BLOCK:
        size = scheme.group_size or f"{target.shape[1]} inputs (one per channel)"
        yield f"{target.name} has groups of {size}; blocks of GGUF have {GGUF_BLOCK} inputs"


def _bitsandbytes_problems(target: Target, scheme: WeightScheme) -> Iterable[str]:
    if target.kind != "linear":
        yield f"{target.name} is an {target.kind}; bitsandbytes export writes linear layers"
    if scheme.number not in ABSMAX:
        yield (
            f"{target.name} is not NF4 or rounded for LLM.int8, which is all that bitsandbytes "
            "holds: use quantize.bnb"
        )
    yield from _grouped(target, scheme)


def _mixed_problems(quantized: Sequence[tuple[Target, WeightScheme]]) -> Iterable[str]:
    if len({scheme.number for _, scheme in quantized}) > 1:
        yield "a bitsandbytes checkpoint is NF4 or LLM.int8, and here there are both"
    elif len({target.activations for target, _ in quantized}) > 1:
        yield "a bitsandbytes checkpoint has one threshold, and here there are several"


_RULES: Mapping[str, Callable[[Target, WeightScheme], Iterable[str]]] = {
    "gptq": _gptq_problems,
    "awq": _awq_problems,
    "gguf": _gguf_problems,
    "bitsandbytes": _bitsandbytes_problems,
}


def stored_bytes(target: Target, dtype: str, container: Container) -> PackedSize:
    """Exact bytes of a quantized matrix in any container but `dense`.

    Args:
        target: the matrix.
        dtype: of the dense checkpoint, as safetensors names it.
        container: what holds it.
    """
    assert target.scheme is not None
    if target.scheme.number in ABSMAX:  # one layout each, whatever the container
        return packed_bytes(target.shape, target.scheme, dtype)
    if container in LAYOUTS:
        return packed_bytes(target.shape, target.scheme, dtype, layout_of(target, container))
    return matrix_bytes(target.shape, target.scheme, container)


def repeated_scales(target: Target, dtype: str, container: Container) -> int:
    """Bytes of the scales that a head tied to this matrix stores once more under its own name."""
    if container not in LAYOUTS or not loads_beside_others(target, container):
        return 0
    return stored_bytes(target, dtype, container).scales


def matrix_bytes(shape: tuple[int, int], scheme: WeightScheme, container: Container) -> PackedSize:
    """Exact bytes of one matrix in `gptq`, `awq` or `gguf`.

    GPTQ stores zero-points also where they are all alike, and the group of every input.
    """
    (out, in_features), groups = shape, scheme.groups(shape[1])
    if container == "gguf":
        kind = gguf_type(scheme)
        if kind is None:
            raise ValueError(f"no block type of GGUF holds {scheme}")
        blocks = math.prod(shape) // GGUF_BLOCK
        minimum = 2 * blocks if kind in ("Q4_1", "Q5_1") else 0
        codes = blocks * GGUF_BLOCK_BYTES[kind] - 2 * blocks - minimum
        return PackedSize(codes=codes, scales=2 * blocks, zero_points=minimum, shape=0)
    zeros = groups * out * scheme.bits // 8
    indices = 4 * in_features if container == "gptq" else 0
    codes = out * in_features * scheme.bits // 8
    return PackedSize(codes=codes, scales=2 * groups * out, zero_points=zeros, shape=indices)
