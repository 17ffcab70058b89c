"""fp8, MXFP4 and NVFP4: what is written is what the library and transformers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats import compressed_tensors as ct
from compressor.formats.codes import CodesReader, codes_name, read_codes, write_codes
from compressor.formats.headers import read_json
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.formats.sizes import bits_per_weight, measure, packed_bytes
from compressor.formats.support import Target, engine_problems, export_problems
from compressor.model.load import load_model
from compressor.model.serving import serving_config
from compressor.numerics.rtn import rtn
from compressor.types import ACTIVATIONS, WeightScheme

from .helpers import logits, tiny_model

FP8 = WeightScheme(8, None, number="float")
FP8_BLOCK = WeightScheme(8, 128, number="float", rows=128)
MXFP4 = WeightScheme(4, 32, number="float", scales="e8m0")
NVFP4 = WeightScheme(4, 16, number="float", scales="e4m3")
SCHEMES = {"fp8": FP8, "fp8-block": FP8_BLOCK, "mxfp4": MXFP4, "nvfp4": NVFP4}
LAYOUTS = {
    "fp8": "float-quantized",
    "fp8-block": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def weights(seed: int, out: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_features, generator=generator) * 0.02


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes blocks of 128 divide."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    tiny_model("Llama", tie_word_embeddings=False, **sizes).save_pretrained(folder)
    return folder


def rounded(base: Path, out: Path, scheme: WeightScheme) -> tuple[Path, CodesReader]:
    """Dense checkpoint of a rounded model with its codes, q, k, v and gate, up together."""
    reader, writer = CheckpointReader(base), CheckpointWriter(out)
    modules = [n.removesuffix(".weight") for n in reader.names() if "_proj." in n]
    codes = {m: rtn(reader[f"{m}.weight"].float(), scheme) for m in modules}
    dense = {f"{module}.weight": codes[module].dequantize() for module in modules}
    writer.write_shard(shard_name(0), {**dict(reader), **dense})
    writer.finish(read_json(base / "config.json"), base, logical_parameters=1)
    write_codes(out / codes_name(0), codes)
    return out, CodesReader(out)


@pytest.mark.parametrize("name", SCHEMES)
@given(st.integers(0, 1000), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@settings(max_examples=15, deadline=None)
def test_the_library_reads_what_was_rounded(name: str, seed: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    dtype = torch.bfloat16 if scheme.bits == 4 else dtype
    quantized = rtn(weights(seed, 128, 256), scheme, scale_dtype=dtype)
    tensors = ct.compress(quantized)
    dense = ct.decompress(tensors, scheme)
    assert dense.dtype == dtype
    assert torch.equal(dense, quantized.dequantize())
    names = {"weight", "weight_scale"} if scheme.bits == 8 else {"weight_packed", "weight_scale"}
    assert tensors.keys() - {"weight_global_scale"} == names
    assert ("weight_global_scale" in tensors) == (name == "nvfp4")
    size = packed_bytes((128, 256), scheme, {2: "BF16", 4: "F32"}[dtype.itemsize])
    stored = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    assert size.total == sum(stored.values())
    assert size.codes == stored.get("weight", stored.get("weight_packed"))


@pytest.mark.parametrize(
    ("name", "bits"), [("fp8", 8 + 16 / 4096), ("mxfp4", 4.25), ("nvfp4", 4.5)]
)
def test_bits_of_the_formats(name: str, bits: float) -> None:
    assert bits_per_weight((4096, 4096), SCHEMES[name]) == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_files_keep_everything(name: str, tmp_path: Path) -> None:
    together = rtn(weights(1, 256, 256), SCHEMES[name])
    parts = {"q": together.rows(0, 128), "k": together.rows(128, 256)}
    write_codes(tmp_path / codes_name(3), parts)
    for module, read in read_codes(tmp_path / codes_name(3)).items():
        assert read.scheme == parts[module].scheme
        assert torch.equal(read.codes, parts[module].codes)
        assert torch.equal(read.dequantize(), parts[module].dequantize())


@pytest.mark.parametrize("inputs", [False, True], ids=["weights", "inputs"])
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_gives_the_same_logits(
    wide: Path, tmp_path: Path, name: str, inputs: bool
) -> None:
    scheme = SCHEMES[name]
    kind = {"fp8": "fp8", "fp8-block": "fp8-g128"}.get(name)
    if inputs and kind is None:
        pytest.skip("4-bit floats round weights only")
    dense, codes = rounded(wide, tmp_path / "dense", scheme)
    activations = dict.fromkeys(codes, ACTIVATIONS[kind]) if inputs and kind else {}
    ct.export(dense, codes, tmp_path / "out", logical_parameters=1, activations=activations)
    written = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert written["format"] == LAYOUTS[name]
    config = serving_config(read_json(dense / "config.json"), activations)
    (dense / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        memory = load_model(dense)(torch.arange(32).view(1, 32)).logits
    assert torch.equal(memory, logits(tmp_path / "out"))
    assert not torch.equal(memory, logits(wide))
    report = measure(tmp_path / "out", 1)
    sizes = [packed_bytes(tuple(codes[m].codes.shape), scheme) for m in codes]  # type: ignore[arg-type]
    assert report.by_role["codes"] == sum(size.codes for size in sizes)
    assert report.by_role["scales"] == sum(size.scales for size in sizes)
    assert report.bits_nominal == scheme.bits


def test_a_weight_that_is_not_on_its_grid_is_found(wide: Path, tmp_path: Path) -> None:
    dense, codes = rounded(wide, tmp_path / "dense", NVFP4)
    module = next(iter(codes))
    changed = {module: rtn(weights(9, *codes[module].codes.shape), NVFP4)}
    with pytest.raises(VerificationError, match="changed after it was rounded"):
        ct.export(dense, {**codes, **changed}, tmp_path / "out", logical_parameters=1)


def test_what_float_formats_exclude(wide: Path, tmp_path: Path) -> None:
    def problems(kind: str, scheme: WeightScheme, shape: tuple[int, int] = (128, 128)) -> str:
        return " ".join(export_problems([Target("m", shape, kind, scheme)]))  # type: ignore[arg-type]

    assert problems("linear", NVFP4) == ""
    assert "integer codes only" in problems("expert", NVFP4)
    assert "integer codes only" in problems("embedding", FP8)
    assert "not a multiple of 128" in problems("linear", FP8_BLOCK, (100, 128))
    dense, codes = rounded(wide, tmp_path / "dense", FP8)
    embedding = {"model.embed_tokens": codes[next(iter(codes))]}
    with pytest.raises(ModelError, match="integer codes only"):
        ct.export(dense, {**codes, **embedding}, tmp_path / "out", logical_parameters=1)


def test_engines() -> None:
    def problems(engine: str, scheme: WeightScheme, inputs: str | None = None) -> str:
        activations = ACTIVATIONS[inputs] if inputs else None
        target = Target("m", (128, 128), "linear", scheme, activations)
        return " ".join(engine_problems(engine, [target], "auto"))

    assert problems("vllm", FP8, "fp8") == problems("sglang", FP8, "fp8") == ""
    assert problems("vllm", FP8_BLOCK, "fp8-g128") == problems("vllm", NVFP4) == ""
    assert "does not load float-quantized" in problems("vllm-cpu", FP8, "fp8")
    assert "does not load nvfp4" in problems("sglang", NVFP4)
    assert "no kernel" in problems("vllm", FP8, "int8")


def test_fused_nvfp4_is_rounded_by_one_stage() -> None:
    """Engines keep one divisor for q, k and v; matrices that are rounded together share theirs."""

    def problems(scheme: WeightScheme, *roundings: int) -> list[str]:
        targets = [
            Target(f"layers.0.attn.{leaf}", (128, 128), "linear", scheme, rounding=number)
            for leaf, number in zip(("q_proj", "k_proj", "v_proj"), roundings, strict=True)
        ]
        return engine_problems("vllm", targets, "auto")

    assert problems(NVFP4, 1, 1, 1) == problems(MXFP4, 1, 2, 2) == problems(FP8, 1, 2, 2) == []
    (said,) = problems(NVFP4, 1, 2, 2)
    assert "must share one divisor of their scales; round all of them in one stage" in said
