"""GGUF files: blocks against ggml's own reader, names and metadata, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compressor.errors import ModelError, ResourceError, VerificationError
from compressor.formats import exporters, gguf, gguf_metadata
from compressor.formats.exchange import (
    GGUF_BLOCK_BYTES,
    GGUF_FAMILIES,
    container_problems,
    gguf_type,
    matrix_bytes,
)
from compressor.formats.exporters import Source
from compressor.formats.gguf_blocks import pack_blocks, unpack_blocks
from compressor.formats.gguf_types import GgufType
from compressor.formats.headers import INDEX, SINGLE
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import measure
from compressor.formats.support import Target
from compressor.formats.words import half_scales
from compressor.requantize import relative_error
from compressor.resources import builtin_model
from compressor.types import QTensor, WeightScheme
from compressor.verify import used_tensors, verify_weights
from tests.formats.helpers import quantize_checkpoint

W4 = WeightScheme(4, 32)
KINDS = {
    (bits, symmetry): gguf_type(WeightScheme(bits, 32, symmetry))  # type: ignore[arg-type]
    for bits in range(2, 9)
    for symmetry in ("symmetric", "asymmetric")
}


@st.composite
def quantized(draw: st.DrawFn) -> QTensor:
    """Random codes over the whole range of every grid that a block holds."""
    bits, symmetry = draw(st.sampled_from([key for key, kind in KINDS.items() if kind]))
    out, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    group_size = draw(st.sampled_from((32, 64, 128)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def integers(*shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)

    zero = integers(out, groups) if symmetry == "asymmetric" else None
    scale = torch.randn(out, groups, generator=generator).mul(0.01).to(torch.bfloat16)
    scheme = WeightScheme(bits, group_size, symmetry)  # type: ignore[arg-type]
    return QTensor(integers(out, groups * group_size), scale, zero, scheme)


TINY_SCALES = QTensor(
    torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4),
    torch.tensor([[1e-9, 0.01], [3e-7, -4e-6]], dtype=torch.bfloat16),
    None,
    W4,
)


@settings(max_examples=60, deadline=None)
@given(q=quantized())
@example(q=TINY_SCALES)
@example(q=replace(TINY_SCALES, zero_point=torch.tensor([[3, -8], [7, -2]], dtype=torch.int8),
                   scheme=WeightScheme(4, 32, "asymmetric")))  # fmt: skip
def test_ggml_reads_the_weights_that_the_codes_say(q: QTensor) -> None:
    kind = gguf_type(q.scheme)
    assert kind is not None
    blocks = pack_blocks(q, kind)
    read = library.quants.dequantize(blocks.numpy(), library.GGMLQuantizationType[kind])
    scale = half_scales(q.scale).float().repeat_interleave(q.scheme.group_size or 0, 1)
    zero = torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point
    zero = zero.float().repeat_interleave(q.scheme.group_size or 0, 1)
    exact = scale * (q.codes.float() - zero)
    # Only a minimum is rounded: by 2^-11 of itself, and it is at most 31 steps.
    slack = 0.0 if q.zero_point is None else 2.0**-11 * 48
    assert (torch.from_numpy(read) - exact).abs().le(slack * scale.abs() + 2.0**-24).all()
    again = unpack_blocks(blocks, kind, torch.bfloat16)
    assert torch.equal(again.codes, q.codes)
    stored = replace(q, scale=half_scales(q.scale).to(q.scale.dtype))
    assert torch.equal(again.dequantize(), stored.dequantize())
    exact_in_fp16 = q.scale.abs() >= 2.0**-17
    assert torch.equal(stored.scale[exact_in_fp16], q.scale[exact_in_fp16])


def test_blocks_are_those_of_ggml() -> None:
    for kind, size in GGUF_BLOCK_BYTES.items():
        assert library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]] == (32, size)


@pytest.mark.parametrize("kind", GGUF_BLOCK_BYTES)
def test_blocks_are_those_that_the_library_packs(kind: GgufType) -> None:
    """On weights whose grid the library finds itself, its bytes and ours are the same."""
    generator = torch.Generator().manual_seed(0)
    bits, asymmetric = {"Q8": 8, "Q5": 5, "Q4": 4}[kind[:2]], kind.endswith("_1")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low + (bits == 8), high + 1, (6, 96), generator=generator)
    # Both ends of the grid, or its end of larger magnitude, which Q8_0 has above zero.
    codes[:, ::32] = high if kind == "Q8_0" else low
    if asymmetric:
        codes[:, 1::32] = high
    scale = torch.tensor([[0.5, 0.25, 2.0]] * 6, dtype=torch.bfloat16)
    zero = torch.randint(low, high + 1, (6, 3), generator=generator).to(torch.int8)
    scheme = WeightScheme(bits, 32, "asymmetric" if asymmetric else "symmetric")
    q = QTensor(codes.to(torch.int8), scale, zero if asymmetric else None, scheme)
    assert gguf_type(scheme) == kind
    weights = replace(q, scale=scale.float()).dequantize().numpy()
    expected = library.quants.quantize(weights, library.GGMLQuantizationType[kind])
    packed = pack_blocks(q, kind).numpy()
    assert np.array_equal(packed, expected)
    moved = replace(q, codes=q.codes.index_fill(1, torch.tensor([40]), 0))
    assert not np.array_equal(pack_blocks(moved, kind).numpy(), expected)


def test_a_minimum_that_is_no_multiple_is_refused() -> None:
    q = QTensor(
        torch.zeros(1, 32, dtype=torch.int8),
        torch.ones(1, 1, dtype=torch.bfloat16),
        torch.full((1, 1), 3, dtype=torch.int8),
        WeightScheme(4, 32, "asymmetric"),
    )
    blocks = pack_blocks(q, "Q4_1")
    blocks[0, 2:4] = torch.tensor([-10.5], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(VerificationError, match="no multiple"):
        unpack_blocks(blocks, "Q4_1", torch.bfloat16)


def test_names_are_those_of_llama_cpp() -> None:
    for model_type, family in GGUF_FAMILIES.items():
        arch = next(a for a, name in library.MODEL_ARCH_NAMES.items() if name == family)
        known = library.get_tensor_name_map(arch, 2)
        names = ["model.embed_tokens", "model.norm", "lm_head"]
        names += [f"model.layers.1.{inner}" for inner in gguf._INNER]
        for name in names:
            if name.endswith(("q_norm", "k_norm")) and model_type != "qwen3":
                continue
            expected = known.get_name(f"{name}.weight", try_suffixes=(".weight",))
            assert gguf.gguf_name(f"{name}.weight") == expected
            assert gguf.hugging_face_name(f"{expected}") == f"{name}.weight"
    with pytest.raises(ModelError, match=r"no name for the tensor model\.rotary"):
        gguf.gguf_name("model.rotary.weight")


def test_rows_are_paired_as_llama_cpp_pairs_them() -> None:
    rows = torch.arange(24)
    order = gguf.row_order("model.layers.0.self_attn.q_proj.weight", 24, {"q_proj": 2})
    assert order is not None
    # llama.cpp's converter: reshape(heads, 2, half).swapaxes(1, 2)
    assert torch.equal(rows[order], rows.reshape(2, 2, 6).swapaxes(1, 2).reshape(24))
    assert gguf.row_order("model.layers.0.mlp.up_proj.weight", 24, {"q_proj": 2}) is None


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = gguf_metadata.rope_factors(config.to_dict())
    assert factors is not None
    assert torch.allclose(plain / factors, expected, rtol=1e-5)
    assert gguf_metadata.rope_factors({"rope_theta": 1e4}) is None


# ---------------------------------------------------------------- whole files


@pytest.fixture(scope="module")
def tiny() -> Path:
    return builtin_model("tiny")


def blocks_only(module: str, scheme: WeightScheme) -> WeightScheme | None:
    return scheme if ".layers." in module else None


@pytest.mark.parametrize(
    "scheme",
    [W4, WeightScheme(8, None), WeightScheme(4, 64, "asymmetric"), WeightScheme(5, 32)],
    ids=str,
)
def test_what_is_written_reads_back_exactly(
    tiny: Path, tmp_path: Path, scheme: WeightScheme
) -> None:
    folder, codes = quantize_checkpoint(tiny, tmp_path / "d", lambda m: blocks_only(m, scheme))
    exporter, out = exporters.exporter("gguf"), tmp_path / "out"
    exporter.check(tiny)
    exporter.write(Source(folder, codes, 1, "gguf"), out)
    assert exporter.read is not None
    assert verify_weights(exporter.read(out), folder, codes, "gguf") == 0.0
    report = measure(out, 5_000_000)
    shapes = [tuple(codes[module].codes.shape) for module in codes]
    assert report.by_role["codes"] + report.by_role["scales"] + report.by_role["zero_points"] == (
        sum(matrix_bytes(shape, scheme, "gguf").total for shape in shapes)
    )
    assert report.bits_linear == pytest.approx(
        sum(matrix_bytes(shape, scheme, "gguf").total for shape in shapes)
        * 8
        / sum(a * b for a, b in shapes)
    )


def test_what_no_module_reads_stays_out_of_the_file(tiny: Path, tmp_path: Path) -> None:
    """A tied head that is stored as well, and the frequencies that Llama 2 was published with."""
    dense, _ = quantize_checkpoint(tiny, tmp_path / "d", lambda _: None)
    (file,) = dense.glob("*.safetensors")
    tensors = dict(CheckpointReader(dense))
    head = tensors["model.embed_tokens.weight"].clone()
    surplus = {
        "lm_head.weight": head,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(tensors | surplus, file, {"format": "pt"})
    (dense / INDEX).unlink()
    file.rename(dense / SINGLE)
    gguf.write(Source(dense, {}, 1, "gguf"), tmp_path)
    assert {name for name, _ in gguf.read(tmp_path)} == set(tensors) == used_tensors(dense)
    assert verify_weights(gguf.read(tmp_path), dense, (), "gguf", used_tensors(dense)) == 0.0
    assert relative_error(tmp_path, dense) == 0.0
    lost = [pair for pair in gguf.read(tmp_path) if pair[0] != "model.norm.weight"]
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is missing"):
        verify_weights(lost, dense, (), "gguf", used_tensors(dense))


def test_a_dense_model_keeps_its_dtype(tiny: Path, tmp_path: Path) -> None:
    gguf.write(Source(tiny, {}, 1, "gguf"), tmp_path)
    assert verify_weights(gguf.read(tmp_path), tiny, (), "gguf") == 0.0
    kinds = {t.tensor_type.name for t in library.GGUFReader(tmp_path / gguf.FILE).tensors}
    assert kinds == {"BF16", "F32"}


def test_metadata_says_what_the_configuration_says(tiny: Path, tmp_path: Path) -> None:
    gguf.write(Source(tiny, {}, 1, "gguf"), tmp_path)
    fields = library.GGUFReader(tmp_path / gguf.FILE).fields
    found = {key: field.contents() for key, field in fields.items()}
    config = json.loads((tiny / "config.json").read_text())
    assert found["llama.block_count"] == config["num_hidden_layers"]
    assert found["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert found["llama.rope.freq_base"] == 10000.0
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert len(found["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]


def test_the_chat_template_goes_along(tiny: Path, tmp_path: Path) -> None:
    folder, _ = quantize_checkpoint(tiny, tmp_path / "d", lambda m: None)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    gguf.write(Source(folder, {}, 1, "gguf"), tmp_path / "out")
    field = library.GGUFReader(tmp_path / "out" / gguf.FILE).fields["tokenizer.chat_template"]
    assert field.contents() == "{{ messages[0].content }}"


# ---------------------------------------------------------------- what must not pass


def changed(tiny: Path, folder: Path, file: str, change: Any) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = json.loads((tiny / name).read_text())
        if name == file:
            change(content)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", lambda c: c["rope_parameters"].update(rope_type="yarn"), "type 'yarn'"),
        ("config.json", lambda c: c.update(sliding_window=128), "sliding windows"),
        ("config.json", lambda c: c.update(hidden_act="gelu"), "not 'gelu'"),
        ("tokenizer.json", lambda c: c["model"].update(type="Unigram"), "byte-level BPE"),
        ("tokenizer.json", lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "cutting"),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}), "cutting"),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_refused(
    tiny: Path, tmp_path: Path, file: str, change: Any, says: str
) -> None:
    folder = changed(tiny, tmp_path / "m", file, change)
    with pytest.raises(ModelError, match=says):
        gguf.check(folder)


@pytest.mark.parametrize(
    ("scheme", "shape", "kind", "says"),
    [
        (WeightScheme(4, 16), (64, 64), "linear", "blocks of GGUF have 32 inputs"),
        (WeightScheme(4, None), (64, 80), "linear", "80 inputs"),
        (WeightScheme(8, 32, "asymmetric"), (64, 64), "linear", "no block of GGUF"),
        (W4, (64, 64), "expert", "does not write quantized"),
    ],
)
def test_what_no_block_holds_is_refused(
    scheme: WeightScheme, shape: tuple[int, int], kind: Any, says: str
) -> None:
    problems = container_problems([Target("m", shape, kind, scheme)], "gguf", "llama")
    assert any(says in problem for problem in problems), problems
    assert "not of gpt2" in container_problems([], "gguf", "gpt2")[0]


def test_weights_changed_after_rounding_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder, codes = quantize_checkpoint(tiny, tmp_path / "d", lambda m: blocks_only(m, W4))
    name = next(iter(codes))
    q = codes[name]
    moved = dict(codes) | {name: QTensor(q.codes.flip(1), q.scale, None, q.scheme)}
    with pytest.raises(VerificationError, match="changed after it was rounded"):
        gguf.write(Source(folder, moved, 1, "gguf"), tmp_path / "out")
    assert not (tmp_path / "out" / gguf.FILE).exists()


def test_a_file_with_swapped_rows_is_found(tiny: Path, tmp_path: Path) -> None:
    gguf.write(Source(tiny, {}, 1, "gguf"), tmp_path)
    stored = dict(gguf.read(tmp_path))
    name = "model.layers.0.self_attn.k_proj.weight"
    stored[name] = stored[name].flip(0)
    with pytest.raises(VerificationError, match="k_proj"):
        verify_weights(stored.items(), tiny, (), "gguf")
    assert set(stored) == set(CheckpointReader(tiny))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr(exporters, "import_module", absent)
    with pytest.raises(ResourceError, match="needs the package gguf"):
        exporters.exporter("gguf")
    with pytest.raises(ModuleNotFoundError):
        exporters.exporter("gptq")
