"""`quantize.bnb` from the recipe to what transformers computes with the real library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compressor import export_checks, resources
from compressor.errors import ModelError
from compressor.formats.codes import CodesReader
from compressor.formats.headers import read_folder
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import measure
from compressor.journal import Journal
from compressor.model.architecture import Architecture
from compressor.model.load import load_model
from compressor.model.serving import serving_config
from compressor.numerics.absmax import round_to_absmax
from compressor.numerics.activations import round_inputs
from compressor.recheck import verify_folder
from compressor.stages.quantize_bnb import QuantizeBnb
from compressor.types import ActivationScheme, WeightScheme, activation_scheme
from tests.runs import MIXTRAL, TINY, Ran, plan_stages, ran, refused

library = pytest.importorskip("bitsandbytes")

EXPORT = "export:\n  - {format: bitsandbytes, engines: [transformers]}\n"
NF4 = "  - {method: quantize.bnb, bits: 4}\n"
INT8 = "  - {method: quantize.bnb, bits: 8}\n"


FORM = "bitsandbytes"


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(tmp_path_factory.mktemp("nf4"), NF4 + EXPORT, FORM)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(tmp_path_factory.mktemp("int8"), INT8 + EXPORT, FORM)


# ---------------------------------------------------------------------- the real thing


def tokens() -> Tensor:
    return torch.randint(500, (2, 48), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.eval()(tokens()).logits.float()
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transformers_computes_what_was_measured(kind: str, request: pytest.FixtureRequest) -> None:
    """Beside what rounding changed, the kernels' other order of sums is small."""
    run: Ran = request.getfixturevalue(kind)
    real = transformers.AutoModelForCausalLM.from_pretrained(run.deliverable, dtype="auto")
    layers = {type(m).__name__ for n, m in real.named_modules() if n.endswith("_proj")}
    assert layers == {{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]}
    ours = logits_of(load_model(run.stage))
    original = logits_of(load_model(resources.builtin_model("tiny")))
    off = apart(logits_of(real), ours)
    assert off < (0.25 if kind == "nf4" else 1.0) * apart(ours, original)
    assert off < 0.02


def test_every_real_layer_of_llm_int8_computes_what_ours_does(int8: Ran) -> None:
    """In whole models roundings of inputs part ways; layer by layer, ours are a fifth as far."""
    real = transformers.AutoModelForCausalLM.from_pretrained(
        int8.deliverable, dtype=torch.float32
    ).eval()
    ours = load_model(int8.stage, dtype=torch.float32)
    original = load_model(resources.builtin_model("tiny"), dtype=torch.float32)
    names = [name for name, _ in original.named_modules() if name.endswith("_proj")]
    seen: dict[str, Tensor] = {}
    for name in names:
        layer = original.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.inference_mode():
        original(tokens())
        for name, inputs in seen.items():
            models = (real, ours, original)
            one, other, plain = (m.get_submodule(name)(inputs.clone()).float() for m in models)
            assert apart(one, other) < min(0.004, 0.3 * apart(other, plain)), name
    assert len(seen) == 28


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_export_unpacked_by_the_library_has_equal_logits(
    kind: str, request: pytest.FixtureRequest
) -> None:
    run: Ran = request.getfixturevalue(kind)
    (exported,) = Journal(run.folder / "journal.jsonl").all("exported")
    assert exported["max_logit_difference"] == 0.0
    assert torch.equal(logits_of(load_model(run.deliverable)), logits_of(load_model(run.stage)))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_plan_knows_the_bytes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Ran = request.getfixturevalue(kind)
    planned = plan_stages(tmp_path, (NF4 if kind == "nf4" else INT8) + EXPORT)
    stored = sum(info.nbytes for info in read_folder(run.deliverable).values())
    assert planned.exports[0].tensor_bytes == stored == planned.stages[0].packed_bytes
    measured = measure(run.deliverable, planned.parameters)
    assert planned.stages[0].by_role == measured.by_role
    assert planned.stages[0].bits_linear == pytest.approx(measured.bits_linear)
    assert measured.bits_nominal == (4 if kind == "nf4" else 8)


def test_verify_passes(int8: Ran) -> None:
    assert {check.passed for check in verify_folder(int8.folder)} == {True}


