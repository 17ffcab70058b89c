"""Bits under a budget: priced, refused, kept in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.cost import checkpoint_bytes, linear_bits
from compressor.errors import ModelError, PlanError, RecipeError
from compressor.formats.allocation import ALLOCATION, read_allocation, write_allocation
from compressor.model.architecture import Architecture
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe, budget_overrides
from compressor.stages.allocate_bits import AllocateBits, allotment
from compressor.stages.budget import parse_size, proxy
from compressor.types import WeightScheme
from tests import runs
from tests.command import Compress
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
        told = re.search(r"\(([\d.]+) bits per (linear )?weight\)", refused[0])
        assert told is not None
        enough = stage.model_copy(update={"target_bpw": float(told[1]) + 0.01})
        enough.plan(MODEL, lambda option, message, _: pytest.fail(message))
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


def test_a_budget_that_does_not_bind_is_remarked_upon() -> None:
    (said,) = AllocateBits(target_size="5MB").remarks(MODEL)
    assert "sizes in this plan fill the budget" in said
    (said,) = AllocateBits(target_size="100GB").remarks(MODEL)
    assert "the budget does not bind: with the largest grid for every matrix 99,992." in said


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
    change = ["stages.0.target_bpw=8.5", "stages.0.group_sizes=[64]"]
    engine = "export=[{format: compressed-tensors, engines: [sglang]}]"
    (problem,) = refusals(tmp_path, *change, engine, "stages.0.bits=[3, 8]")
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


def test_a_budget_on_the_command_line(tmp_path: Path, compress: Compress) -> None:
    load(tmp_path)
    path = str(tmp_path / "recipe.yaml")

    def planned(*options: str) -> tuple[int, dict[str, Any]]:
        left = compress("plan", path, "builtin:tiny", "--format", "json", *options)
        return left.code, left.json

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
