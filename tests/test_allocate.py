"""Bits under a budget: priced, refused, never exceeded, resumed, and better than uniform."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import resources
from compressor.cli import main
from compressor.cost import checkpoint_bytes, linear_bits
from compressor.engine import run_recipe
from compressor.errors import ModelError, PlanError, RecipeError
from compressor.formats.allocation import ALLOCATION, read_allocation, write_allocation
from compressor.formats.headers import read_json
from compressor.formats.sizes import measure
from compressor.model.architecture import Architecture
from compressor.model.load import load_model
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe, budget_overrides
from compressor.stages.allocate_bits import AllocateBits, allotment
from compressor.stages.allocating import allocate
from compressor.stages.budget import parse_size, proxy
from compressor.stages.context import StageContext
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import BlockRecord, TokenBatch, WeightScheme
from compressor.verify import verify_tensors
from tests import runs
from tests.helpers import stage_context
from tests.model.conftest import build
from tests.runs import TINY

MODEL = Architecture.from_config(TINY)
RECIPE = """\
calibration: {samples: 4, length: 64, batch_size: 2}
stages:
  - {method: allocate.bits, target_bpw: 3.5, counting: linear, group_sizes: [32, 64], rows: 8}
  - {method: quantize.rtn, force: true}
evaluate: {documents: 2, length: 128, resamples: 200}
"""


def load(folder: Path, *overrides: str, text: str = RECIPE) -> Recipe:
    return runs.load(folder, text, *overrides)


def plan(folder: Path, *overrides: str, text: str = RECIPE) -> Plan:
    return runs.plan(folder, text, TINY, *overrides)


def refusals(folder: Path, *overrides: str, text: str = RECIPE) -> list[Any]:
    return runs.refusals(folder, text, TINY, *overrides)


# ---------------------------------------------------------------------- the budget


@settings(max_examples=25, deadline=None)
@given(
    bpw=st.floats(2.6, 9.0),
    counting=st.sampled_from(["linear", "checkpoint"]),
    bits=st.sets(st.integers(2, 8), min_size=1),
    tie=st.sampled_from(["tie", "free"]),
    symmetry=st.sampled_from(["symmetric", "asymmetric"]),
)
def test_no_choice_of_the_plan_exceeds_the_budget(
    bpw: float, counting: Any, bits: set[int], tie: Any, symmetry: Any
) -> None:
    stage = AllocateBits(
        target_bpw=bpw, counting=counting, bits=tuple(bits), fused=tie, symmetry=symmetry
    )
    found = stage.units(MODEL)
    refused: list[str] = []
    planned = stage.plan(MODEL, lambda option, message, _: refused.append(message))
    if stage.budget(MODEL, found) < sum(min(unit.costs) for unit in found):
        assert "over the budget" in refused[0]
        return
    assert not refused
    rounded = planned
    for matrix in planned.matrices:
        rounded = rounded.with_scheme([matrix.name], matrix.allotted)
    if counting == "linear":
        assert linear_bits(rounded)[1] <= bpw
    else:
        assert 8 * checkpoint_bytes(rounded) / MODEL.parameters <= bpw


def test_fused_matrices_are_one_unit() -> None:
    tied = AllocateBits(target_bpw=4).units(MODEL)
    free = AllocateBits(target_bpw=4, fused="free").units(MODEL)
    assert [len(unit.matrices) for unit in tied[:4]] == [3, 1, 2, 1]
    assert (len(tied), len(free)) == (16, 28)
    assert tied[0].costs[0] == sum(unit.costs[0] for unit in free[:3])
    down = tied[3]
    assert {scheme.group_size for scheme in down.schemes} == {32, 64}  # 128 does not divide 832


def test_the_example_of_the_plan_fills_the_budget() -> None:
    found = AllocateBits(target_bpw=4).units(MODEL)
    least, most = (sum(pick(unit.costs) for unit in found) for pick in (min, max))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        budget = int(least + share * (most - least))
        chosen = proxy(found, budget)
        spent = sum(unit.costs[place] for unit, place in zip(found, chosen, strict=True))
        assert budget - 80_000 < spent <= budget
    assert set(allotment(found, chosen).values()) == {WeightScheme(8, 32)}


@pytest.mark.parametrize(
    ("text", "size"), [("60MB", 60_000_000), ("1.5 GiB", 3 << 29), ("512KiB", 1 << 19), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_is_the_budget_of_all_tensors() -> None:
    stage = AllocateBits(target_size="5MB")
    assert stage.budget(MODEL, stage.units(MODEL)) == 5_000_000 - 4096 * 320 * 2 - 9 * 320 * 2


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("stages.0.target_bpw=null", "needs one budget"),
        ("stages.0.target_size=5MB", "needs one budget"),
        ("stages.0.bits=[4, 4]", "named twice"),
        ("stages.0.bits=[1]", "at least 2"),
    ],
)
def test_what_is_no_allocation_is_refused_by_the_recipe(
    tmp_path: Path, value: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, value)
    assert words in caught.value.problems[0].message


def test_a_size_is_written_with_a_unit(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="write it like 60MB"):
        load(tmp_path, "stages.0.target_bpw=null", "stages.0.target_size='60'")


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        (["stages.0.counting=checkpoint"], "over the budget: it takes 3.8 MB", "counting: linear"),
        (["stages.0.targets=[dwn]"], "'dwn' matches no matrix", "'down'"),
        (["stages.0.targets=[all]"], "no linear layer of a decoder block", "linear"),
        (["stages.0.group_sizes=[48]"], "no group size of the choices divides the 320", "channel"),
        (["stages.1.targets=[mlp]"], "chose a grid for model.layers.0.self_attn.q_proj", "ignore"),
        (["stages.1.bits=3"], "chooses the grid of every matrix", "remove `bits`"),
        (["stages.1.symmetry=asymmetric"], "chooses the grid of every", "remove `symmetry`"),
        (["export=[{format: dense}]", "stages=[STAGE]"], "no stage after it rounds", "quantize"),
        (
            ["export=[{format: compressed-tensors, engines: [vllm-cpu]}]"],
            "-bit codes; it loads 4",
            "vllm-cpu",
        ),
        (
            ["stages.0.fused=free", "export=[{format: compressed-tensors, engines: [vllm]}]"],
            "one fused layer",
            "vllm",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(
    tmp_path: Path, change: list[str], words: str, hint: str
) -> None:
    alone = RECIPE.splitlines()[2].strip(" -")
    found = refusals(tmp_path, *(text.replace("STAGE", alone) for text in change))
    assert words in found[0].message
    assert hint in found[0].hint


def test_an_engine_is_asked_about_every_grid_that_may_be_chosen(tmp_path: Path) -> None:
    """The example in the plan happens to be 8 bits throughout; 3 would be chosen on the run."""
    change = ["stages.0.target_bpw=8.5", "stages.0.bits=[3, 8]", "stages.0.group_sizes=[64]"]
    engine = "export=[{format: compressed-tensors, engines: [sglang]}]"
    (problem,) = refusals(tmp_path, *change, engine)
    assert "3-bit codes" in problem.message
    plan(tmp_path, *change, engine, "stages.0.bits=[4, 8]")


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 4096,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_local_experts": 3, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "fused", "units", "largest"),
    [
        ("model", "tie", 5, 18),
        ("block", "tie", 6, 9),
        ("free", "tie", 16, 3),
        ("free", "free", 26, 1),
    ],
)
def test_experts_are_tied_as_engines_need_them(
    experts: Any, fused: Any, units: int, largest: int
) -> None:
    stage = AllocateBits(target_bpw=9, experts=experts, fused=fused)
    found = stage.units(Architecture.from_config(MIXTRAL))
    assert (len(found), max(len(unit.matrices) for unit in found)) == (units, largest)
    for unit in found:
        assert len({m.expert is None for m in unit.matrices}) == 1


def test_grids_of_experts_that_transformers_does_not_load_are_refused(tmp_path: Path) -> None:
    def refused(*changes: str) -> list[str]:
        recipe = load(tmp_path, *changes, "export=[{format: compressed-tensors}]")
        try:
            make_plan(recipe, MIXTRAL, "mixtral")
        except PlanError as error:
            return [problem.message for problem in error.problems]
        return []

    assert not refused()
    assert "experts must share one scheme" in refused("stages.0.experts=free")[0]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, {"embeddings": "allocate", "counting": "linear"}, "would stay dense"),
        ({}, {"head": "allocate"}, "tied to the embedding"),
        ({}, {"embeddings": "allocate", "symmetry": "asymmetric"}, "8 symmetric bits by channel"),
        ({"model_type": "gemma2"}, {"embeddings": "allocate"}, "scales what it looks up"),
        ({}, {"targets": ("all",)}, "no linear layer of a decoder block"),
    ],
)
def test_tables_that_cannot_have_a_grid_are_refused(
    config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    refused: list[str] = []
    stage = AllocateBits(**{"target_bpw": 9, **options})
    stage.plan(
        Architecture.from_config(TINY | config), lambda _, message, __: refused.append(message)
    )
    assert words in refused[0]
    allowed = AllocateBits(target_bpw=9, embeddings="allocate", head="allocate")
    allowed.plan(MODEL, lambda *_: pytest.fail("refused"))


def test_tables_are_offered_what_the_container_holds() -> None:
    untied = MODEL.with_config(tie_word_embeddings=False)
    packed = AllocateBits(target_bpw=9, embeddings="allocate", head="allocate")
    embed, head = packed.units(untied)[-2:]
    assert embed.schemes == (None, WeightScheme(8, None))
    assert embed.costs == (4096 * 320 * 2, 4096 * 320 + 4096 * 2)
    assert head.schemes[0] is None
    assert {s.bits for s in head.grids} == {2, 3, 4, 5, 6, 8}
    (tied,) = packed.units(MODEL)[-1:]
    assert tied.costs[1] == 4096 * 320 + 2 * 4096 * 2  # scales once more, for the head
    blocks = AllocateBits(target_bpw=9, embeddings="allocate", container="gguf")
    table = blocks.units(MODEL)[-1]
    assert table.costs[1 + table.grids.index(WeightScheme(4, 64))] == 4096 * 320 // 32 * 18
    assert table.costs[1 + table.grids.index(WeightScheme(6, 32))] == 4096 * 320 // 32 * 34
    odd = AllocateBits(target_bpw=9, container="gguf", symmetry="asymmetric", group_sizes=(16, 32))
    assert {(s.bits, s.group_size) for s in odd.units(MODEL)[0].grids} == {
        (bits, 32) for bits in (2, 3, 4, 5)
    }


# ---------------------------------------------------------------------- the command line


def test_a_budget_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tmp_path)
    path = str(tmp_path / "recipe.yaml")

    def planned(*options: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as left:
            main(["plan", path, "builtin:tiny", "--format", "json", *options])
        return int(str(left.value.code or 0)), json.loads(capsys.readouterr().out)

    sizes = []
    for options in ((), ("--target-bpw", "4.5"), ("--target-size", "4.2MB")):
        code, made = planned(*options)
        assert code == 0
        sizes.append(made["stages"][1]["packed_bytes"])
    assert sizes[1] > sizes[0]
    assert 4_100_000 < sizes[2] <= 4_200_000
    code, error = planned("--target-size", "4.2MB", "--target-bpw", "3")
    assert code == 2
    assert "two budgets" in json.dumps(error)
    with pytest.raises(RecipeError, match=r"has no allocate\.bits stage"):
        budget_overrides("w4-gptq", target_bpw=3.0, target_size=None)


# ---------------------------------------------------------------------- the file


def test_the_file_gives_the_grids_back(tmp_path: Path) -> None:
    schemes = {"a": WeightScheme(3, 32), "b": WeightScheme(8, None, "asymmetric")}
    write_allocation(tmp_path, schemes, {"a": 0.25, "b": 1e-9})
    assert read_allocation(tmp_path) == schemes
    assert read_allocation(tmp_path / "elsewhere") == {}
    (tmp_path / ALLOCATION).write_text('{"a": {"bits": 3, "width": 4}}')
    with pytest.raises(ModelError, match="damaged"):
        read_allocation(tmp_path)


# ---------------------------------------------------------------------- the run


def test_a_run_keeps_its_budget_and_comes_back_from_disk(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A run is checked on a few words of text. " * 20)
    text = RECIPE.replace("documents: 2", "text: {own: text.txt}")
    outcome = run_recipe(load(tmp_path, text=text), "builtin:tiny", tmp_path / "run")
    chosen = read_allocation(outcome.folder / "stages" / "01-allocate.bits")
    assert len(set(chosen.values())) > 2
    for layer in range(4):
        for roles in (("q", "k", "v"), ("gate", "up")):
            of = {chosen[m.name] for m in MODEL.block(layer) if m.role in roles}
            assert len(of) == 1
    out = outcome.folder / "deliverable" / "compressed-tensors"
    size = measure(out, MODEL.parameters)
    assert 3.4 < size.bits_linear <= 3.5
    notes = outcome.report.variants[1].stage.notes  # type: ignore[union-attr]
    assert size.tensor_bytes == notes["allocated_bytes"] <= notes["budget_bytes"]
    groups = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    packed = {
        name: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in groups
        for name in group["targets"]
    }
    assert packed == {name: (s.bits, s.group_size) for name, s in chosen.items()}
    assert outcome.report.variants[2].label == "RTN, allocate 3.5 bits per linear weight"
    assert outcome.report.variants[2].artifact.max_logit_difference == 0  # type: ignore[union-attr]


def own_context(folder: Path, block_done: Callable[[BlockRecord], None]) -> StageContext:
    return stage_context(folder / "out", block_done=block_done)


QUICK = """\
calibration: {samples: 4, length: 64, batch_size: 2}
stages:
  - {method: allocate.bits, target_size: 3.7MB, group_sizes: [64], bits: [3, 4, 8], rows: 16,
     embeddings: allocate}
  - {method: quantize.rtn, force: true}