def test_verify_passes_and_catches_a_flipped_nibble(nf4: Ran, tmp_path: Path) -> None:
    run = Path(shutil.copytree(nf4.folder, tmp_path / "run"))
    assert {check.passed for check in verify_folder(run)} == {True}
    folder = run / "deliverable" / "bitsandbytes"
    info = read_folder(folder)["model.layers.1.self_attn.q_proj.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.begin + 100)
        byte = stream.read(1)[0]
        stream.seek(info.begin + 100)
        stream.write(bytes([byte ^ 0x80]))
    failed = {c.name for c in verify_folder(run) if c.passed is False}
    assert failed == {"hash", "weights"}


def test_codes_are_those_of_the_library(nf4: Ran, int8: Ran) -> None:
    original = CheckpointReader(resources.builtin_model("tiny"))
    for run, scheme in ((nf4, WeightScheme(4, 64, number="nf4")), (int8, INT8_SCHEME)):
        codes = CodesReader(run.stage)
        assert len(codes) == 28
        assert all(codes.scheme(module) == scheme for module in codes)
        module = "model.layers.2.mlp.down_proj"
        weight = original[f"{module}.weight"]
        again = round_to_absmax(weight.float(), scheme, weight.dtype)
        assert torch.equal(codes[module].codes, again.codes)


INT8_SCHEME = WeightScheme(8, None, number="absmax")


def test_snippets_name_the_package(nf4: Ran) -> None:
    (artifact,) = nf4.outcome.report.deliverables
    assert "pip install bitsandbytes" in artifact.load_snippets["Transformers"]


# ---------------------------------------------------------------------- inputs of LLM.int8


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("rows", [1, 7])
def test_inputs_are_rounded_as_the_library_rounds_them(threshold: float, rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, 96, generator=random).bfloat16()
    inputs[0, 5], inputs[-1, 7] = 40.0, -6.0
    codes, largest, columns = library.functional.int8_vectorwise_quant(
        inputs.half(), threshold=threshold
    )
    expected = (codes * (largest.unsqueeze(1) / 127)).bfloat16()
    if columns is not None:
        expected[:, columns] = inputs[:, columns]
    ours = round_inputs(inputs, ActivationScheme("absmax", 8, threshold=threshold))
    assert torch.equal(ours, expected)


def test_a_layer_computes_what_ours_does() -> None:
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 96, generator=random) / 10).bfloat16()
    inputs = torch.randn(3, 11, 96, generator=random).bfloat16()
    inputs[1, 4, 9] = 30.0
    real = library.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    real.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    expected = real.to("cpu").eval()(inputs)
    dense = round_to_absmax(weight.float(), INT8_SCHEME, weight.dtype).dequantize()
    seen = round_inputs(inputs, ActivationScheme("absmax", 8, threshold=6.0))
    off = apart(nn.functional.linear(seen.float(), dense.float()), expected.float())
    unrounded = apart(nn.functional.linear(inputs.float(), weight.float()), expected.float())
    assert off < 0.003 < unrounded


def test_an_outlier_keeps_its_column_for_all_tokens() -> None:
    inputs = torch.full((2, 4), 0.3).bfloat16()
    inputs[0, 1], inputs[1, 0] = 50.0, 1.0
    kept = round_inputs(inputs, ActivationScheme("absmax", 8, threshold=6.0))
    assert torch.equal(kept[:, 1], inputs[:, 1])
    assert not torch.equal(kept[1], inputs[1])
    none = round_inputs(inputs, ActivationScheme("absmax", 8))
    assert not torch.equal(none[1, 1], inputs[1, 1])
    assert not torch.equal(none, kept)
    assert not round_inputs(torch.zeros(2, 4), ActivationScheme("absmax", 8)).any()


def test_the_threshold_is_in_the_configuration(tmp_path: Path) -> None:
    scheme = ActivationScheme("absmax", 8, threshold=4.5)
    assert activation_scheme(scheme.name) == scheme
    assert activation_scheme("llm-int8-below-x") is None
    assert activation_scheme("int8") == ActivationScheme("int", 8)
    module = "model.layers.0.mlp.up_proj"
    config = serving_config(TINY, {module: scheme})
    assert Architecture.from_config(config).activations == {module: scheme}
    config["compressor"] = {"activations": {"llm-int8-below-": [module]}}
    with pytest.raises(ModelError, match="rounding of inputs"):
        Architecture.from_config(config)


