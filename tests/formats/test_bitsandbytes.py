"""bitsandbytes checkpoints: what transformers makes of them with the real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError, ResourceError, VerificationError
from compressor.formats import exporters
from compressor.formats.codes import read_codes, write_codes
from compressor.formats.exchange import container_problems
from compressor.formats.exporters import Source
from compressor.formats.headers import read_folder
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import bits_per_weight, measure, packed_bytes
from compressor.formats.support import Kind, Target, engine_problems
from compressor.model.load import load_model
from compressor.numerics.absmax import round_to_absmax
from compressor.types import ActivationScheme, QTensor, WeightScheme
from compressor.verify import verify_weights

from .helpers import logits, quantize_checkpoint, same_tensors

pytest.importorskip("bitsandbytes")
from compressor.formats import bitsandbytes as bnb

NF4 = WeightScheme(4, 64, number="nf4")
INT8 = WeightScheme(8, None, number="absmax")
BOTH = pytest.mark.parametrize("scheme", [NF4, INT8], ids=["nf4", "llm-int8"])
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .helpers import tiny_model

    folder = tmp_path_factory.mktemp("wide")
    tiny_model("Llama", tie_word_embeddings=True, **WIDE).save_pretrained(folder)
    return folder


def rounded(
    base: Path, folder: Path, scheme: WeightScheme, keep: str = " "
) -> tuple[Path, dict[str, QTensor]]:
    """A checkpoint with the linear layers of its blocks rounded, but those named `keep`."""
    grid = WeightScheme(4, 64)  # replaced below: the helper knows integers only
    dense, names = quantize_checkpoint(
        base, folder, lambda module: grid if ".layers." in module and keep not in module else None
    )
    original, codes = CheckpointReader(base), {}
    state = dict(CheckpointReader(dense).items())
    for module in names:
        weight = original[f"{module}.weight"]
        codes[module] = round_to_absmax(weight.float(), scheme, weight.dtype)
        state[f"{module}.weight"] = codes[module].dequantize()
    from safetensors.torch import save_file

    (file,) = dense.glob("*.safetensors")
    save_file(state, file, metadata={"format": "pt"})
    return dense, codes


def source(folder: Path, codes: dict[str, QTensor], **options: Any) -> Source:
    return Source(folder, codes, 1, "bitsandbytes", **options)


@BOTH
def test_transformers_reads_the_weights_that_were_rounded(
    base: Path, tmp_path: Path, scheme: WeightScheme
) -> None:
    dense, codes = rounded(base, tmp_path / "dense", scheme)
    exporters.exporter("bitsandbytes").write(source(dense, codes), tmp_path / "out")
    model = load_model(tmp_path / "out")
    stored = [(n, t) for n, t in model.state_dict().items() if n != "lm_head.weight"]
    assert verify_weights(stored, dense, (), "bitsandbytes") == 0.0
    assert {type(module) for module in model.modules() if "Linear" in repr(type(module))} == {
        torch.nn.Linear
    }


@pytest.mark.parametrize("block", [32, 64])
def test_the_real_layers_of_nf4_compute_what_ours_do(
    base: Path, tmp_path: Path, block: int
) -> None:
    """The library's kernels sum in another order and, on some processors, in bf16."""
    scheme = WeightScheme(4, block, number="nf4")
    dense, codes = rounded(base, tmp_path / "dense", scheme, keep="down_proj")
    exporters.exporter("bitsandbytes").write(source(dense, codes), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert kinds["model.layers.0.mlp.down_proj"] == kinds["lm_head"] == "Linear"
    ours, original = logits(dense), logits(base)
    off = (logits(tmp_path / "out") - ours).float().norm() / ours.float().norm()
    assert off < 0.01
    assert (original - ours).float().norm() / ours.float().norm() > 5 * off


def test_what_is_written_is_what_transformers_saves(base: Path, tmp_path: Path) -> None:
    """Quantized and saved by transformers itself: the same tensors, names and configuration."""
    for scheme, options in (
        (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (INT8, {"load_in_8bit": True}),
    ):
        name = scheme.number
        dense, codes = rounded(base, tmp_path / name / "dense", scheme)
        exporters.exporter("bitsandbytes").write(source(dense, codes), tmp_path / name / "ours")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", quantization_config=transformers.BitsAndBytesConfig(**options)
        )
        model.save_pretrained(tmp_path / name / "theirs")
        ours, theirs = (CheckpointReader(tmp_path / name / who) for who in ("ours", "theirs"))
        assert same_tensors(dict(ours.items()), dict(theirs.items()))
        said = [
            json.loads((tmp_path / name / who / "config.json").read_text())["quantization_config"]
            for who in ("ours", "theirs")
        ]
        for key in ("quant_method", "load_in_4bit", "load_in_8bit", "llm_int8_threshold"):
            assert said[0][key] == said[1][key]
        assert said[0].keys() == said[1].keys() - {"_load_in_4bit", "_load_in_8bit"}
        assert said[0]["llm_int8_skip_modules"] == ["lm_head"]


@BOTH
def test_sizes_are_those_of_the_formula(base: Path, tmp_path: Path, scheme: WeightScheme) -> None:
    dense, codes = rounded(base, tmp_path / "dense", scheme)
    exporters.exporter("bitsandbytes").write(source(dense, codes), tmp_path / "out")
    expected = sum(packed_bytes(tuple(q.codes.shape), scheme).total for q in codes.values())  # type: ignore[arg-type]
    untouched = set(CheckpointReader(dense)) - {f"{module}.weight" for module in codes}
    stored = read_folder(tmp_path / "out")
    assert expected == sum(info.nbytes for name, info in stored.items() if name not in untouched)
    report = measure(tmp_path / "out", 1)
    assert report.bits_nominal == scheme.bits
    shapes = [tuple(q.codes.shape) for q in codes.values()]
    bits = sum(bits_per_weight(s, scheme) * s[0] * s[1] for s in shapes)  # type: ignore[arg-type]
    assert report.bits_linear == pytest.approx(bits / sum(s[0] * s[1] for s in shapes))
    assert report.by_role["codes"] == sum(s[0] * s[1] for s in shapes) * scheme.bits // 8


def test_nf4_costs_four_and_a_half_bits() -> None:
    assert bits_per_weight((128, 256), NF4) == 4.5
    assert bits_per_weight((128, 256), INT8) == 8 + 32 / 256


@given(
    seed=st.integers(0, 1 << 30),
    out=st.integers(1, 6),
    blocks=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scheme=st.sampled_from([NF4, INT8]),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(
    seed: int, out: int, blocks: int, dtype: torch.dtype, scheme: WeightScheme
) -> None:
    random = torch.Generator().manual_seed(seed)
    lowest, highest = scheme.code_range
    shape = (out, 64 * blocks)
    codes = torch.randint(lowest, highest + 1, shape, generator=random).to(torch.int8)
    groups = scheme.groups(shape[1])
    scale = torch.rand(out, groups, generator=random).to(dtype)
    quantized = QTensor(codes, scale, None, scheme)
    stored = bnb.pack(quantized)
    again = bnb.unpack(stored)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale.float())
    assert again.scheme == scheme
    assert torch.equal(bnb.decompress(stored).to(dtype), quantized.dequantize())


@BOTH
def test_codes_files_keep_them(tmp_path: Path, scheme: WeightScheme) -> None:
    quantized = round_to_absmax(torch.randn(8, 128), scheme, torch.bfloat16)
    write_codes(tmp_path / "codes-x.safetensors", {"x": quantized})
    again = read_codes(tmp_path / "codes-x.safetensors")["x"]
    assert again.scheme == scheme
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(), quantized.dequantize())


