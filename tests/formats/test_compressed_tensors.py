from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import assume, given, settings

from compressor.errors import ModelError, VerificationError
from compressor.formats import compressed_tensors as ct
from compressor.formats.capabilities import Container
from compressor.formats.headers import INDEX, read_json
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.formats.support import (
    Loading,
    Target,
    engine_problems,
    export_problems,
    loading,
)
from compressor.model.load import load_model
from compressor.model.serving import SERVING, serving_config
from compressor.types import ACTIVATIONS, ActivationScheme, CacheScheme, QTensor, WeightScheme

from .helpers import logits, quantize_checkpoint, same_tensors, tiny_model
from .test_codes import qtensors

W4 = WeightScheme(4, 32)
LAST = ("down_proj", "fc2", "4h_to_h")
Q = "model.layers.0.self_attn.q_proj"


def is_projection(module: str) -> bool:
    return "proj" in module or ".experts." in module


def round_trip(
    base: Path, work: Path, scheme_of: object, form: str = "pack-quantized", **options: object
) -> tuple[Path, Path]:
    """Dense and exported checkpoint of the same codes."""

    def choose(module: str) -> WeightScheme | None:
        return scheme_of(module)  # type: ignore[operator,no-any-return]

    dense, codes = quantize_checkpoint(base, work / "dense", choose)
    ct.export(dense, codes, work / "export", logical_parameters=1, form=form, **options)  # type: ignore[arg-type]
    return dense, work / "export"


def projections(scheme: WeightScheme) -> object:
    return lambda module: scheme if is_projection(module) else None


# --- packing -------------------------------------------------------------------------------


