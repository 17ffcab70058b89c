"""What a GGUF file weighs, from its header. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUFReader

from compressor.formats.exchange import GGUF_BLOCK_BYTES
from compressor.formats.sizes import Role, SizeReport

_CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
_FLOATS = ("F32", "F16", "BF16")
_OUTER: dict[str, Role] = {"token_embd": "embeddings", "output": "head"}


def measure_gguf(path: Path, logical_parameters: int) -> SizeReport:
    """Weigh one file; minima of blocks count as zero-points.

    Blocks of K- and I-quants count as codes as a whole: their scales are packed among them.

    Args:
        path: the file.
        logical_parameters: weights of the base model, ties once.
    """
    by_role: Counter[Role] = Counter(
        {"codes": 0, "scales": 0, "zero_points": 0, "embeddings": 0, "head": 0, "rest": 0}
    )
    weights, codes, stored = 0, 0.0, 0
    for tensor in GGUFReader(path).tensors:
        outer = _OUTER.get(tensor.name.rpartition(".")[0])
        for role, nbytes in _parts(tensor).items():
            by_role[outer or role] += nbytes
        if outer is None and len(tensor.shape) == 2:
            weights += int(tensor.n_elements)
            codes += int(tensor.n_elements) * _code_bits(tensor.tensor_type)
            stored += 8 * int(tensor.n_bytes)
    total = sum(by_role.values())
    return SizeReport(
        bytes_on_disk=path.stat().st_size,
        tensor_bytes=total,
        logical_parameters=logical_parameters,
        bits_checkpoint=8 * total / logical_parameters,
        bits_nominal=codes / weights if weights else 0.0,
        bits_linear=stored / weights if weights else 0.0,
        by_role=dict(by_role),
    )


def _parts(tensor: Any) -> dict[Role, int]:
    nbytes, kind = int(tensor.n_bytes), tensor.tensor_type.name
    if kind not in GGUF_BLOCK_BYTES:
        return {"rest" if kind in _FLOATS else "codes": nbytes}
    halves = 2 * (nbytes // GGUF_BLOCK_BYTES[kind])
    minima = halves if kind in ("Q4_1", "Q5_1") else 0
    return {"codes": nbytes - halves - minima, "scales": halves, "zero_points": minima}


def _code_bits(kind: Any) -> float:
    elements, nbytes = GGML_QUANT_SIZES[kind]
    return _CODE_BITS.get(kind.name, 8 * nbytes / elements)