def test_swapped_nibbles_are_caught(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant of `pack` with the first code low; unpacked alike, only the library tells."""
    dense, codes = rounded(base, tmp_path / "dense", NF4)
    right, back = bnb.pack, bnb.unpack

    def swapped(quantized: QTensor) -> dict[str, torch.Tensor]:
        stored = right(quantized)
        return stored | {"weight": stored["weight"] >> 4 | stored["weight"] << 4}

    monkeypatch.setattr(bnb, "pack", swapped)
    monkeypatch.setattr(
        bnb, "unpack", lambda t: back({**t, "weight": t["weight"] >> 4 | t["weight"] << 4})
    )
    with pytest.raises(VerificationError, match="bitsandbytes reads"):
        bnb.write(source(dense, codes), tmp_path / "out")


def test_weights_that_moved_after_rounding_are_caught(base: Path, tmp_path: Path) -> None:
    dense, codes = rounded(base, tmp_path / "dense", NF4)
    module = "model.layers.1.mlp.up_proj"
    codes[module].codes[0, 0] = -codes[module].codes[0, 0] - 1
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj.weight was changed"):
        bnb.write(source(dense, codes), tmp_path / "out")


def target(scheme: WeightScheme | None, kind: Kind = "linear", **options: Any) -> Target:
    return Target("model.layers.0.mlp.up_proj", (128, 128), kind, scheme, **options)


@pytest.mark.parametrize("container", ["auto", "pack-quantized", "gptq", "awq", "gguf"])
@BOTH
def test_no_other_container_holds_them(container: Any, scheme: WeightScheme) -> None:
    (said,) = container_problems([target(scheme)], container, "llama")
    assert "only bitsandbytes holds" in said


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([target(WeightScheme(4, 64))], "use quantize.bnb"),
        ([target(WeightScheme(4, 32, number="float", scales="e8m0"))], "use quantize.bnb"),
        ([target(NF4, "expert")], "linear layers"),
        ([target(NF4, "head")], "linear layers"),
        ([target(NF4), target(INT8)], "there are both"),
        (
            [
                target(INT8, activations=ActivationScheme("absmax", 8, threshold=6.0)),
                target(INT8, activations=ActivationScheme("absmax", 8)),
            ],
            "one threshold",
        ),
        ([Target("x", (128, 96), "linear", NF4)], "not a multiple of 64"),
    ],
)
def test_what_bitsandbytes_does_not_hold(targets: list[Target], said: str) -> None:
    found = container_problems(targets, "bitsandbytes", "llama")
    assert any(said in sentence for sentence in found)
    assert not container_problems([target(NF4), target(None)], "bitsandbytes", "llama")


def test_engines_that_load_it() -> None:
    inputs = ActivationScheme("absmax", 8, threshold=4.0)
    for engine in ("transformers", "vllm"):
        for one in (target(NF4), target(INT8, activations=inputs)):
            assert engine_problems(engine, [one], "bitsandbytes") == []
    (said,) = engine_problems("vllm-cpu", [target(NF4)], "bitsandbytes")
    assert "does not load bitsandbytes" in said


def test_codes_of_another_kind_are_refused_by_the_writer(base: Path, tmp_path: Path) -> None:
    dense, codes = quantize_checkpoint(
        base, tmp_path / "dense", lambda m: WeightScheme(4, 64) if ".layers." in m else None
    )
    with pytest.raises(ModelError, match=r"use quantize\.bnb"):
        bnb.write(Source(dense, codes, 1, "bitsandbytes"), tmp_path / "out")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    monkeypatch.setattr(exporters, "import_module", absent)
    with pytest.raises(ResourceError, match="needs the package bitsandbytes"):
        exporters.exporter("bitsandbytes")