evaluate: {text: {own: text.txt}, documents: 2, length: 128, resamples: 200, noise_floor: false}
"""


@pytest.mark.parametrize("container", ["compressed-tensors", "gguf"])
def test_a_size_with_the_embedding_is_exact_on_disk(tmp_path: Path, container: str) -> None:
    """A dense embedding would take 2.6 of 3.7 MB, and linear layers could not even have 3 bits."""
    (tmp_path / "text.txt").write_text("A run is checked on a few words of text. " * 20)
    changes = [f"export=[{{format: {container}}}]", f"stages.0.container={container}"]
    outcome = run_recipe(load(tmp_path, *changes, text=QUICK), "builtin:tiny", tmp_path / "run")
    notes = outcome.report.variants[1].stage.notes  # type: ignore[union-attr]
    size = measure(outcome.folder / "deliverable" / container, MODEL.parameters)
    assert size.tensor_bytes == notes["allocated_bytes"] <= notes["budget_bytes"] == 3_700_000
    assert size.tensor_bytes > 3_400_000
    grid = read_allocation(outcome.folder / "stages" / "01-allocate.bits")["model.embed_tokens"]
    assert grid == WeightScheme(8, None) or container == "gguf"
    planned = make_plan(load(tmp_path, *changes, text=QUICK), TINY, "builtin:tiny")
    assert planned.exports[0].tensor_bytes <= 3_700_000
    artifact = outcome.report.variants[2].artifact
    assert artifact is not None
    assert artifact.max_logit_difference in (0, None)


def test_a_head_of_its_own_gets_a_grid(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A run is checked on a few words of text. " * 20)
    text = QUICK.replace("stages:\n", "stages:\n  - {method: transform.rotate}\n")
    changes = ["stages.1.head=allocate", "stages.1.target_size=4.5MB"]
    recipe = load(tmp_path, *changes, "export=[{format: compressed-tensors}]", text=text)
    outcome = run_recipe(recipe, "builtin:tiny", tmp_path / "run")
    chosen = read_allocation(outcome.folder / "stages" / "02-allocate.bits")
    assert {"lm_head", "model.embed_tokens"} < chosen.keys()
    notes = outcome.report.variants[2].stage.notes  # type: ignore[union-attr]
    size = measure(outcome.folder / "deliverable" / "compressed-tensors", MODEL.parameters)
    assert size.tensor_bytes == notes["allocated_bytes"] <= 4_500_000
    assert outcome.report.variants[3].artifact.max_logit_difference == 0  # type: ignore[union-attr]


def test_losses_beat_first_and_last_blocks_high_at_no_more_bytes(tmp_path: Path) -> None:
    """The divergence on held-out text is at least a fifth lower, and lower than for one grid."""
    text = """\
