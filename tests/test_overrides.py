"""Grids by pattern: which wins, what is refused, and that a model of several grids survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.engine import run_recipe
from compressor.errors import PlanError, RecipeError
from compressor.explain import explain
from compressor.formats.headers import read_json
from compressor.formats.sizes import measure
from compressor.model.architecture import Architecture
from compressor.model.load import load_model
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe
from compressor.stages.overrides import Override
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import WeightScheme
from tests import runs
from tests.runs import TINY

RECIPE = """\
calibration: {samples: 4, length: 64, batch_size: 2}
stages:
  - method: METHOD
    bits: 4
    group_size: 64
    overrides:
      - {pattern: down, bits: 6}
      - {pattern: model.layers.0.*, bits: 8, group_size: channel}
      - {pattern: "re:model.layers.0.mlp", group_size: 32, symmetry: full_range}
evaluate: {documents: 2, length: 128, resamples: 200}
"""


def load(folder: Path, *overrides: str, method: str = "quantize.rtn") -> Recipe:
    return runs.load(folder, RECIPE.replace("METHOD", method), *overrides)


def plan(folder: Path, *overrides: str) -> Plan:
    return make_plan(load(folder, *overrides), TINY, "builtin:tiny")


def test_the_last_override_that_matches_wins_key_by_key(tmp_path: Path) -> None:
    stage = load(tmp_path).stages[0]
    schemes = stage.schemes(Architecture.from_config(TINY))
    layer = "model.layers.{}.{}".format
    assert schemes[layer(1, "mlp.up_proj")] == WeightScheme(4, 64)
    assert schemes[layer(1, "mlp.down_proj")] == WeightScheme(6, 64)
    assert schemes[layer(0, "self_attn.q_proj")] == WeightScheme(8, None)
    assert schemes[layer(0, "mlp.up_proj")] == WeightScheme(8, 32, "full_range")
    assert len(schemes) == 28
    assert stage.label == "RTN W4 g64 with overrides"
    remark = plan(tmp_path).stages[0].remarks[0]
    assert "W4 g64 on 18, " in remark
    assert "W8 g32 full range on 3" in remark


def test_overrides_reach_the_embedding_when_it_is_rounded() -> None:
    stage = QuantizeRtn(embeddings="quantize", overrides=(Override(pattern="embed", bits=5),))
    schemes = stage.schemes(Architecture.from_config(TINY))
    assert schemes["model.embed_tokens"].bits == 5
    assert {scheme.bits for scheme in schemes.values()} == {4, 5}


@pytest.mark.parametrize(
    ("value", "words", "hint"),
    [
        ("[{pattern: dwn, bits: 3}]", "'dwn' matches no matrix", "did you mean 'down'"),
        ("[{pattern: embed, bits: 8}]", "only matrices that the stage leaves alone", "targets"),
        ("[{pattern: down, group_size: 48}]", "groups of 48 do not divide the 832", "16, 32, 64"),
        ("[{pattern: down, bits: 2}]", "2-bit round-to-nearest", "force"),
        (
            "[{pattern: q, bits: 3}, {pattern: k, group_size: 32}, {pattern: attention, bits: 5}]",
            "later overrides replace all that the one of 'q' sets",
            "the last one wins",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(
    tmp_path: Path, value: str, words: str, hint: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(tmp_path, f"stages.0.overrides={value}")
    (problem,) = caught.value.problems
    assert words in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[{pattern: down}]", "needs `bits`, `group_size` or `symmetry`"),
        ("[{pattern: down, bitz: 3}]", "did you mean 'bits'"),
        ("[{bits: 3}]", "needs the key 'pattern'"),
        ("[{pattern: down, bits: 9}]", "at most 8"),
    ],
)
def test_what_is_no_override_is_refused_by_the_recipe(
    tmp_path: Path, value: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"stages.0.overrides={value}")
    assert words in caught.value.problems[0].message


@pytest.mark.parametrize(("pattern", "works"), [("q", False), ("attention", True), ("up", False)])
def test_engines_that_fuse_layers_want_one_grid_for_them(
    tmp_path: Path, pattern: str, works: bool
) -> None:
    change = (
        f"stages.0.overrides=[{{pattern: {pattern}, bits: 8}}]",
        "export=[{format: compressed-tensors, engines: [vllm]}]",
    )
    if works:
        plan(tmp_path, *change)
        return
    with pytest.raises(PlanError) as caught:
        plan(tmp_path, *change)
    assert "are one fused layer and must share one scheme" in caught.value.problems[0].message


ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("q", f"{ATTENTION}.q_proj, {ATTENTION}.k_proj, {ATTENTION}.v_proj"),
        ("up", f"{MLP}.gate_proj, {MLP}.up_proj"),
    ],
)
def test_a_fused_layer_of_several_grids_is_remarked_where_no_engine_is_named(
    tmp_path: Path, pattern: str, layer: str
) -> None:
    made = plan(tmp_path, f"stages.0.overrides=[{{pattern: {pattern}, bits: 8}}]")
    (remark,) = made.exports[0].remarks
    assert remark.startswith(f"vLLM and SGLang would not load it: {layer} are one fused layer")
    assert "round all of them alike, or none" in remark


@pytest.mark.parametrize(
    "overrides", ["[]", "[{pattern: q, bits: 4}]", "[{pattern: mlp, bits: 8}]"]
)
def test_fused_layers_of_one_grid_are_not_remarked(tmp_path: Path, overrides: str) -> None:
    assert plan(tmp_path, f"stages.0.overrides={overrides}").exports[0].remarks == ()


def test_the_report_names_the_engines_that_load_what_came_out(tmp_path: Path) -> None:
    recipe = load(tmp_path, "stages.0.overrides=[{pattern: q, bits: 8}]")
    report = run_recipe(recipe, "builtin:tiny", tmp_path / "run").report
    (artifact,) = report.deliverables
    assert list(artifact.load_snippets) == ["Transformers"]
    (why,) = artifact.refusals.values()
    said = f"vLLM and SGLang would not load {artifact.path}: {why}."
    assert said in [warning.text for warning in report.warnings]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| Transformers |" in card
    assert "vllm serve" not in card


def test_explain_knows_the_keys_of_an_override() -> None:
    (whole,) = explain("quantize.gptq.overrides").options
    for key in Override.model_fields:
        assert f"`{key}`" in whole.what
    (bits,) = explain("quantize.gptq.overrides.bits").options
    assert "at least 2" in bits.accepts


@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.gptq"])
def test_a_model_of_several_grids_comes_back_from_disk_as_it_was(
    tmp_path: Path, method: str
) -> None:
    recipe = load(tmp_path, method=method)
    outcome = run_recipe(recipe, "builtin:tiny", tmp_path / "run")
    out = outcome.folder / "deliverable" / "compressed-tensors"
    groups = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    found = {(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups}
    assert found == {(4, 64), (6, 64), (8, None), (8, 32)}
    made = make_plan(recipe, TINY, "builtin:tiny")
    size = measure(out, made.parameters)
    assert size.tensor_bytes == made.stages[0].packed_bytes
    assert size.by_role == made.stages[0].by_role
    assert size.bits_linear == pytest.approx(made.stages[0].bits_linear)
    assert size.bits_nominal == pytest.approx(made.stages[0].bits_nominal)
    ids = torch.arange(48)[None] % 4096
    dense = outcome.folder / "stages" / f"01-{method}"
    with torch.inference_mode():
        logits = [load_model(folder)(ids).logits for folder in (dense, out)]
    assert torch.equal(logits[0], logits[1])
