"""GPTQ and AWQ files: our packers against the formats' definitions, word by word, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats import awq, exporters, gptq, words
from compressor.formats.capabilities import ENGINES, Container
from compressor.formats.exchange import container_problems, matrix_bytes
from compressor.formats.exporters import Source
from compressor.formats.headers import read_folder
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import measure
from compressor.formats.support import Target
from compressor.types import QTensor, WeightScheme
from compressor.verify import verify_weights
from tests.formats.helpers import quantize_checkpoint

W4 = WeightScheme(4, 32)
W4A = WeightScheme(4, 32, "asymmetric")
Q = "model.layers.0.self_attn.q_proj"


@st.composite
def quantized(draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4, 8)) -> QTensor:
    """Random codes, scales and zero-points over the whole range of the grid."""
    width = draw(st.sampled_from(bits))
    out, groups = 32 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    group_size = draw(st.sampled_from((32, 64)))
    asymmetric = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1

    def integers(*shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)

    zero = integers(out, groups) if asymmetric else None
    scale = torch.rand(out, groups, generator=generator).add(0.01).to(torch.bfloat16)
    scheme = WeightScheme(width, group_size, "asymmetric" if asymmetric else "symmetric")
    return QTensor(integers(out, groups * group_size), scale, zero, scheme)


def same(left: QTensor, right: QTensor) -> bool:
    zeros = [
        torch.zeros_like(q.scale, dtype=torch.int8) if q.zero_point is None else q.zero_point
        for q in (left, right)
    ]
    scales = [q.scale.float() for q in (left, right)]
    return torch.equal(left.codes, right.codes) and torch.equal(*zeros) and torch.equal(*scales)


# ---------------------------------------------------------------- the definitions, word by word


def bits_of(value: int, width: int) -> list[int]:
    return [(value >> place) & 1 for place in range(width)]


def word(bits: list[int]) -> int:
    value = sum(bit << place for place, bit in enumerate(bits))
    return value - (1 << 32) if value >= 1 << 31 else value


def gptq_by_definition(q: QTensor, version: int) -> dict[str, Any]:
    """qweight column by column and qzeros row by row, as lists of bits."""
    width, half = q.scheme.bits, 1 << (q.scheme.bits - 1)
    columns = []
    for row in q.codes.tolist():
        bits = [bit for code in row for bit in bits_of(code + half, width)]
        columns.append([word(bits[i : i + 32]) for i in range(0, len(bits), 32)])
    zeros = torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point
    rows = []
    for group in zeros.T.tolist():
        stored = [(int(z) + half - (1 if version == 1 else 0)) % (1 << width) for z in group]
        bits = [bit for value in stored for bit in bits_of(value, width)]
        rows.append([word(bits[i : i + 32]) for i in range(0, len(bits), 32)])
    return {"qweight": [list(c) for c in zip(*columns, strict=True)], "qzeros": rows}


def awq_by_definition(values: list[list[int]]) -> list[list[int]]:
    """Words of unsigned nibbles: nibble i of a word is output number ORDER[i] of its eight."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return [
        [
            word([bit for i in order for bit in bits_of(row[start + i], 4)])
            for start in range(0, len(row), 8)
        ]
        for row in values
    ]


@settings(max_examples=25, deadline=None)
@given(q=quantized(), version=st.sampled_from((1, 2)))
def test_gptq_is_packed_as_the_format_says(q: QTensor, version: int) -> None:
    packed, expected = gptq.pack(q, version=version), gptq_by_definition(q, version)
    assert packed["qweight"].tolist() == expected["qweight"]
    assert packed["qzeros"].tolist() == expected["qzeros"]
    assert packed["g_idx"].tolist() == [
        i // q.scheme.group_size
        for i in range(q.codes.shape[1])  # type: ignore[operator]
    ]
    assert packed["scales"].dtype == torch.float16
    assert [t.dtype for n, t in packed.items() if n != "scales"] == [torch.int32] * 3
    assert same(gptq.unpack(packed, version=version), q)


@settings(max_examples=25, deadline=None)
@given(q=quantized((4,)))
def test_awq_is_packed_as_the_format_says(q: QTensor) -> None:
    packed = awq.pack(q)
    assert packed["qweight"].tolist() == awq_by_definition((q.codes.T.int() + 8).tolist())
    zero = torch.zeros_like(q.scale).int() if q.zero_point is None else q.zero_point.int()
    assert packed["qzeros"].tolist() == awq_by_definition((zero.T + 8).tolist())
    assert same(awq.unpack(packed), q)