def test_llm_int8_says_so_in_config_json(int8: Ran) -> None:
    config = json.loads((int8.deliverable / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_threshold"] == 6.0
    assert set(config["compressor"]["activations"]) == {"llm-int8-below-6.0"}


# ---------------------------------------------------------------------- what the plan refuses


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq", "gguf"])
def test_only_bitsandbytes_takes_nf4(tmp_path: Path, form: str) -> None:
    assert "only bitsandbytes holds" in refused(
        tmp_path, NF4 + f"export:\n  - {{format: {form}}}\n"
    )


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf", "dense"])
def test_other_formats_cannot_say_what_llm_int8_does_to_inputs(tmp_path: Path, form: str) -> None:
    said = refused(tmp_path, INT8 + f"export:\n  - {{format: {form}}}\n")
    assert f"{form} cannot say that inputs are rounded" in said
    assert "export bitsandbytes" in said


def test_nf4_may_be_exported_dense(tmp_path: Path) -> None:
    planned = plan_stages(tmp_path, NF4 + "export:\n  - {format: dense}\n")
    assert planned.exports[0].tensor_bytes == planned.base_bytes


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("  - {method: quantize.rtn, group_size: 64}\n" + EXPORT, "use quantize.bnb"),
        (
            "  - {method: quantize.rtn, bits: 8, group_size: channel, activations: int8}\n"
            + EXPORT,
            "export compressed-tensors",
        ),
        (
            "  - {method: quantize.bnb, targets: [attention]}\n"
            "  - {method: quantize.bnb, bits: 8, targets: [mlp]}\n" + EXPORT,
            "there are both",
        ),
        (
            "  - {method: quantize.bnb, bits: 8, targets: [attention]}\n"
            "  - {method: quantize.bnb, bits: 8, threshold: 0.0, targets: [mlp]}\n" + EXPORT,
            "one threshold",
        ),
        (NF4 + NF4, "rounded by an earlier stage"),
        ("  - {method: quantize.bnb, threshold: 5.0}\n", "NF4 leaves inputs as they are"),
        ("  - {method: quantize.bnb, bits: 8, group_size: 32}\n", "for each output channel"),
        ("  - {method: quantize.bnb, targets: [embed]}\n", "keeps the embedding"),
        ("  - {method: quantize.bnb, targets: [nothing]}\n", "matches no matrix"),
        ("  - {method: quantize.bnb, ignore: [linear]}\n", "nothing is left to round"),
        (NF4 + "export:\n  - {format: bitsandbytes, engines: [sglang]}\n", "sglang does not load"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, stages: str, said: str) -> None:
    assert said in refused(tmp_path, stages)


def test_experts_and_odd_widths_are_refused(tmp_path: Path) -> None:
    assert "a fused expert" in refused(tmp_path, NF4, MIXTRAL)
    assert "a router" in refused(
        tmp_path, "  - {method: quantize.bnb, targets: ['*gate']}\n", MIXTRAL
    )
    odd = TINY | {"intermediate_size": 672}
    said = refused(tmp_path, NF4, odd)
    assert "blocks of 64 do not divide the 672 inputs of model.layers.0.mlp.down_proj" in said
    smaller = NF4.replace("bits: 4", "group_size: 32") + EXPORT
    assert plan_stages(tmp_path, smaller, odd).stages[0].bits_linear == 5
    assert plan_stages(tmp_path, INT8 + EXPORT, odd).stages[0].matrices == 28
    gpt2 = {
        **{"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 256},
        **{"n_positions": 64, "tie_word_embeddings": True, "dtype": "bfloat16"},
    }
    assert "a Conv1D" in refused(tmp_path, NF4, gpt2)


def test_a_missing_package_is_said_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_checks, "find_spec", lambda _: None)
    said = refused(tmp_path, NF4 + EXPORT)
    assert "bitsandbytes export needs the package bitsandbytes, which is not installed" in said
    assert "pip install bitsandbytes" in said


def test_what_the_plan_says_of_the_stage(tmp_path: Path) -> None:
    assert "outliers" in plan_stages(tmp_path, INT8 + EXPORT).stages[0].remarks[0]
    assert plan_stages(tmp_path, NF4 + EXPORT).stages[0].remarks == ()
    assert QuantizeBnb().width_multiple == 64
    assert QuantizeBnb(bits=8).width_multiple == 1
    assert [QuantizeBnb().label, QuantizeBnb(bits=8).label] == ["NF4 g64", "LLM.int8"]