@given(qtensors())
def test_packed_matrix_unpacks_to_the_same_weights(quantized: QTensor) -> None:
    tensors = ct.compress(quantized)
    out, in_features = quantized.codes.shape
    bits = quantized.scheme.bits
    assume(not export_problems([Target("m", (out, in_features), "linear", quantized.scheme)]))
    assert tensors["weight_packed"].shape == (out, -(-in_features * bits // 32))
    assert tensors["weight_shape"].tolist() == [out, in_features]
    assert ("weight_zero_point" in tensors) == (quantized.scheme.symmetry == "asymmetric")
    assert torch.equal(ct.decompress(tensors, quantized.scheme), quantized.dequantize())


@given(qtensors())
@settings(max_examples=50)
def test_bits_lie_lowest_first_along_the_input(quantized: QTensor) -> None:
    """Independent reference: read the words as one long little-endian number per row."""
    bits, low = quantized.scheme.bits, quantized.scheme.code_range[0]
    words = ct.compress(quantized)["weight_packed"]
    for row, codes in zip(words.numpy().astype("<i4"), quantized.codes.tolist(), strict=True):
        number = int.from_bytes(row.tobytes(), "little")
        unpacked = [(number >> (i * bits) & (1 << bits) - 1) + low for i in range(len(codes))]
        assert unpacked == codes


# --- reload --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        W4,
        WeightScheme(2, 16, "full_range"),
        WeightScheme(3, 32, "full_range"),
        WeightScheme(8, None),
        WeightScheme(4, 32, "asymmetric"),
        WeightScheme(5, None, "asymmetric"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_reloaded_logits_are_identical(
    llama: Path, tied_llama: Path, tmp_path: Path, scheme: WeightScheme, tied: bool
) -> None:
    base = tied_llama if tied else llama
    dense, export = round_trip(base, tmp_path, projections(scheme))
    assert torch.equal(logits(dense), logits(export))
    assert not torch.equal(logits(dense), logits(base))
    config = read_json(export / "config.json")["quantization_config"]
    assert config.get("dequantize", False) == (scheme.symmetry == "asymmetric")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("Llama", dtype).save_pretrained(tmp_path / "base")
    dense, export = round_trip(tmp_path / "base", tmp_path, projections(W4))
    assert torch.equal(logits(dense), logits(export))


def test_mixed_schemes_and_quantized_head(llama: Path, tmp_path: Path) -> None:
    by_leaf = {"down_proj": WeightScheme(6, 32), "lm_head": WeightScheme(8, None)}

    def choose(module: str) -> WeightScheme | None:
        default = W4 if is_projection(module) and "layers.1" in module else None
        return by_leaf.get(module.rpartition(".")[2], default)

    dense, export = round_trip(llama, tmp_path, choose)
    assert torch.equal(logits(dense), logits(export))
    groups = read_json(export / "config.json")["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 6, 4]
    assert groups["group_0"]["targets"] == ["lm_head"]


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_int_quantized_by_channel(llama: Path, tmp_path: Path, symmetry: str) -> None:
    scheme = WeightScheme(8, None, symmetry)  # type: ignore[arg-type]
    dense, export = round_trip(llama, tmp_path, projections(scheme), form="int-quantized")
    assert CheckpointReader(export).dtype(f"{Q}.weight") is torch.int8
    assert torch.equal(logits(dense), logits(export))


INT8 = ACTIVATIONS["int8"]


def served(dense: Path, activations: dict[str, ActivationScheme]) -> Path:
    """The dense checkpoint, told to round inputs."""
    config = read_json(dense / "config.json")
    (dense / "config.json").write_text(json.dumps(serving_config(config, activations)))
    return dense


@pytest.mark.parametrize(
    ("scheme", "form", "layout"),
    [
        (WeightScheme(8, None), "auto", "int-quantized"),
        (WeightScheme(8, None, "asymmetric"), "int-quantized", "int-quantized"),
        (WeightScheme(8, None), "pack-quantized", "pack-quantized"),
        (W4, "auto", "pack-quantized"),
        (W4, "int-quantized", "int-quantized"),
    ],
    ids=str,
)
def test_rounded_inputs_give_the_same_logits(
    llama: Path, tmp_path: Path, scheme: WeightScheme, form: str, layout: str
) -> None:
    dense, codes = quantize_checkpoint(llama, tmp_path / "dense", projections(scheme))  # type: ignore[arg-type]
    rounded = dict.fromkeys(codes, INT8)
    ct.export(dense, codes, tmp_path / "out", logical_parameters=1, form=form, activations=rounded)  # type: ignore[arg-type]
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["format"] == layout
    plain = logits(dense)
    assert not torch.equal(plain, logits(tmp_path / "out"))
    assert torch.equal(ours(served(dense, rounded)), logits(tmp_path / "out"))


def ours(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(torch.arange(32).view(1, 32)).logits


def test_inputs_are_rounded_where_it_is_asked_and_nowhere_else(llama: Path, tmp_path: Path) -> None:
    scheme = WeightScheme(8, None)
    dense, codes = quantize_checkpoint(
        llama, tmp_path / "dense", lambda m: scheme if "proj" in m or m == "lm_head" else None
    )
    rounded = {module: INT8 for module in codes if "mlp" in module}
    served(dense, rounded)
    ct.export(dense, codes, tmp_path / "out", logical_parameters=1, activations=rounded)
    config = read_json(tmp_path / "out" / "config.json")
    assert SERVING not in config
    written = config["quantization_config"]
    assert written["format"] == "mixed-precision"
    groups = written["config_groups"].values()
    layouts = {group["format"]: group["input_activations"] is not None for group in groups}
    assert layouts == {"int-quantized": True, "pack-quantized": False}
    assert torch.equal(ours(dense), logits(tmp_path / "out"))
    served(dense, dict.fromkeys((module for module in codes if "proj" in module), INT8))
    assert not torch.equal(ours(dense), logits(tmp_path / "out"))


def test_inputs_of_dense_matrices_are_refused(llama: Path, tmp_path: Path) -> None:
    dense, codes = quantize_checkpoint(llama, tmp_path / "dense", projections(W4))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="lm_head are rounded, but it has no codes"):
        ct.export(
            dense, codes, tmp_path / "out", logical_parameters=1, activations={"lm_head": INT8}
        )


def test_tied_quantized_embedding(tied_llama: Path, tmp_path: Path) -> None:
    dense, export = round_trip(
        tied_llama, tmp_path, lambda m: W4 if is_projection(m) or "embed" in m else None
    )
    assert "lm_head.weight" not in CheckpointReader(export)
    assert "model.embed_tokens.weight_packed" in CheckpointReader(export)
    assert torch.equal(logits(dense), logits(export))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
        ("GPTNeoX", {"tie_word_embeddings": True}),
        ("Granite", {"embedding_multiplier": 3.0, "tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["mixed", "alone"])
def test_an_embedding_of_a_byte_a_code_loads_beside_any_scheme(
    tmp_path: Path, name: str, options: dict[str, object], alone: bool
) -> None:
    base = tiny_model(name, **options)
    base.save_pretrained(tmp_path / "base")
    config = read_json(tmp_path / "base" / "config.json")

    def choose(module: str) -> WeightScheme | None:
        kind = ct.matrix_kind(module, config)
        if kind == "embedding" and "position" not in module:
            return WeightScheme(8, None, "full_range" if name == "Qwen2" else "symmetric")
        if alone or kind != "linear":
            return None
        return WeightScheme(6, 32) if module.endswith(LAST) else W4

    dense, export = round_trip(tmp_path / "base", tmp_path, choose, form="auto")
    assert torch.equal(logits(dense), logits(export))
    assert not torch.equal(logits(dense), logits(tmp_path / "base"))
    in_float = {"dtype": torch.float32}
    assert (logits(dense, **in_float) - logits(export, **in_float)).abs().max() < 1e-2
    written = read_json(export / "config.json")["quantization_config"]
    assert "dequantize" not in written
    tied = bool(base.config.tie_word_embeddings)
    assert ("lm_head.weight_scale" in CheckpointReader(export)) == tied


@pytest.mark.parametrize("with_head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPTNeoX", {"tie_word_embeddings": False}),
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
        ("Phi3", {"pad_token_id": 0}),
        ("Gemma2", {"head_dim": 16}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_families(
    tmp_path: Path, name: str, options: dict[str, int], mixed: bool, with_head: bool
) -> None:
    """Names on disk differ from names in the model for some; targets must fit the latter."""
    tiny_model(name, **options).save_pretrained(tmp_path / "base")
    config = read_json(tmp_path / "base" / "config.json")
    chosen = {"linear", "head"} if with_head else {"linear"}

    def choose(module: str) -> WeightScheme | None:
        if ct.matrix_kind(module, config) not in chosen:
            return None
        return WeightScheme(8, None) if mixed and module.endswith(LAST) else W4

    dense, export = round_trip(tmp_path / "base", tmp_path, choose)
    assert torch.equal(logits(dense), logits(export))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen3Moe", {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_mixture_of_experts(
    tmp_path: Path, name: str, options: dict[str, int], mixed: bool
) -> None:
    tiny_model(name, **options).save_pretrained(tmp_path / "base")
    attention = WeightScheme(8, None) if mixed else W4

    def choose(module: str) -> WeightScheme | None:
        if ".experts." in module:
            return W4
        return attention if "proj" in module else None

    dense, export = round_trip(tmp_path / "base", tmp_path, choose)
    assert torch.equal(logits(dense), logits(export))


def test_dequantize_route_agrees_in_any_dtype(llama: Path, tmp_path: Path) -> None:
    dense, export = round_trip(llama, tmp_path, projections(WeightScheme(4, 32, "asymmetric")))
    in_float = {"dtype": torch.float32}
    assert torch.equal(logits(dense, **in_float), logits(export, **in_float))


# --- refusals ------------------------------------------------------------------------------

EXPERT = "model.layers.0.mlp.experts.0.up_proj"
ASYMMETRIC = WeightScheme(4, 32, "asymmetric")


@pytest.mark.parametrize(
    ("targets", "form", "sentence"),
    [
        ([Target("h.0.c_fc", (64, 256), "conv1d", W4)], "pack-quantized", "Conv1D"),
        ([Target("mlp.gate", (4, 64), "router", W4)], "pack-quantized", "router"),
        ([Target(Q, (64, 48), "linear", W4)], "pack-quantized", "48 inputs, not a multiple of 32"),
        ([Target(Q, (64, 64), "linear", W4)], "int-quantized", "8-bit codes with one scale"),
        ([Target(Q, (8, 64), "linear", ASYMMETRIC)], "pack-quantized", "8 outputs"),
        ([Target(Q, (64, 64), "linear", WeightScheme(9, 32))], "pack-quantized", "packs 2 to 8"),
        (
            [Target("embed", (64, 64), "embedding", W4), Target(Q, (64, 64), "linear", ASYMMETRIC)],
            "pack-quantized",
            "one scheme",
        ),
        (
            [Target(EXPERT, (64, 64), "expert", None), Target(Q, (64, 64), "linear", W4)],
            "pack-quantized",
            "only when all experts are quantized",
        ),
        ([Target(EXPERT, (64, 64), "expert", ASYMMETRIC)], "pack-quantized", "zero-points"),
        (
            [Target(EXPERT, (64, 64), "expert", WeightScheme(8, None))],
            "int-quantized",
            "use pack-quantized",
        ),
    ],
)
def test_what_would_not_load_is_refused(targets: list[Target], form: str, sentence: str) -> None:
    problems = export_problems(targets, form)  # type: ignore[arg-type]
    assert len(problems) == 1
    assert sentence in problems[0]


def test_engines_have_limits() -> None:
    linear = [Target(f"{Q[:-6]}{leaf}", (64, 96), "linear", W4) for leaf in ("q_proj", "k_proj")]
    assert all(not engine_problems(e, linear, "pack-quantized") for e in ct_engines())
    mixed = [linear[0], Target(linear[1].name, (64, 96), "linear", WeightScheme(8, None))]
    assert "one fused layer" in engine_problems("vllm", mixed, "pack-quantized")[0]
    assert not engine_problems("transformers", mixed, "pack-quantized")
    narrow = [Target(Q, (64, 80), "linear", WeightScheme(3, 16))]
    assert len(engine_problems("vllm-cpu", narrow, "pack-quantized")) == 2


def test_who_loads_an_export_follows_from_the_same_rules() -> None:
    names = [f"{Q[:-6]}{leaf}" for leaf in ("q_proj", "k_proj")]
    wide = WeightScheme(8, None)
    mxfp4 = WeightScheme(4, 32, number="float", scales="e8m0")

    def found(
        *schemes: WeightScheme | None, form: Container = "auto", cache: bool = False
    ) -> Loading:
        targets = [
            Target(name, (64, 96), "linear", scheme)
            for name, scheme in zip(names, schemes, strict=True)
        ]
        return loading(targets, form, CacheScheme(((1.0, 1.0),)) if cache else None)

    assert found(W4, W4) == Loading(("Transformers", "vLLM", "SGLang"), {})
    mixed = found(wide, W4)
    assert mixed.titles == ("Transformers",)
    assert "one fused layer" in mixed.refusals["vLLM and SGLang"]
    three = found(WeightScheme(3, 32), WeightScheme(3, 32))
    assert three.titles == ("Transformers", "vLLM")  # on GPU, though not on CPU
    assert "(and 1 more problems like these)" in three.refusals["SGLang"]
    assert "cache" in found(W4, W4, cache=True).refusals["SGLang"]
    assert "mxfp4-pack-quantized" in found(mxfp4, mxfp4).refusals["SGLang"]
    assert found(wide, W4, form="gguf") == Loading(("llama.cpp",), {})
    assert found(wide, W4, form="dense").refusals == {}


def ct_engines() -> tuple[str, ...]:
    return ("transformers", "vllm", "vllm-cpu", "sglang")


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("quantized")
    return quantize_checkpoint(llama, folder, lambda m: W4 if m == Q else None)


def export(quantized: tuple[Path, object], out: Path, **replace: QTensor) -> None:
    codes = {Q: quantized[1][Q]} | replace  # type: ignore[index]
    ct.export(quantized[0], codes, out, logical_parameters=1)


def test_edited_weight_is_caught(quantized: tuple[Path, object], tmp_path: Path) -> None:
    good: QTensor = quantized[1][Q]  # type: ignore[index]
    codes = good.codes.clone()
    codes[3, 5] += 1 if codes[3, 5] < 0 else -1
    with pytest.raises(VerificationError, match="changed after it was rounded"):
        export(quantized, tmp_path, **{Q: QTensor(codes, good.scale, None, W4)})


def test_code_out_of_range_is_caught(quantized: tuple[Path, object], tmp_path: Path) -> None:
    good: QTensor = quantized[1][Q]  # type: ignore[index]
    narrower = QTensor(good.codes, good.scale, None, WeightScheme(3, 32))
    with pytest.raises(VerificationError, match="lost codes"):
        export(quantized, tmp_path, **{Q: narrower})


def test_scale_of_other_dtype_is_refused(quantized: tuple[Path, object], tmp_path: Path) -> None:
    good: QTensor = quantized[1][Q]  # type: ignore[index]
    with pytest.raises(ModelError, match="casts scales"):
        export(quantized, tmp_path, **{Q: QTensor(good.codes, good.scale.float(), None, W4)})


def test_codes_without_matrix_are_refused(quantized: tuple[Path, object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no matrix model.ghost.weight"):
        export(quantized, tmp_path, **{"model.ghost": quantized[1][Q]})  # type: ignore[index]


def test_quantizing_twice_is_refused(quantized: tuple[Path, object], tmp_path: Path) -> None:
    export(quantized, tmp_path / "once")
    with pytest.raises(ModelError, match="quantized already"):
        ct.export(tmp_path / "once", {}, tmp_path / "twice", logical_parameters=1)


def test_conv1d_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="Conv1D"):
        round_trip(tmp_path / "base", tmp_path, lambda m: W4 if m.endswith("c_fc") else None)


def packed_attention(module: str) -> WeightScheme | None:
    return W4 if "self_attn" in module else None


def packed_embedding(module: str) -> WeightScheme | None:
    return WeightScheme(8, None) if "embed" in module else packed_attention(module)


def two_asymmetric(module: str) -> WeightScheme | None:
    return ASYMMETRIC if "down" in module else packed_attention(module)


def asymmetric_all(module: str) -> WeightScheme | None:
    return ASYMMETRIC if is_projection(module) else None


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("Llama", packed_embedding),
        ("Llama", two_asymmetric),
        ("Qwen3Moe", packed_attention),
        ("Qwen3Moe", asymmetric_all),
    ],
)
def test_the_refused_indeed_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, choose: object
) -> None:
    """Pins limits of the installed libraries: when one is lifted, this says so."""
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    tiny_model(name, **(experts if "Moe" in name else {})).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError):
        round_trip(tmp_path / "base", tmp_path, choose)
    monkeypatch.setattr(ct, "export_problems", lambda *_: [])
    dense, out = round_trip(tmp_path / "base", tmp_path, choose)
    with pytest.raises((RuntimeError, ValueError, AttributeError, AssertionError)):
        assert torch.equal(logits(dense), logits(out))


def test_an_embedding_that_scales_does_not_load_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("Gemma2", head_dim=16).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="only when every quantized matrix has one scheme"):
        round_trip(tmp_path / "base", tmp_path, packed_embedding, form="auto")
    monkeypatch.setattr(ct, "SCALED_EMBEDDINGS", ())
    _, out = round_trip(tmp_path / "base", tmp_path, packed_embedding, form="auto")
    with pytest.raises(AssertionError, match="embed_scale"):
        logits(out)


# --- streaming -----------------------------------------------------------------------------


def test_small_shards_hold_the_same_and_resume(llama: Path, tmp_path: Path) -> None:
    dense, codes = quantize_checkpoint(llama, tmp_path / "dense", lambda m: W4 if m == Q else None)
    ct.export(dense, codes, tmp_path / "one", logical_parameters=1)
    ct.export(dense, codes, tmp_path / "many", logical_parameters=1, shard_bytes=20_000)
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    shards = CheckpointWriter(tmp_path / "many").shards()
    assert len(shards) > 4
    assert same_tensors(one, many)
    before = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    (tmp_path / "many" / INDEX).unlink()
    (tmp_path / "many" / shards[2]).unlink()
    ct.export(dense, codes, tmp_path / "many", logical_parameters=1, shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == before


def test_untouched_tensors_keep_their_bytes(llama: Path, tmp_path: Path) -> None:
    _, out = round_trip(llama, tmp_path, projections(W4))
    parent, child = CheckpointReader(llama), CheckpointReader(out)
    untouched = [name for name in parent if not is_projection(name)]
    assert len(untouched) == 7
    assert all(parent.tensor_sha256(name) == child.tensor_sha256(name) for name in untouched)


def test_configuration_is_what_engines_expect(llama: Path, tmp_path: Path) -> None:
    _, out = round_trip(llama, tmp_path, projections(W4))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert shard_name(0) not in CheckpointWriter(out).shards()