def test_symmetric_v1_stores_sevens() -> None:
    q = QTensor(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32, 1), None, W4)
    assert set(gptq.pack(q, version=1)["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(gptq.pack(q, version=2)["qweight"].flatten().tolist()) == {0x88888888 - (1 << 32)}


def test_long_rows_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 8, (7, 64))
    whole = words.to_words(values, 3)
    monkeypatch.setattr(words, "_CHUNK_ELEMENTS", 100)
    assert torch.equal(words.to_words(values, 3), whole)
    assert torch.equal(words.from_words(whole, 3), values.to(torch.int16))


# ---------------------------------------------------------------- whole checkpoints


def source(folder: Path, codes: Any, container: Container) -> Source:
    return Source(folder, codes, 1, container)


def linear(scheme: WeightScheme) -> Any:
    return lambda module: scheme if ".layers." in module else None


@pytest.mark.parametrize(
    ("name", "scheme", "version"),
    [
        ("gptq", W4, "gptq"),
        ("gptq", W4A, "gptq_v2"),
        ("gptq", WeightScheme(3, None), "gptq"),
        ("gptq", WeightScheme(8, None, "asymmetric"), "gptq_v2"),
        ("awq", W4A, None),
        ("awq", WeightScheme(4, None, "full_range"), None),
    ],
)
def test_what_is_written_reads_back_exactly(
    tied_llama: Path, tmp_path: Path, name: Any, scheme: WeightScheme, version: str | None
) -> None:
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(scheme))
    exporter, out = exporters.exporter(name), tmp_path / "out"
    exporter.write(source(folder, codes, name), out)
    assert exporter.read is not None
    assert verify_weights(exporter.read(out), folder, codes, name) == 0.0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config.get("checkpoint_format") == version
    assert config["group_size"] == (scheme.group_size or -1)
    assert (out / "quantize_config.json").exists() == (name == "gptq")


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_sizes_are_those_of_the_formula(tied_llama: Path, tmp_path: Path, name: Any) -> None:
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4A))
    exporters.exporter(name).write(source(folder, codes, name), tmp_path / "out")
    shapes = [tuple(codes[module].codes.shape) for module in codes]
    expected = sum(matrix_bytes(shape, W4A, name).total for shape in shapes)
    stored = read_folder(tmp_path / "out")
    assert expected == sum(
        info.nbytes for key, info in stored.items() if key.rpartition(".")[2] in words.PACKED
    )
    report = measure(tmp_path / "out", 1)
    assert report.bits_nominal == 4
    assert report.bits_linear == pytest.approx(4 + 16 / 32 + 4 / 32)


def test_mixed_grids_and_dense_layers_are_named(tied_llama: Path, tmp_path: Path) -> None:
    wide = WeightScheme(8, None)

    def choose(module: str) -> WeightScheme | None:
        if "layers.1.mlp.down_proj" in module or ".layers." not in module:
            return None
        return wide if "layers.1.self_attn" in module else W4

    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", choose)
    out = tmp_path / "out"
    gptq.write(source(folder, codes, "gptq"), out)
    assert verify_weights(gptq.read(out), folder, codes, "gptq") == 0.0
    dynamic = json.loads((out / "quantize_config.json").read_text())["dynamic"]

    def override(layer: str) -> Any:  # as GPTQModel and vLLM look it up
        for pattern, value in dynamic.items():
            if pattern.startswith("-:"):
                if re.match(pattern.removeprefix("-:"), layer):
                    return False
            elif re.match(pattern.removeprefix("+:"), layer):
                return value
        return None

    assert override("model.layers.1.mlp.down_proj") is False
    assert override("model.layers.1.mlp.up_proj") is None
    assert override("model.layers.1.self_attn.q_proj")["bits"] == 8
    assert override("model.layers.1.self_attn.qkv_proj") == override(
        "model.layers.1.self_attn.o_proj"
    )
    assert override("model.layers.0.self_attn.qkv_proj") is None


def test_a_scale_that_fp16_changes_is_measured(tied_llama: Path, tmp_path: Path) -> None:
    _, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4))
    q = codes[Q]
    odd = QTensor(q.codes, q.scale.float() * 1.0003, None, q.scheme)
    assert 0 < float((words.half_scales(odd.scale).float() / odd.scale - 1).abs().max()) <= 2**-11
    with pytest.raises(ModelError, match="beyond fp16"):
        words.half_scales(odd.scale * 1e9)


