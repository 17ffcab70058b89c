"""Which engine loads which container, and within what limits: the table, and nothing else.

A container is what lies on disk: a layout of compressed-tensors (`pack-quantized`,
`int-quantized`, or `auto`, where the scheme of each matrix decides), `gptq`, `awq`, `gguf`,
`bitsandbytes`, or `dense`. `evidence` says where a row is from: `run` means that a test loads such
a file in that engine; `documents`, that its documents say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from compressor.types import ACTIVATIONS, Symmetry

Container = Literal[
    "dense",
    "auto",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "gptq",
    "awq",
    "gguf",
    "llama-quantize",
    "bitsandbytes",
    "onnx",
    "openvino",
]

PACKAGES: Mapping[str, str] = {"gguf": "gguf", "bitsandbytes": "bitsandbytes"}
"""What writing a format needs beyond this package's own dependencies."""

ENVIRONMENTS: Mapping[str, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Formats that are written by, and read by, a program in an environment of its own."""

_ALL: frozenset[Symmetry] = frozenset(("symmetric", "full_range", "asymmetric"))
_SYMMETRIC: frozenset[Symmetry] = frozenset(("symmetric", "full_range"))
ANY_WIDTH = frozenset(range(2, 9))


@dataclass(frozen=True)
class Limits:
    """What an engine loads of one container.

    Attributes:
        bits: widths of codes.
        symmetries: of the grid.
        multiple: both dimensions of a quantized matrix must be multiples of this.
        group_multiple: group sizes must be multiples of this; a scale per channel always loads.
        embeddings: whether quantized embeddings load.
        mixed_fused: whether q, k, v (or gate, up) may differ in scheme.
        inputs: roundings of inputs that it computes with, by name.
        inputs_by_channel: whether weights must then be symmetric, of 8 bits, by channel.
        evidence: `run` or `documents`.
        needs: what has to be installed beside the engine.
    """

    bits: frozenset[int] = ANY_WIDTH
    symmetries: frozenset[Symmetry] = _ALL
    multiple: int = 1
    group_multiple: int = 1
    embeddings: bool = False
    mixed_fused: bool = False
    inputs: frozenset[str] = frozenset()
    inputs_by_channel: bool = True
    evidence: Literal["run", "documents"] = "documents"
    needs: str = ""

    def __str__(self) -> str:
        """For people: `2, 3, 4, 8 bits, sizes in multiples of 32 (needs gptqmodel)`."""
        bits = "any width" if self.bits == ANY_WIDTH else f"{_listed(self.bits)} bits"
        words = [bits] + (["symmetric only"] if self.symmetries == _SYMMETRIC else [])
        words += [f"sizes in multiples of {self.multiple}"] if self.multiple > 1 else []
        groups = f"groups in multiples of {self.group_multiple}"
        words += [groups] if self.group_multiple > 1 else []
        words += ["also embeddings"] if self.embeddings else []
        return ", ".join(words) + (f" (needs {self.needs})" if self.needs else "")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


@dataclass(frozen=True)
class Engine:
    """A program that loads checkpoints.

    Attributes:
        title: its name as its authors write it.
        version: that the row was written for.
        containers: what it loads.
        caches: roundings of keys and values that it takes from a checkpoint, by name.
        cache_fault: why what it computes with a rounded cache is not what is measured.
        drafts: kinds of draft models that it decodes with, and how that is known, as above.
    """

    title: str
    version: str
    containers: Mapping[Container, Limits]
    caches: frozenset[str] = frozenset()
    cache_fault: str = "it does not take the rounding of its cache from a checkpoint"
    drafts: Mapping[str, Literal["run", "documents"]] = field(default_factory=dict)


CONTAINERS: Mapping[Container, str] = {
    "dense": "ordinary weights, for any program (format dense)",
    "pack-quantized": "codes of 2 to 8 bits packed into words (format compressed-tensors)",
    "int-quantized": "one byte a code: 8 bits by channel, or beside rounded inputs (same format)",
    "float-quantized": "fp8 weights by channel or block of 128 x 128 (same format)",
    "mxfp4-pack-quantized": "MXFP4: e2m1 in groups of 32 with powers of two (same format)",
    "nvfp4-pack-quantized": "NVFP4: e2m1 in groups of 16 with fp8 scales (same format)",
    "gptq": "codes of 2, 3, 4 or 8 bits, AutoGPTQ's layout, v1 or v2 (format gptq)",
    "awq": "4-bit codes, AutoAWQ's gemm layout (format awq)",
    "gguf": "one file with tokenizer and chat template; codes of 2 to 8 bits, asymmetric ones of 2 "
    "to 5, in blocks of 32 (format gguf)",
    "llama-quantize": "the same, rounded by llama.cpp's quantizer to K- and I-quants (format gguf "
    "with a type)",
    "bitsandbytes": "NF4 in blocks, or LLM.int8, by quantize.bnb (format bitsandbytes)",
    "onnx": "a graph with the rounded weights in fp32, so not smaller (format onnx)",
    "openvino": "the same in OpenVINO's representation (format openvino)",
}

_ROUND = Limits(
    embeddings=True,
    mixed_fused=True,
    inputs=frozenset(ACTIVATIONS),
    inputs_by_channel=False,
    evidence="run",
)
_BYTES = Limits(inputs=frozenset(("int8",)))
_FP8 = Limits(inputs=frozenset(("fp8", "fp8-g128")))
_GRAPH = Limits(embeddings=True, mixed_fused=True, evidence="run")
_DENSE = Limits(embeddings=True, mixed_fused=True)
_GPTQ_WIDTHS = frozenset((2, 3, 4, 8))
_FOUR = frozenset((4,))
_BOTH_DRAFTS: Mapping[str, Literal["run", "documents"]] = {
    "standalone": "documents",
    "eagle3": "documents",
}
_RUN_DRAFTS: Mapping[str, Literal["run", "documents"]] = {"standalone": "run", "eagle3": "run"}
_FP8_CACHE = frozenset(("fp8",))
_GPTQMODEL = "gptqmodel and optimum"
_BNB = "bitsandbytes"
_FOUR_EIGHT = frozenset((4, 8))
_LLM_INT8 = frozenset(("llm-int8",))

ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        "Transformers",
        "5.23",
        {
            "dense": _ROUND,
            "pack-quantized": _ROUND,
            "int-quantized": _ROUND,
            "float-quantized": _ROUND,
            "mxfp4-pack-quantized": _ROUND,
            "nvfp4-pack-quantized": _ROUND,
            "gptq": Limits(
                _GPTQ_WIDTHS, multiple=32, mixed_fused=True, evidence="run", needs=_GPTQMODEL
            ),
            "awq": Limits(_FOUR, multiple=8, mixed_fused=True, evidence="run", needs="gptqmodel"),
            "bitsandbytes": Limits(
                _FOUR_EIGHT,
                _SYMMETRIC,
                mixed_fused=True,
                inputs=_LLM_INT8,
                evidence="run",
                needs=_BNB,
            ),
        },
        caches=_FP8_CACHE,
        drafts={"standalone": "run"},
    ),
    "vllm": Engine(
        "vLLM",
        "0.32 on GPU",
        {
            "dense": _DENSE,
            "pack-quantized": Limits(),
            "int-quantized": _BYTES,
            "float-quantized": _FP8,
            "mxfp4-pack-quantized": Limits(),
            "nvfp4-pack-quantized": Limits(),
            "gptq": Limits(_GPTQ_WIDTHS, multiple=32),
            "awq": Limits(_FOUR, multiple=8),
            "bitsandbytes": Limits(_FOUR_EIGHT, _SYMMETRIC, inputs=_LLM_INT8, needs=_BNB),
        },
        caches=_FP8_CACHE,
        drafts=_BOTH_DRAFTS,
    ),
    "vllm-cpu": Engine(
        "vLLM",
        "0.32 on x86 CPU",
        {
            "dense": _DENSE,
            "pack-quantized": Limits(_FOUR, multiple=32, group_multiple=2, evidence="run"),
            "int-quantized": replace(_BYTES, evidence="run"),
            "gptq": Limits(_FOUR, multiple=32, evidence="run"),
            "awq": Limits(_FOUR, multiple=32, evidence="run"),
        },
        # EAGLE-3 where its three features differ: with two alike it fails to load (LOG.md).
        drafts=_RUN_DRAFTS,
        cache_fault="its CPU kernels cut keys and values down to the next fp8 number, where others "
        "round to the nearest; that is three times as far from the original as what is measured",
    ),
    "gptqmodel": Engine(
        "GPTQModel",
        "7.7 on CPU",
        {
            "gptq": Limits(_GPTQ_WIDTHS, multiple=32, mixed_fused=True, evidence="run"),
            "awq": Limits(_FOUR, multiple=8, mixed_fused=True, evidence="run"),
        },
    ),
    "sglang": Engine(
        "SGLang",
        "0.5 on GPU",
        {
            "dense": _DENSE,
            "pack-quantized": Limits(frozenset((4, 8)), _SYMMETRIC),
            "int-quantized": _BYTES,
            "float-quantized": _FP8,
            "gptq": Limits(_GPTQ_WIDTHS, _SYMMETRIC, multiple=32),
            "awq": Limits(_FOUR, multiple=8),
        },
        drafts=_BOTH_DRAFTS,
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "b11434 on x86 CPU",
        {
            "gguf": Limits(group_multiple=32, embeddings=True, mixed_fused=True, evidence="run"),
            "llama-quantize": Limits(embeddings=True, mixed_fused=True, evidence="run"),
        },
        drafts=_RUN_DRAFTS,
    ),
    "onnxruntime": Engine("ONNX Runtime", "1.31 on CPU", {"onnx": _GRAPH}),
    "openvino": Engine("OpenVINO", "2026.4 on CPU", {"openvino": _GRAPH}),
}
