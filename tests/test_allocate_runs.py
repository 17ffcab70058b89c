"""Bits under a budget, chosen: never exceeded, resumed, and better than uniform."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from compressor import resources
from compressor.engine import run_recipe
from compressor.formats.allocation import ALLOCATION, read_allocation
from compressor.formats.headers import read_json
from compressor.formats.sizes import measure
from compressor.model.load import load_model
from compressor.plan import make_plan
from compressor.stages.allocate_bits import AllocateBits
from compressor.stages.allocating import allocate
from compressor.stages.context import StageContext
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import BlockRecord, TokenBatch, WeightScheme
from compressor.verify import verify_tensors
from tests.helpers import stage_context
from tests.model.conftest import build
from tests.runs import TINY
from tests.test_allocate import MODEL, RECIPE, load


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
            # As many as the plan counts: what the next block needs, and no other.
            assert [path.name for path in folder.rglob("gradients-*")] == [
                f"gradients-{record.block:05d}"
            ]
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