calibration: {samples: 8, length: 256, batch_size: 4}
stages:
  - {method: allocate.bits, target_bpw: BUDGET, counting: linear, group_sizes: [32, 64], rows: 32,
     tokens: 2048, rounder: rtn}
  - {method: quantize.rtn, grid: mse}
evaluate: {suite: quick, documents: 4, resamples: 200, noise_floor: false, every_stage: false}
"""
    ends = [f'{{pattern: "model.layers.{index}.*", bits: 4}}' for index in (0, 3)]
    grid = f"grid: mse, bits: 3, group_size: 64, overrides: [{', '.join(ends)}]"
    fixed = f"  - {{method: quantize.rtn, {grid}}}\n"
    start, end = text.index("  - {method: allocate"), text.index("evaluate")
    outer = text[:start] + fixed + text[end:]
    found = {}
    for name, recipe in (("ends", outer), ("allocated", text.replace("BUDGET", "3.75"))):
        loaded = load(tmp_path, "export=[{format: compressed-tensors}]", text=recipe)
        outcome = run_recipe(loaded, "builtin:tiny", tmp_path / name)
        last = outcome.report.variants[-1]
        measured = outcome.report.evaluations[last.id].overall.divergence
        found[name] = last.size.tensor_bytes, measured.mean.value
    assert found["allocated"][0] <= found["ends"][0]
    assert found["allocated"][1] < 0.8 * found["ends"][1]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe-mixed"])
def test_losses_of_experts_are_near_the_measured_divergence(variant: str, tmp_path: Path) -> None:
    """Experts of the last block: errors before it make routers send tokens elsewhere."""
    model = build(variant)
    model.save_pretrained(tmp_path / "base")
    ids = torch.randint(3, 90, (16, 32), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("own",) * 16)
    stage = AllocateBits(
        target_bpw=30,
        targets=("*.layers.1.*.experts.*",),
        bits=(6,),
        group_sizes=(16,),
        rounder="rtn",
        rows=64,
    )
    context = own_context(tmp_path, lambda record: None)
    result = allocate(stage, tmp_path / "base", (batch,), context)
    rounded = QuantizeRtn(targets=("*.layers.1.*.experts.*",), grid="mse")
    child = rounded.run(result.checkpoint, None, own_context(tmp_path / "rtn", lambda _: None))
    after = load_model(child.checkpoint)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, after))
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    assert result.notes["expected_kl"] == pytest.approx(measured, rel=0.1)
    content = read_json(result.checkpoint / ALLOCATION)
    assert len({(entry["bits"], entry["group_size"]) for entry in content.values()}) == 1
    assert all(0 < entry["expected_loss"] < 1 for entry in content.values())


@pytest.mark.parametrize("rounder", ["gptq", "autoround, steps: 2, checks: 1"])
def test_experts_come_back_from_disk_with_the_bytes_they_were_given(
    tmp_path: Path, rounder: str
) -> None:
    parent = tmp_path / "parent"
    build("qwen3_moe", torch.bfloat16, vocab_size=4096).save_pretrained(parent)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.builtin_model("tiny") / name, parent)
    (tmp_path / "text.txt").write_text("A run is checked on a few words of text. " * 20)
    text = f"""\
