"""The plan refuses what cannot work, where the recipe says it, and prices what can."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor import cost
from compressor.console import plan_text
from compressor.cost import block_memory, checkpoint_bytes, flops_per_second, linear_bits
from compressor.errors import ModelError, PlanError
from compressor.model.architecture import (
    MOMENTS_AT_ONCE,
    SOLVED_AT_ONCE,
    Architecture,
    moments_held,
)
from compressor.order import FORBIDDEN, ORDER, forbidden, order_problems, rank
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe, load_efforts, shipped_recipes
from compressor.stages.base import StageConfig
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import WeightScheme
from tests.runs import SMOL, TINY, plan, refusals

RTN = "stages:\n  - method: quantize.rtn\n    group_size: 64\n"


# ---------------------------------------------------------------------- refused


def test_a_group_size_must_divide_every_width(tmp_path: Path) -> None:
    found = refusals(tmp_path, RTN.replace("64", "128"))
    assert [(p.line, p.column) for p in found] == [(3, 17)]
    assert "groups of 128 do not divide the 576 inputs of model.layers.0.self_attn.q_proj" in (
        found[0].message
    )
    assert "179 more of that width" in found[0].message  # q k v o gate up of 30 blocks
    assert found[0].hint.endswith("16, 24, 32, 48, 64, 96, 192, channel")
    # each of them works, and 128 works where it divides
    for size in ("96", "192", "channel"):
        assert plan(tmp_path, RTN.replace("64", size)).stages[0].matrices == 210
    assert plan(tmp_path, RTN.replace("64", "128"), SMOL, "stages.0.targets=[down]")


@pytest.mark.parametrize(
    ("override", "words", "hint"),
    [
        ("stages.0.targets=[q_projj]", "'q_projj' matches no matrix", "roles of this model"),
        ("stages.0.targets=[dwn]", "'dwn' matches no matrix", "did you mean 'down'"),
        ("stages.0.ignore=[lm_head]", "'lm_head' matches no matrix", "roles of this model"),
        ("stages.0.targets=['re:(']", "matches no matrix", "not a regular expression"),
        ("stages.0.ignore=[linear]", "nothing is left to round", ""),
        ("stages.0.targets=[all]", "outside the decoder blocks", "embeddings: quantize"),
        ("stages.0.head=quantize", "tied to the embedding", "embeddings: quantize"),
        ("stages.0.bits=2", "ruins a model", "force: true"),
    ],
)
def test_targets_that_cannot_work(tmp_path: Path, override: str, words: str, hint: str) -> None:
    found = refusals(tmp_path, RTN, SMOL, override)
    assert len(found) == 1
    assert words in found[0].message
    assert hint in found[0].hint
    assert found[0].message.startswith(f"--set {override.partition('=')[0]}: quantize.rtn.")


def test_two_bits_can_be_forced(tmp_path: Path) -> None:
    made = plan(tmp_path, RTN, SMOL, "stages.0.bits=2", "stages.0.force=true")
    assert made.stages[0].bits_nominal == 2


def test_a_matrix_is_rounded_once(tmp_path: Path) -> None:
    again = "  - method: quantize.rtn\n    group_size: 64\n    targets: [down]\n"
    found = refusals(tmp_path, RTN + again)
    assert [(p.line, p.column) for p in found] == [(6, 14)]
    assert "model.layers.0.mlp.down_proj and 29 more matrices are rounded" in found[0].message
    # apart from each other they may both run
    made = plan(tmp_path, RTN + again, SMOL, "stages.0.targets=[attention]")
    assert [stage.matrices for stage in made.stages] == [120, 30]


def test_routers_are_left_alone(tmp_path: Path) -> None:
    config = {
        **{"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"vocab_size": 256, "num_local_experts": 2, "num_experts_per_tok": 1},
        **{"max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "bfloat16"},
    }
    found = refusals(tmp_path, RTN, config, "stages.0.targets=['model.layers.*']")
    assert any("router" in problem.message for problem in found)
    assert plan(tmp_path, RTN, config).stages[0].matrices == 4 + 3 * 2


def test_problems_of_all_stages_come_together(tmp_path: Path) -> None:
    text = RTN.replace("64", "128") + "  - method: quantize.rtn\n    bits: 2\n    targets: [dwn]\n"
    found = refusals(tmp_path, text + "evaluate: {suite: quik}\n")
    assert [problem.line for problem in found] == [3, 5, 6, 7]


def test_exports_do_not_wait_for_stages(tmp_path: Path) -> None:
    """Beside a wrong group size: a format that the engine does not read, whatever the grid."""
    text = RTN.replace("64", "128") + "export:\n  - {format: gguf, engines: [vllm]}\n"
    text += "  - {format: compressed-tensors, engines: [llama.cpp]}\n"
    stage, *exports = refusals(tmp_path, text)
    assert "groups of 128 do not divide" in stage.message
    assert [(p.line, p.message.partition(";")[0]) for p in exports] == [
        (5, "vllm does not load gguf"),
        (6, "llama.cpp does not load pack-quantized"),
    ]
    named = RTN.replace("64", "128") + "engines: [llama.cpp]\n"
    assert "would load none of the deliverables" in refusals(tmp_path, named)[-1].message
    family = RTN.replace("64", "128") + "export: [{format: gguf}]\n"
    assert "not of phi3" in refusals(tmp_path, family, SMOL | {"model_type": "phi3"})[-1].message


def test_what_the_export_cannot_hold(tmp_path: Path) -> None:
    text = RTN + "export:\n  - format: compressed-tensors\n    engines: [ENGINE]\n"
    mixed = ("stages.0.embeddings=quantize", "stages.0.embedding_bits=8")
    asymmetric = "stages.0.symmetry=asymmetric"
    found = refusals(tmp_path, text.replace("ENGINE", "transformers"), SMOL, *mixed, asymmetric)
    assert "one scheme" in found[0].message
    assert (found[0].line, found[0].column) == (5, 13)
    found = refusals(tmp_path, text.replace("ENGINE", "vllm"), SMOL, "stages.0.targets=[q]")
    assert "one fused layer" in found[0].message
    assert (found[0].line, found[0].column) == (6, 14)
    found = refusals(tmp_path, text.replace("ENGINE", "vllm-cpu"), SMOL, "stages.0.bits=3")
    assert "3-bit codes" in found[0].message
    assert plan(tmp_path, text.replace("ENGINE", "transformers"), SMOL, "stages.0.bits=3")


def test_a_tied_embedding_goes_out_at_the_bits_of_the_rest(tmp_path: Path) -> None:
    same = ("stages.0.embeddings=quantize", "stages.0.embedding_bits=4")
    made = plan(tmp_path, RTN, SMOL, *same)
    assert made.stages[0].matrices == 211
    assert made.stages[0].bits_checkpoint == pytest.approx(4.25, abs=0.02)


def test_a_compressed_model_is_no_base(tmp_path: Path) -> None:
    config = SMOL | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ModelError, match="quantized already"):
        plan(tmp_path, RTN, config)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="family"):
        plan(tmp_path, RTN, SMOL | {"model_type": "mamba"})


def test_missing_evaluation_text(tmp_path: Path) -> None:
    found = refusals(tmp_path, RTN + "evaluate:\n  text: {mine: mine.txt}\n")
    assert (found[0].line, found[0].column) == (5, 16)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("mix: defualt", "there is no calibration mix 'defualt'"),
        ("source: mine.txt", "mine.txt does not exist"),
    ],
)
def test_missing_calibration_text(tmp_path: Path, section: str, words: str) -> None:
    (found,) = refusals(tmp_path, RTN + f"calibration:\n  {section}\n")
    assert words in found.message
    assert found.line == 5


# ---------------------------------------------------------------------- order

METHODS = (
    "prune.obs",
    "recover.distill",
    "transform.rotate",
    "transform.awq",
    "allocate.budget",
    "quantize.gptq",
    "quantize.kv",
    "draft.eagle3",
)


class Foreign(StageConfig):
    """A stage of somebody else's package that changes nothing."""

    def run(self, *_: Any) -> Any:
        raise AssertionError("a plan runs nothing")


