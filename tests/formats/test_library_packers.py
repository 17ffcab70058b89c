"""What compressed-tensors' own compressor makes of dense weights, against what we make of codes.

GPTQModel's packers are asked in `tests/engines`, ggml's in `test_gguf`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.formats import compressed_tensors as ct
from compressor.types import QTensor, WeightScheme

from .helpers import same_tensors
from .test_codes import qtensors


@given(qtensors(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_library_rounds_and_packs_to_the_same_words(quantized: QTensor, moved: bool) -> None:
    """A weight that lies a step off, the mutant, gives other words."""
    scale = quantized.scale.float().abs() + 0.01  # the library divides by it
    exact = replace(quantized, scale=scale)
    state = {"weight": exact.dequantize(), "weight_scale": scale}
    if exact.zero_point is not None:
        state["weight_zero_point"] = exact.zero_point
    if moved:
        step = 1 if exact.codes[0, 0] < exact.scheme.code_range[1] else -1
        state["weight"][0, 0] += step * scale[0, 0]
    weights = ct._weight_arguments(exact.scheme)
    arguments = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    library = ct.BaseCompressor.get_value_from_registry("pack-quantized")
    assert same_tensors(ct.compress(exact), library.compress(state, arguments)) != moved


def test_a_zero_point_a_step_off_gives_other_words() -> None:
    zero = torch.tensor([[1], [2]], dtype=torch.int8)
    scheme = WeightScheme(4, 32, "asymmetric")
    q = QTensor(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), zero, scheme)
    moved = replace(q, zero_point=zero + 1)
    state = {"weight": q.dequantize(), "weight_scale": q.scale, "weight_zero_point": zero}
    arguments = ct.QuantizationScheme(targets=["Linear"], weights=ct._weight_arguments(scheme))
    library = ct.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = library.compress(state, arguments)
    assert same_tensors(ct.compress(q), packed)
    assert not same_tensors(ct.compress(moved), packed)
