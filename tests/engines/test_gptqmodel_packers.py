"""Words of our `gptq` and `awq` packers against GPTQModel's own, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.formats import awq, gptq
from compressor.programs import run
from compressor.types import QTensor, WeightScheme
from tools.engines import install

pytestmark = pytest.mark.engines
DRIVER = Path(__file__).with_name("pack_with_gptqmodel.py")
SHAPES = ((32, 32), (96, 64), (64, 192))
PACKERS = ("block", "original")  # what GPTQModel packs with today, and what it was made from
Packed = dict[str, Tensor]


def random(scheme: WeightScheme, shape: tuple[int, int], seed: int) -> QTensor:
    """Codes and zero-points over the whole grid; bf16 scales, which fp16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    low, high = scheme.code_range
    groups = scheme.groups(shape[1])

    def whole(*size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=generator).to(torch.int8)

    zero = whole(shape[0], groups) if scheme.symmetry == "asymmetric" else None
    scale = torch.rand(shape[0], groups, generator=generator).add(0.01).to(torch.bfloat16)
    return QTensor(whole(*shape), scale, zero, scheme)


def asymmetric_without_zero(scheme: WeightScheme, shape: tuple[int, int], seed: int) -> QTensor:
    """None of its zero-points is the lowest, which version 1 cannot say."""
    q = random(scheme, shape, seed)
    assert q.zero_point is not None
    return replace(q, zero_point=q.zero_point.clamp(min=scheme.code_range[0] + 1))


def cases() -> Iterator[tuple[str, QTensor]]:
    """Method of `pack_with_gptqmodel` and what it shall pack."""
    for seed, shape in enumerate(SHAPES):
        for bits in (2, 3, 4, 8):
            symmetric = WeightScheme(bits, 32, "full_range")
            asymmetric = WeightScheme(bits, None if seed == 1 else 32, "asymmetric")
            for packer in PACKERS:
                yield f"{packer}-v1", random(symmetric, shape, seed)
                yield f"{packer}-v2", random(symmetric, shape, seed)
                yield f"{packer}-v2", random(asymmetric, shape, seed)
                yield f"{packer}-v1", asymmetric_without_zero(asymmetric, shape, seed)
        yield "awq", random(WeightScheme(4, 32, "full_range"), shape, seed)
        yield "awq", random(WeightScheme(4, 32, "asymmetric"), shape, seed)


CASES = {
    f"{number}-{method}-{q.scheme.bits}bit": (method, q)
    for number, (method, q) in enumerate(cases())
}


def ours(method: str, q: QTensor) -> Packed:
    if method == "awq":
        return awq.pack(q)
    return gptq.pack(q, version=int(method[-1]))


def theirs(given: Mapping[str, tuple[str, QTensor]], scratch: Path) -> dict[str, Packed]:
    """What GPTQModel makes of the weights, scales and zero-points; it finds the codes itself."""
    python, tensors, facts = install.install("gptqmodel"), {}, {}
    for name, (method, q) in given.items():
        half, group = 1 << (q.scheme.bits - 1), q.scheme.group_size or q.codes.shape[1]
        zero = torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point
        exact = replace(q, scale=q.scale.float()).dequantize()
        parts = {"weight": exact, "scale": q.scale.float(), "zero": zero.int() + half}
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
        facts[name] = f"{method} {q.scheme.bits} {group}"
    save_file(tensors, scratch / "given.safetensors", facts)
    run([python, DRIVER, scratch / "given.safetensors", scratch / "packed.safetensors"])
    found: dict[str, Packed] = {name: {} for name in given}
    for name, value in load_file(scratch / "packed.safetensors").items():
        case, _, part = name.rpartition(".")
        found[case][part] = value
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    return theirs(CASES, tmp_path_factory.mktemp("packers"))


def same(left: Packed, right: Packed) -> bool:
    """Names, dtypes, shapes and bytes."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name])
        for name, value in left.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_words_are_those_of_gptqmodel(packed: dict[str, Packed], name: str) -> None:
    assert same(ours(*CASES[name]), packed[name])


@pytest.mark.parametrize("name", CASES)
def test_another_code_or_zero_point_gives_other_words(packed: dict[str, Packed], name: str) -> None:
    """The mutants: one code, and one zero-point, a step away."""
    method, q = CASES[name]
    codes = q.codes.clone()
    codes[1, 2] += 1 if codes[1, 2] < q.scheme.code_range[1] else -1
    assert not same(ours(method, replace(q, codes=codes)), packed[name])
    zero = torch.zeros_like(q.scale, dtype=torch.int8) if q.zero_point is None else q.zero_point
    moved = zero.clone()
    moved[1, 0] += 1 if moved[1, 0] < q.scheme.code_range[1] else -1
    assert not same(ours(method, replace(q, zero_point=moved)), packed[name])


def test_version_1_cannot_say_zero(tmp_path: Path) -> None:
    """Why an asymmetric grid is written as version 2: GPTQModel's words borrow from neighbours."""
    q = random(WeightScheme(4, 32, "asymmetric"), (32, 32), 5)
    assert q.zero_point is not None
    q = replace(q, zero_point=q.zero_point.index_fill(0, torch.tensor([3]), -8))
    given = {"v1": ("block-v1", q), "v2": ("block-v2", q)}
    found = theirs(given, tmp_path)
    assert same(ours(*given["v2"]), found["v2"])
    assert not same(ours(*given["v1"]), found["v1"])
    assert torch.equal(gptq.unpack(found["v2"], version=2).codes, q.codes)
    again = gptq.unpack(found["v1"], version=1).zero_point
    assert again is not None
    assert not torch.equal(again, q.zero_point)