@pytest.mark.parametrize("then", ["prune.obs", "recover.distill", "transform.rotate"])
def test_the_plan_refuses_a_weight_edit_after_rounding(then: str) -> None:
    rounder = QuantizeRtn(method="quantize.rtn", group_size=64)
    recipe = Recipe(stages=(rounder, Foreign(method=then)))
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, SMOL, "the-model")
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"stages.1.method: {then} cannot follow quantize.rtn")
    assert problem.hint == f"order that works: {then} → quantize.rtn"
    assert make_plan(Recipe(stages=(Foreign(method=then), rounder)), SMOL, "the-model")


def test_the_order_that_works_has_no_problem() -> None:
    assert list(map(rank, METHODS)) == list(range(len(ORDER)))
    assert not list(order_problems(METHODS))


@pytest.mark.parametrize(("first", "then"), list(itertools.combinations(METHODS, 2)))
def test_every_inversion_is_forbidden_with_a_reason(first: str, then: str) -> None:
    assert forbidden(first, then) is None
    found = list(order_problems([then, first]))
    assert [problem.index for problem in found] == [1]
    assert found[0].message.startswith(f"{first} cannot follow {then} (stage 0): ")
    assert len(found[0].message.partition(": ")[2].split()) >= 6
    assert found[0].hint == f"order that works: {first} → {then}"


