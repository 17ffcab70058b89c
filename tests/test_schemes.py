"""Formats beyond integer weights, from the recipe to what transformers serves (`builtin:tiny`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor import resources
from compressor.errors import ModelError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.load import load_model, read_config
from compressor.model.serving import SERVING, serving_config
from compressor.model.walk import BlockWalk
from compressor.numerics.activations import round_inputs
from compressor.recipe import load_recipe
from compressor.types import ACTIVATIONS, TokenBatch
from tests.runs import MIXTRAL, TINY, Ran, plan_stages, power_of_two, ran, refused

W8A8 = "  - {method: quantize.rtn, bits: 8, group_size: channel, activations: int8}\n"


# ---------------------------------------------------------------------- rounded inputs


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(tmp_path_factory.mktemp("w8a8"), W8A8)


def test_what_is_served_is_what_was_measured(w8a8: Ran) -> None:
    assert w8a8.exported["max_logit_difference"] == 0
    config = read_config(w8a8.deliverable)
    assert SERVING not in config
    assert config["quantization_config"]["format"] == "int-quantized"
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"]
    assert group["input_activations"]["strategy"] == "token"
    assert w8a8.outcome.report.variants[1].label == "RTN W8A8 channel"


def test_scores_include_the_rounding_of_inputs(w8a8: Ran, tmp_path: Path) -> None:
    weights_only = ran(tmp_path, W8A8.replace("int8}", "none}"))
    assert weights_only.exported["max_logit_difference"] == 0
    # The same weights: only the inputs are rounded in one of the two.
    codes = [next(r.stage.glob("codes-block-00000*")).read_bytes() for r in (w8a8, weights_only)]
    assert codes[0] == codes[1]
    assert w8a8.kl > 2 * weights_only.kl


def test_the_formula_is_the_size_on_disk(w8a8: Ran) -> None:
    made = plan_stages(w8a8.folder, W8A8)
    size = w8a8.outcome.report.variants[1].size
    assert made.stages[0].packed_bytes == made.exports[0].tensor_bytes == size.tensor_bytes
    assert made.stages[0].by_role == size.by_role.model_dump()
    assert size.bits_linear == pytest.approx(made.stages[0].bits_linear)


def test_streamed_and_whole_agree_and_both_round(w8a8: Ran, tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",))
    walk = BlockWalk(w8a8.stage, [batch], dtype=torch.float32, scratch=tmp_path)
    for _ in walk.blocks():
        pass
    streamed = walk.logits(next(walk.final_hidden()))
    with torch.no_grad():
        whole = load_model(w8a8.stage, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_rounded_inputs(tmp_path: Path) -> None:
    source = resources.builtin_model("tiny")
    ids = torch.arange(40)[None]
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",))
    name = "model.layers.0.mlp.down_proj"
    scheme = ACTIVATIONS["int8"]
    seen = []
    for activations in ({}, {name: scheme}):
        walk = BlockWalk(source, [batch], scratch=tmp_path, activations=activations)
        block = next(walk.blocks())
        group = block.matrix(name).info.input_group
        block.capture(lambda _, inputs, __: seen.append(inputs.clone()), [group])
    assert torch.equal(round_inputs(seen[0], scheme), seen[1])
    assert not torch.equal(seen[0], seen[1])


def test_a_second_stage_keeps_the_rounding_of_the_first() -> None:
    first = serving_config(TINY, {"model.layers.0.mlp.down_proj": ACTIVATIONS["int8"]})
    both = serving_config(first, {"model.layers.1.mlp.down_proj": ACTIVATIONS["int8"]})
    assert len(Architecture.from_config(both).activations) == 2
    assert serving_config(both, {}) == both
    assert serving_config(TINY, {}) == TINY
    kept = Architecture.from_config(both).with_config(max_position_embeddings=256)
    assert len(kept.activations) == 2


@pytest.mark.parametrize("value", ["int8", {"activations": {"int3": []}}, {"activations": [1]}])
def test_a_rounding_that_nobody_knows_is_an_error(value: object) -> None:
    with pytest.raises(ModelError, match="rounding of inputs"):
        Architecture.from_config({**TINY, SERVING: value})


def test_what_rounded_inputs_exclude(tmp_path: Path) -> None:
    dense = refused(tmp_path, W8A8 + "export: [{format: dense}]\n")
    assert "dense cannot say that inputs are rounded" in dense
    assert "export compressed-tensors" in dense
    experts = refused(tmp_path, W8A8, MIXTRAL)
    assert "does not round the inputs of experts" in experts
    packed = W8A8.replace("int8}", "int8, symmetry: asymmetric}")
    form = "export: [{format: compressed-tensors, form: pack-quantized}]\n"
    assert "only where inputs are not rounded" in refused(tmp_path, packed + form)


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "sglang"])
def test_engines_multiply_int8_by_int8(tmp_path: Path, engine: str) -> None:
    export = f"export: [{{format: compressed-tensors, engines: [{engine}]}}]\n"
    assert plan_stages(tmp_path, W8A8 + export)
    w4a8 = W8A8.replace("bits: 8, group_size: channel", "bits: 4, group_size: 64")
    assert "no kernel in this layout" in refused(tmp_path, w4a8 + export)
    bytewise = export.replace("engines", "form: int-quantized, engines")
    assert "8-bit weights by channel" in refused(tmp_path, w4a8 + bytewise)
    (remark,) = plan_stages(tmp_path, w4a8).exports[0].remarks
    assert "vLLM and SGLang would not load it" in remark
    assert "no kernel in this layout" in remark
    asymmetric = W8A8.replace("int8}", "int8, symmetry: asymmetric}")
    assert "asymmetric" in refused(tmp_path, asymmetric + export)


def test_the_plan_says_that_inputs_are_rounded(tmp_path: Path) -> None:
    for stages in (W8A8, W8A8.replace("rtn", "gptq")):
        remark, caution = plan_stages(tmp_path, stages).stages[0].remarks
        assert "28 matrices" in remark
        assert "int8" in remark
        assert "transform.smoothquant" in caution


# ---------------------------------------------------------------------- float formats


def floats(weights: str, more: str = "") -> str:
    return f"  - {{method: quantize.rtn, weights: {weights}{more}}}\n"


def test_fp8_from_the_recipe_to_the_logits(tmp_path: Path) -> None:
    fp8 = ran(tmp_path, floats("fp8", ", activations: fp8"))
    made = plan_stages(tmp_path, floats("fp8", ", activations: fp8"))
    assert fp8.exported["max_logit_difference"] == 0
    assert fp8.outcome.report.variants[1].label == "RTN FP8A8 channel"
    size = fp8.outcome.report.variants[1].size
    assert made.stages[0].by_role == size.by_role.model_dump()
    assert size.bits_linear == pytest.approx(made.stages[0].bits_linear)
    # The lock spells out what the format fixed, and is itself a recipe.
    lock = load_recipe(fp8.folder / "recipe.lock.yaml")
    options = lock.stages[0].model_dump()
    assert (options["bits"], options["group_size"]) == (8, "channel")


def test_fp8_in_blocks_from_the_recipe_to_the_logits(tmp_path: Path) -> None:
    model = power_of_two(tmp_path / "model")
    blocks = ran(
        tmp_path, floats("fp8-block", ", activations: fp8, ignore: [k, v]"), model=str(model)
    )
    assert blocks.exported["max_logit_difference"] == 0
    config = read_config(blocks.deliverable)["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["block_structure"] == [128, 128]
    assert (group["input_activations"]["strategy"], config["format"]) == (
        "group", "float-quantized")  # fmt: skip
    size = blocks.outcome.report.variants[1].size
    assert size.bits_linear == pytest.approx((16 + 8 * (8 + 16 / 128**2)) / 9)  # k and v stay
    assert abs(blocks.kl) < 1e-3  # the embedding decides nearly everything


@pytest.mark.parametrize(
    ("weights", "label", "bits"), [("mxfp4", "RTN MXFP4", 4.25), ("nvfp4", "RTN NVFP4", 4.5)]
)
def test_fp4_is_planned(tmp_path: Path, weights: str, label: str, bits: float) -> None:
    made = plan_stages(tmp_path, floats(weights))
    assert made.stages[0].bits_linear == pytest.approx(bits, abs=0.01)
    assert load_recipe(tmp_path / "recipe.yaml").stages[0].label == label


@pytest.mark.parametrize(
    ("stage", "words", "hint"),
    [
        (floats("mxfp4", ", bits: 8"), "mxfp4 has bits 4, not 8", "leave `bits` out"),
        (floats("nvfp4", ", group_size: 64"), "nvfp4 has group_size 16", "`weights: int`"),
        (floats("mxfp4", ", symmetry: asymmetric"), "symmetry symmetric", "leave `symmetry` out"),
        (floats("mxfp4", ", activations: fp8"), "engines do not multiply", "mxfp4 weights: none"),
        (floats("fp8", ", activations: int8"), "engines do not multiply", "none, fp8"),
        (floats("int", ", activations: fp8"), "engines do not multiply", "none, int8"),
        (floats("fp8-block"), "blocks of 128 x 128 do not divide", "`weights: fp8`"),
        (
            floats("fp8", ", overrides: [{pattern: down, bits: 4}]"),
            "which no override can change",
            "`ignore`",
        ),
        (floats("nvfp4").replace("rtn", "autoround"), "plain integer grids", "quantize.gptq"),
        (floats("fp8") + "export: [{format: gptq}]\n", "gptq holds integer codes", ""),
    ],
)
def test_what_a_float_format_fixes(tmp_path: Path, stage: str, words: str, hint: str) -> None:
    if "int" in stage:
        stage = stage.replace("weights: int", "weights: int, group_size: 64")
    told = refused(tmp_path, stage)
    assert words in told
    assert hint in told


def global_scales(run: Ran, block: int, *matrices: str) -> set[float]:
    """Of these matrices of a block, as the deliverable has them."""
    exported = CheckpointReader(run.deliverable)
    names = (f"model.layers.{block}.{name}_proj.weight_global_scale" for name in matrices)
    return {float(exported[name]) for name in names}


ATTENTION = ("self_attn.q", "self_attn.k", "self_attn.v")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_fused_matrices_have_one_global_scale(tmp_path: Path, method: str) -> None:
    """vLLM keeps one of them for q, k and v, and one for gate and up, of a block."""
    run = ran(tmp_path, floats("nvfp4").replace("rtn", method))
    for block in range(TINY["num_hidden_layers"]):
        attention = global_scales(run, block, *ATTENTION)
        mlp = global_scales(run, block, "mlp.gate", "mlp.up")
        assert len(attention) == len(mlp) == 1
        assert attention != mlp
    assert "vLLM" in run.outcome.report.deliverables[0].load_snippets


def test_fused_matrices_of_nvfp4_split_over_stages(tmp_path: Path) -> None:
    """Their divisors differ: refused for vLLM; without it, the plan and the report say so."""
    split = floats("nvfp4", ", targets: [q]") + floats("nvfp4", ", targets: [k, v, o, mlp]")
    vllm = "export: [{format: compressed-tensors, engines: [vllm]}]\n"
    assert "must share one divisor" in refused(tmp_path, split + vllm)
    whole = floats("nvfp4", ", targets: [attention]") + floats("nvfp4", ", targets: [mlp]")
    assert plan_stages(tmp_path, whole + vllm)
    remarks = plan_stages(tmp_path, split).exports[0].remarks
    run = ran(tmp_path, split)
    assert len(global_scales(run, 0, *ATTENTION)) == 2
    (artifact,) = run.outcome.report.deliverables
    assert list(artifact.load_snippets) == ["Transformers"]
    assert "must share one divisor" in artifact.refusals["vLLM"]
    assert f"vLLM would not load it: {artifact.refusals['vLLM']}" in remarks


def test_fp4_wants_a_model_in_bf16(tmp_path: Path) -> None:
    assert "bfloat16" in refused(tmp_path, floats("nvfp4"), TINY | {"dtype": "float32"})
    assert plan_stages(tmp_path, floats("fp8"), TINY | {"dtype": "float32"})


def test_experts_keep_integers(tmp_path: Path) -> None:
    assert "integer codes only" in refused(tmp_path, floats("fp8"), MIXTRAL)