# ---------------------------------------------------------------- what must not pass


def test_a_changed_word_is_found(tied_llama: Path, tmp_path: Path) -> None:
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4))
    gptq.write(source(folder, codes, "gptq"), tmp_path / "out")
    stored = dict(gptq.read(tmp_path / "out"))

    def read(change: dict[str, Tensor], without: str = "") -> Any:
        return ((n, t) for n, t in (stored | change).items() if n != without)

    moved = stored[f"{Q}.weight"].clone()
    moved[0, 0] += moved.abs().max() / 8
    with pytest.raises(VerificationError, match=f"{Q}.weight differs"):
        verify_weights(read({f"{Q}.weight": moved}), folder, codes, "gptq")
    norm = stored["model.norm.weight"] * (1 + 2**-7)
    with pytest.raises(VerificationError, match="allowed: 0"):
        verify_weights(read({"model.norm.weight": norm}), folder, codes, "gptq")
    with pytest.raises(VerificationError, match=r"model.norm.weight is missing"):
        verify_weights(read({}, "model.norm.weight"), folder, codes, "gptq")
    with pytest.raises(VerificationError, match="there twice"):
        verify_weights([*stored.items(), *stored.items()], folder, codes, "gptq")


def test_weights_changed_after_rounding_are_refused(tied_llama: Path, tmp_path: Path) -> None:
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4))
    changed = {name: codes[name] for name in codes}
    q = changed[Q]
    changed[Q] = QTensor(q.codes.flip(0), q.scale, None, q.scheme)
    with pytest.raises(VerificationError, match="changed after it was rounded"):
        gptq.write(source(folder, changed, "gptq"), tmp_path / "out")
    with pytest.raises(ModelError, match=r"no matrix nowhere.weight"):
        gptq.write(source(folder, {"nowhere": q}, "gptq"), tmp_path / "out")


def test_a_lossy_packer_is_caught(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4))
    honest = awq.pack

    def lossy(q: QTensor) -> dict[str, Tensor]:
        return honest(QTensor(q.codes.clamp(max=6), q.scale, q.zero_point, q.scheme))

    monkeypatch.setattr(awq, "pack", lossy)
    with pytest.raises(VerificationError, match="packing lost codes"):
        awq.write(source(folder, codes, "awq"), tmp_path / "out")


@pytest.mark.parametrize(
    ("container", "shape", "scheme", "kind", "says"),
    [
        ("gptq", (64, 64), WeightScheme(5, 32), "linear", "packs 2, 3, 4 and 8"),
        ("gptq", (64, 40), WeightScheme(3, None), "linear", "fill 32-bit words"),
        ("gptq", (64, 64), W4, "embedding", "holds linear layers"),
        ("gptq", (64, 80), W4, "linear", "not a multiple of 32"),
        ("awq", (64, 64), WeightScheme(3, 32), "linear", "AWQ packs 4"),
        ("awq", (36, 64), W4, "linear", "eight to a word"),
        ("awq", (64, 64), W4, "expert", "is an expert"),
    ],
)
def test_what_cannot_be_held_is_refused(
    container: Container, shape: tuple[int, int], scheme: WeightScheme, kind: Any, says: str
) -> None:
    problems = container_problems([Target("m", shape, kind, scheme)], container)
    assert any(says in problem for problem in problems), problems


def test_awq_has_one_grid() -> None:
    targets = [Target("a", (64, 64), "linear", W4), Target("b", (64, 64), "linear", W4A)]
    assert "one grid" in container_problems(targets, "awq")[0]
    assert not container_problems(targets[:1], "awq")


def test_nothing_else_is_lost(tied_llama: Path, tmp_path: Path) -> None:
    """Every dense tensor is byte-identical, and files beside the weights are copied."""
    folder, codes = quantize_checkpoint(tied_llama, tmp_path / "dense", linear(W4))
    awq.write(source(folder, codes, "awq"), tmp_path / "out")
    before, after = CheckpointReader(folder), CheckpointReader(tmp_path / "out")
    kept = [name for name in before if name.removesuffix(".weight") not in codes]
    assert all(before.tensor_sha256(name) == after.tensor_sha256(name) for name in kept)
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_every_engine_names_known_containers() -> None:
    known = set(Container.__args__)  # type: ignore[attr-defined]
    assert all(set(engine.containers) <= known for engine in ENGINES.values())