@pytest.mark.parametrize("rule", FORBIDDEN, ids=lambda rule: f"{rule.first}-{rule.then}")
def test_every_rule_fires_on_some_pair(rule: Any) -> None:
    names = (*METHODS, "transform.smoothquant", "prune.depth", "draft.standalone")
    assert any(forbidden(a, b) is rule for a, b in itertools.product(names, repeat=2))


def test_two_scalings_exclude_each_other_in_any_order() -> None:
    for pair in itertools.permutations(("transform.awq", "transform.smoothquant")):
        (found,) = order_problems(pair)
        assert found.hint.startswith("keep one of the two")


def test_drafts_do_not_disturb_each_other() -> None:
    assert not list(order_problems(["quantize.gptq", "draft.eagle3", "draft.standalone"]))


# ---------------------------------------------------------------------- prices


def test_sizes_by_hand(tmp_path: Path) -> None:
    made = plan(tmp_path, RTN)
    blocks, embedding, norms = 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536), 49152 * 576, 61
    assert made.parameters == blocks + embedding + norms * 576
    assert made.base_bytes == 2 * made.parameters
    (stage,) = made.stages
    assert (stage.bits_nominal, stage.bits_linear) == (4, 4 + 16 / 64)
    packed = blocks * 4.25 / 8 + 2 * (embedding + norms * 576) + 210 * 16
    assert stage.packed_bytes == packed
    assert stage.bits_checkpoint == pytest.approx(8 * packed / made.parameters)
    assert made.exports[0].ratio == pytest.approx(made.base_bytes / packed)


def test_asymmetric_codes_cost_their_zero_points(tmp_path: Path) -> None:
    plain = plan(tmp_path, RTN).stages[0].bits_linear
    asymmetric = plan(tmp_path, RTN, SMOL, "stages.0.symmetry=asymmetric").stages[0].bits_linear
    assert asymmetric - plain == pytest.approx(4 / 64, rel=0.01)


def test_untying_is_priced_and_remarked(tmp_path: Path) -> None:
    text = "stages:\n  - {method: transform.rotate}\n  - {method: quantize.rtn, group_size: 64}\n"
    made = plan(tmp_path, text)
    rotate, rounded = made.stages
    assert rotate.packed_bytes - made.base_bytes == 49152 * 576 * 2
    assert rotate.by_role["head"] == rounded.by_role["head"] == 49152 * 576 * 2
    assert rotate.matrices == 30 * 7 + 2
    assert rounded.parameters == made.parameters + 49152 * 576
    (remark,) = rotate.remarks
    assert "56.62 MB" in remark
    assert f"transform.rotate: {remark}" in plan_text(made).splitlines()
    free = plan(tmp_path, text, SMOL, "stages.0.where=heads").stages[0]
    assert (free.packed_bytes, free.remarks, free.matrices) == (made.base_bytes, (), 60)


def test_dense_exports_do_not_shrink(tmp_path: Path) -> None:
    made = plan(tmp_path, RTN + "export:\n  - format: dense\n")
    assert made.exports[0].tensor_bytes == made.base_bytes
    assert made.exports[0].ratio == 1
    assert "export dense: 269 MB, no smaller" in plan_text(made)
    larger = made.exports[0].model_copy(update={"ratio": 0.5})
    assert "MB, 2.00x larger" in plan_text(made.model_copy(update={"exports": (larger,)}))


def test_the_formula_meets_an_architecture_without_stages() -> None:
    base = Architecture.from_config(SMOL)
    assert checkpoint_bytes(base) == base.bytes
    assert linear_bits(base) == (16, 16)
    names = [matrix.name for matrix in base.matrices if matrix.block is not None]
    assert linear_bits(base.with_scheme(names, WeightScheme(8, None)))[0] == 8


def test_more_text_and_depth_cost_more(tmp_path: Path) -> None:
    text = "calibration: {samples: 8}\nstages:\n  - {method: quantize.gptq, group_size: 64}\n"
    small = plan(tmp_path, text).stages[0]
    more = plan(tmp_path, text, SMOL, "calibration.samples=80").stages[0]
    coarse = plan(tmp_path, text, SMOL, "stages.0.sequential=block").stages[0]
    deeper = plan(tmp_path, text, SMOL | {"num_hidden_layers": 60}).stages[0]
    assert more.flops > 3 * small.flops
    assert coarse.flops > 1.1 * small.flops  # two passes where the other has one
    assert small.peak_bytes > coarse.peak_bytes
    assert deeper.flops == pytest.approx(2 * small.flops)
    assert deeper.peak_bytes == small.peak_bytes  # one block, whatever the depth
    assert more.peak_bytes > small.peak_bytes