calibration: {{samples: 4, length: 32, batch_size: 2}}
stages:
  - {{method: allocate.bits, target_bpw: 5.5, counting: linear, bits: [3, 4, 6], group_sizes: [16]}}
  - {{method: quantize.{rounder}}}
evaluate: {{text: {{own: text.txt}}, length: 64, resamples: 100, noise_floor: false}}
export: [{{format: compressed-tensors}}]
"""
    outcome = run_recipe(load(tmp_path, text=text), str(parent), tmp_path / "run")
    chosen = read_allocation(outcome.folder / "stages" / "01-allocate.bits")
    assert len({grid for name, grid in chosen.items() if ".experts." in name}) == 1
    assert len(chosen) == 2 * (4 + 3 * 3)
    notes = outcome.report.variants[1].stage.notes  # type: ignore[union-attr]
    folder = outcome.folder / "deliverable" / "compressed-tensors"
    size = measure(folder, 1)
    assert size.tensor_bytes == notes["allocated_bytes"]
    assert outcome.report.variants[2].artifact.max_logit_difference == 0  # type: ignore[union-attr]


def test_an_expert_that_no_token_reaches_counts_as_if_one_had(tmp_path: Path) -> None:
    build("mixtral", num_local_experts=40, num_experts_per_tok=1).save_pretrained(tmp_path / "base")
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("own",))
    stage = AllocateBits(target_bpw=30, bits=(3, 4), group_sizes=(16,), experts="free")
    result = allocate(stage, tmp_path / "base", (batch,), own_context(tmp_path, lambda _: None))
    content = read_json(result.checkpoint / ALLOCATION)
    experts = [entry for name, entry in content.items() if ".experts." in name]
    assert len(experts) == 2 * 40 * 3
    assert all(0 < entry["expected_loss"] < 10 for entry in experts)


class Killed(Exception):
    pass


def test_an_interrupted_stage_goes_on_where_it_was_and_chooses_the_same(tmp_path: Path) -> None:
    stage = AllocateBits(
        target_bpw=3.5, counting="linear", group_sizes=(64,), bits=(3, 4), rows=16, tokens=128
    )
    base = resources.builtin_model("tiny")
    ids = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
    batches = (TokenBatch(ids, torch.ones(4, 32, dtype=torch.bool), ("own",) * 4),)

    def run(folder: Path, blocks: int) -> list[int]:
        """Run until so many blocks are done; the blocks reported."""
        done: list[int] = []

        def block_done(record: BlockRecord) -> None:
            done.append(record.block)
            if len(done) == blocks:
                raise Killed

        with suppress(Killed):
            allocate(stage, base, batches, own_context(folder, block_done))
        return done

    assert run(tmp_path / "whole", 9) == [3, 2, 1, 0]
    assert run(tmp_path / "parts", 2) == [3, 2]
    assert not (tmp_path / "parts" / "out").exists()
    assert run(tmp_path / "parts", 9) == [1, 0]
    first, second = (tmp_path / name / "out" for name in ("whole", "parts"))
    assert (first / ALLOCATION).read_bytes() == (second / ALLOCATION).read_bytes()
    verify_tensors(base, second, ())


def test_a_rounder_ignores_no_grid_it_was_given() -> None:
    stage = AllocateBits(target_bpw=3.5, counting="linear", group_sizes=(64,))
    allotted = stage.plan(MODEL, lambda *_: None)
    schemes = QuantizeRtn().schemes(allotted)
    assert schemes == {m.name: m.allotted for m in allotted.matrices if m.block is not None}
