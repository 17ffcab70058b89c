from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError
from compressor.formats.codes import (
    CodesReader,
    codes_name,
    pack_bytes,
    read_codes,
    unpack_bytes,
    write_codes,
)
from compressor.types import QTensor, WeightScheme


@st.composite
def qtensors(draw: st.DrawFn) -> QTensor:
    bits = draw(st.integers(2, 8))
    out, groups = draw(st.integers(1, 19)), draw(st.integers(1, 4))
    size = draw(st.integers(1, 40))
    symmetry = draw(st.sampled_from(["symmetric", "full_range", "asymmetric"]))
    by_channel = groups == 1 and draw(st.booleans())
    scheme = WeightScheme(bits, None if by_channel else size, symmetry)
    low, high = scheme.code_range
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(low, high + 1, (out, groups * size), generator=generator)
    zeros = torch.randint(low, high + 1, (out, groups), generator=generator)
    scale = torch.randn(out, groups, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    zero_point = zeros.to(torch.int8) if symmetry == "asymmetric" else None
    return QTensor(codes.to(torch.int8), scale.to(dtype), zero_point, scheme)


def same(left: QTensor, right: QTensor) -> bool:
    if left.scheme != right.scheme or left.scale.dtype != right.scale.dtype:
        return False
    pairs = [(left.codes, right.codes), (left.scale, right.scale)]
    if left.zero_point is not None and right.zero_point is not None:
        pairs.append((left.zero_point, right.zero_point))
    same_zero = (left.zero_point is None) == (right.zero_point is None)
    return same_zero and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@given(qtensors())
def test_packed_bytes_give_the_codes_back(quantized: QTensor) -> None:
    bits, in_features = quantized.scheme.bits, quantized.codes.shape[1]
    packed = pack_bytes(quantized.codes, bits)
    width = 2 if bits == 2 else 4 if bits <= 4 else 8
    assert packed.shape == (quantized.codes.shape[0], -(-in_features * width // 8))
    assert torch.equal(unpack_bytes(packed, bits, in_features), quantized.codes)


@given(st.dictionaries(st.sampled_from(["a", "b.c", "model.layers.0.x"]), qtensors(), min_size=1))
@settings(max_examples=30)
def test_file_round_trip_and_reproducible(
    tmp_path_factory: pytest.TempPathFactory, codes: dict[str, QTensor]
) -> None:
    folder = tmp_path_factory.mktemp("codes")
    write_codes(folder / codes_name(3), codes)
    read = read_codes(folder / codes_name(3))
    assert read.keys() == codes.keys()
    assert all(same(read[module], codes[module]) for module in codes)
    first = (folder / codes_name(3)).read_bytes()
    write_codes(folder / codes_name(3), dict(reversed(codes.items())))
    assert (folder / codes_name(3)).read_bytes() == first


def small(bits: int = 4) -> QTensor:
    return QTensor(
        torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1), None, WeightScheme(bits, None)
    )


def test_reader_joins_blocks_lazily(tmp_path: Path) -> None:
    write_codes(tmp_path / codes_name(0), {"x": small(3)})
    write_codes(tmp_path / codes_name("head"), {"lm_head": small(8)})
    reader = CodesReader(tmp_path)
    assert list(reader) == ["lm_head", "x"]
    assert reader.scheme("x") == WeightScheme(3, None)
    assert same(reader["lm_head"], small(8))
    assert reader.get("y") is None
    assert len(CodesReader(tmp_path / "none")) == 0


def test_reader_refuses_twice_and_foreign(tmp_path: Path) -> None:
    write_codes(tmp_path / codes_name(0), {"x": small()})
    write_codes(tmp_path / codes_name(1), {"x": small()})
    with pytest.raises(ModelError, match="x has codes twice"):
        CodesReader(tmp_path)
    from safetensors.torch import save_file  # a file that is safetensors and not ours

    save_file({"x": torch.ones(1)}, tmp_path / codes_name(1))
    with pytest.raises(ModelError, match="not a codes file"):
        read_codes(tmp_path / codes_name(1))
    with pytest.raises(ModelError, match="does not exist"):
        read_codes(tmp_path / "absent.safetensors")