def test_memory_by_hand() -> None:
    base = Architecture.from_config(SMOL)
    block = 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536
    assert block_memory(base, 0) == block * (2 + 4 + 4)
    # inputs of q k v, of o, of gate and up, of down; the last is factored in fp64, three times
    hessians = 4 * (3 * 576**2 + 1536**2) + 3 * 8 * 1536**2
    assert block_memory(base, 1000) == block * 10 + hessians + 2 * 4 * 1000 * 576
    # The parent beside it: its block in fp32, its hidden states, a second moment per input.
    more = 4 * block + 4 * (3 * 576**2 + 1536**2) + 2 * 4 * 1000 * 576
    assert block_memory(base, 1000, reference=True) == block_memory(base, 1000) + more
    # A forward in front of down_proj: two residual streams, gate and up, and what they came from.
    still = 1000 * 4 * (2 * 576 + 576 + 2 * 1536)
    # Inputs are measured one after the other then: one Hessian at a time, of down_proj at most.
    alone = block_memory(base, 1000) - 4 * 3 * 576**2
    assert block_memory(base, 1000, standing=True) == alone + still
    half = block_memory(base, 1000, standing=True, activation_bytes=2)
    assert half == alone - 2 * block - 2 * 2 * 1000 * 576 + still // 2


def test_moments_of_experts_are_bounded_and_not_paired() -> None:
    mixtral = {"model_type": "mixtral", "num_local_experts": 8}
    base = Architecture.from_config(SMOL | mixtral)
    outer, inner, experts = 576**2, 1536**2, 8
    routed = experts * (outer + inner)
    together = moments_held(base, 0, streams=2, sublayers=False)
    assert together == 2 * 3 * outer + routed  # of q k v, o and the router; experts
    assert moments_held(base, 0, streams=2, sublayers=True) == routed
    # Twenty copies do not fit into 1 GiB: as many experts go together as do.
    assert moments_held(base, 0, streams=2, sublayers=True, parts=20) == MOMENTS_AT_ONCE // 80


def test_memory_of_experts_that_are_solved_together_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = Architecture.from_config(SMOL | {"model_type": "mixtral", "num_local_experts": 8})
    together = block_memory(base, 1000)
    monkeypatch.setattr(cost, "SOLVED_AT_ONCE", 1)  # then the largest is factored by itself
    assert (
        together - block_memory(base, 1000)
        == min(8 * 28 * (576**2 + 1536**2 + 3 * 576 * 1536), SOLVED_AT_ONCE) - 24 * 1536**2
    )


def test_propagating_costs_the_parents_passes_and_memory(tmp_path: Path) -> None:
    text = "calibration: {samples: 8}\nstages:\n  - {method: quantize.gptq, group_size: 64}\n"
    for sequential in ("block", "sublayer"):
        common = (f"stages.0.sequential={sequential}",)
        without, with_ = (
            plan(tmp_path, text, SMOL, *common, f"stages.0.propagate={share}") for share in (0, 0.5)
        )
        weights = 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
        forward = 2 * weights * 8 * 512
        extra = with_.stages[0].flops - without.stages[0].flops
        assert forward < extra < 2.5 * forward
        assert with_.stages[0].peak_bytes > without.stages[0].peak_bytes
        assert with_.disk_bytes - without.disk_bytes == 2 * 8 * 512 * 576 * 4


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("config", [TINY, SMOL], ids=["tiny", "smol"])
def test_shipped_recipes_fit_small_models(name: str, config: dict[str, Any]) -> None:
    recipes = load_efforts(name)
    for effort, recipe in recipes.items():
        made = make_plan(recipe, config, "small").beside(recipes, config)
        assert made.effort == effort
        if name == "kv8":  # changes no weight
            assert 0.999 < made.exports[0].ratio < 1
            assert "bytes of cache instead of" in made.stages[0].remarks[0]
        else:
            assert made.exports[0].ratio > 1.2
        assert made.context_length == config["max_position_embeddings"]
        assert made.evaluation_tokens > 10_000
        times = list(made.efforts.values())
        assert list(made.efforts) == (list(recipes) if len(recipes) > 1 else [])
        assert times == sorted(times)  # light, default, best
        assert all(time > 0 for time in times)


def test_a_plan_is_frozen_and_serialises(tmp_path: Path) -> None:
    made = plan(tmp_path, RTN)
    assert Plan.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ValueError, match="frozen"):
        made.seconds = 0


def test_the_rate_is_measured_with_torch_and_nominal_without() -> None:
    code = """
import sys
from compressor.cost import flops_per_second
rate, how = flops_per_second()
assert how.startswith("nominal") and 1e9 < rate < 1e15
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    import torch  # noqa: F401

    rate, how = flops_per_second()
    assert how.startswith("measured")
    assert rate > 1e8
