"""Pruning stages end to end: exact where nothing may change, ranked, resumable, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.engine import run_recipe
from compressor.errors import PlanError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.shape import resized, shape_of
from compressor.plan import make_plan
from compressor.registry import registry
from compressor.resources import builtin_model
from compressor.stages import mixing
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.stages.prune_width import PruneWidth
from compressor.stages.unit_choice import aligned
from compressor.stages.unit_inputs import Inputs, token_weights
from compressor.types import BlockRecord, StageResult, TokenBatch
from compressor.verify import verify_result, verify_tensors
from tests.helpers import checked_run, stage_context
from tests.model.conftest import build
from tests.model.conftest import checkpoints as checkpoints  # noqa: PLC0414 — a fixture

TINY = builtin_model("tiny")


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return build_batches(CalibrationConfig(samples=12, length=128), load_tokenizer(TINY))


@pytest.fixture(scope="module")
def other_text() -> CalibrationSet:
    config = CalibrationConfig(samples=12, length=128, seed=5)
    return build_batches(config, load_tokenizer(TINY))


def context(folder: Path, finished: tuple[BlockRecord, ...] = (), block_done=None) -> StageContext:
    done = block_done or (lambda _: None)
    return stage_context(folder, finished=finished, block_done=done)


def stage(method: str, **options: object) -> StageConfig:
    return registry().get(method)(**options)


def prune(
    folder: Path, text: CalibrationSet, method: str, parent: Path = TINY, **options: object
) -> StageResult:
    """Run a stage, hold it to its promises and to its plan."""
    return checked_run(stage(method, **options), parent, text, context(folder))


def loss(folder: Path, text: CalibrationSet) -> float:
    """Cross entropy in nats a token; perplexity is its exponential."""
    model = load_model(folder, dtype=torch.float32)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in text.batches:
            logits = model(batch.input_ids).logits[:, :-1]
            labels = batch.input_ids[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
            )
            tokens += labels.numel()
    return total / tokens


def batches(vocab: int = 96) -> CalibrationSet:
    ids = torch.randint(3, vocab, (4, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 8:] = False
    batch = TokenBatch(ids, mask, ("a", "b", "a", "b"))
    return CalibrationSet((batch,), (), {"a": 24, "b": 24}, "")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prune.obs", "ratio": 0.0},
        {"method": "prune.width", "ratio": 0.0, "score": "wanda"},
        {"method": "prune.depth", "ratio": 0.0},
    ],
    ids=lambda options: options["method"],
)
def test_removing_nothing_keeps_every_byte(
    tmp_path: Path, text: CalibrationSet, options: dict[str, object]
) -> None:
    result = prune(tmp_path / "out", text, **options)
    before, after = CheckpointReader(TINY), CheckpointReader(tmp_path / "out")
    assert all(before.tensor_sha256(name) == after.tensor_sha256(name) for name in before)
    assert (result.changed, result.resized, result.removed, result.renamed) == ((), (), (), {})
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        logits = [load_model(path)(ids).logits for path in (TINY, tmp_path / "out")]
    assert torch.equal(*logits)


def test_least_squares_beats_scores_and_scores_beat_chance(
    tmp_path: Path, text: CalibrationSet, other_text: CalibrationSet
) -> None:
    """Loss over the parent's, on other text: with compensation far less than any score."""
    base = loss(TINY, other_text)
    harm = {}
    for name, method, options in [
        ("obs", "prune.obs", {}),
        *((score, "prune.width", {"score": score}) for score in ("flap", "wanda", "random")),
    ]:
        prune(tmp_path / name, text, method, intermediate=416, heads=4, **options)
        harm[name] = loss(tmp_path / name, other_text) - base
    assert harm["obs"] < 0.8 * min(harm["flap"], harm["wanda"])
    # On this model the two scores are equally good; see LOG.md.
    assert harm["flap"] < 1.05 * harm["wanda"]
    assert harm["wanda"] < 0.8 * harm["random"]


@pytest.mark.parametrize("method", ["prune.obs", "prune.width"])
@pytest.mark.parametrize(
    "variant",
    [
        "llama-tied-biased",
        "mistral",
        "qwen3",
        "gemma3",
        "phi3",
        "smollm3",
        "granite",
        "mixtral",
        "qwen3_moe-mixed",
    ],
)
def test_families_lose_heads_and_channels(
    tmp_path: Path, checkpoints: Callable[..., Path], variant: str, method: str
) -> None:
    parent = checkpoints(variant)
    heads = {"heads": 2, "kv_heads": 1 if variant != "mistral" else 2}
    result = prune(tmp_path / "out", batches(), method, parent, intermediate=8, **heads)
    assert len(result.metrics) == len({metric.module for metric in result.metrics})
    assert all(metric.loss <= metric.baseline_loss * 1.001 for metric in result.metrics)


@pytest.mark.parametrize("variant", ["gpt2", "opt", "opt-postnorm", "gpt_neox", "olmo2"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "prune.obs"},
        {"method": "prune.width", "score": "flap"},
        {"method": "prune.width", "score": "taylor"},
        {"method": "prune.width", "score": "magnitude"},
    ],
    ids=lambda options: options.get("score", "obs"),
)
def test_families_whose_heads_are_fixed_lose_channels(
    tmp_path: Path, checkpoints: Callable[..., Path], variant: str, options: dict[str, object]
) -> None:
    parent = checkpoints(variant)
    result = prune(tmp_path / "out", batches(), parent=parent, intermediate=16, **options)
    biases = {name for name in result.changed if name.endswith(".bias")}
    assert bool(biases) == (options.get("score") == "flap" and variant != "olmo2")


def test_flap_adds_what_the_removed_channels_put_out_on_average(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    build("gpt2").save_pretrained(parent)
    prune(tmp_path / "out", batches(), "prune.width", parent, intermediate=16, score="flap")
    before, after = CheckpointReader(parent), CheckpointReader(tmp_path / "out")
    weight, seen = before["transformer.h.0.mlp.c_proj.weight"], []
    model = load_model(parent)
    model.transformer.h[0].mlp.c_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    (batch,) = batches().batches
    with torch.inference_mode():
        model(batch.input_ids, attention_mask=batch.mask.long())
    mean = seen[0][batch.mask].mean(0)
    kept = {row.numpy().tobytes() for row in after["transformer.h.0.mlp.c_proj.weight"]}
    gone = [i for i, row in enumerate(weight) if row.numpy().tobytes() not in kept]
    assert len(gone) == 56 - 16
    name = "transformer.h.0.mlp.c_proj.bias"
    torch.testing.assert_close(after[name], before[name] + mean[gone] @ weight[gone])


def test_the_pruned_stream_is_brought_back_to_the_parents(tmp_path: Path) -> None:
    """With the parent beside, even a block that loses nothing makes up for the ones before."""

    def stream_error(propagate: float) -> float:
        folder = tmp_path / str(propagate)
        prune(folder, text, "prune.obs", parent, intermediate=24, propagate=propagate, damping=1e-4)
        (batch,) = text.batches
        last = []
        with torch.inference_mode():
            for path in (parent, folder):
                model = load_model(path).model
                found = model(batch.input_ids, attention_mask=batch.mask.long())
                last.append(found.last_hidden_state[batch.mask])
        return float((last[0] - last[1]).square().sum() / last[0].square().sum())

    parent = tmp_path / "parent"
    build("granite", num_hidden_layers=4).save_pretrained(parent)
    ids = torch.randint(3, 96, (32, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::3, 20:] = False
    text = CalibrationSet((TokenBatch(ids, mask, ("a",) * 32),), (), {"a": 1}, "")
    assert stream_error(1.0) < 0.8 * stream_error(0.0)


@pytest.fixture(scope="module")
def short() -> CalibrationSet:
    return build_batches(CalibrationConfig(samples=4, length=64), load_tokenizer(TINY))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"method": "prune.obs", "intermediate": 640},
        {"method": "prune.width", "intermediate": 640, "heads": 4},
        {"method": "prune.depth", "layers": 2, "tokens": 256, "candidates": 1},
    ],
    ids=lambda options: options["method"],
)
def test_an_interrupted_stage_ends_with_the_same_bytes(
    tmp_path: Path, short: CalibrationSet, options: dict[str, object]
) -> None:
    whole = prune(tmp_path / "whole", short, **options)
    done: list[BlockRecord] = []

    def stop(record: BlockRecord) -> None:
        done.append(record)
        raise Interrupted

    chosen, attempts = stage(**options), 0
    while True:
        attempts += 1
        try:
            surroundings = context(tmp_path / "parts", tuple(done), stop)
            result = chosen.run(TINY, short, surroundings)
            break
        except Interrupted:
            continue
    assert attempts > 2
    assert replace(result, checkpoint=whole.checkpoint) == whole
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_dropped_blocks_are_the_ones_missed_least(tmp_path: Path, short: CalibrationSet) -> None:
    """The greedy choice by brute force: every model without one block, compared whole."""
    result = prune(tmp_path / "out", short, "prune.depth", layers=3, candidates=4, tokens=10**6)
    (dropped,) = (int(v) for n, v in result.notes.items() if n.startswith("block dropped"))
    distances = {}
    model = load_model(TINY, dtype=torch.float32)
    layers = list(model.model.layers)

    def logits() -> list[Tensor]:
        with torch.inference_mode():
            return [
                model(b.input_ids, use_cache=False).logits.log_softmax(-1) for b in short.batches
            ]

    whole = logits()
    for index in range(4):
        model.model.layers = torch.nn.ModuleList(layers[:index] + layers[index + 1 :])
        pairs = list(zip(whole, logits(), strict=True))
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
        distances[index] = total / sum(b.input_ids.numel() for b in short.batches)
    assert dropped == min(distances, key=distances.__getitem__)
    assert result.notes["KL to the parent without 1 blocks"] == pytest.approx(
        distances[dropped], rel=1e-3
    )
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3


def test_the_search_keeps_the_mix_that_is_nearest_on_held_out_text(
    tmp_path: Path, short: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "_HELD", 1)
    options = {"ratio": 0.25, "trial_tokens": 64, "attention": ("heads",)}
    chosen = stage("prune.search", **options)
    result = chosen.run(TINY, short, context(tmp_path / "out"))
    verify_result(TINY, result)
    architecture = Architecture.from_config(read_config(TINY))
    mixes = chosen.mixes(architecture)
    assert {mix.layers for mix in mixes} == {4, 3}
    assert {mix.heads for mix in mixes} == {4}
    budget = 0.75 * architecture.parameters
    for mix in mixes:
        assert abs(resized(architecture, mix).parameters - budget) < 0.01 * budget
    scores = [v for name, v in result.notes.items() if name.startswith("held-out KL")]
    assert len(scores) == len(mixes)
    best = mixes[scores.index(min(scores))]
    assert shape_of(Architecture.from_config(read_config(tmp_path / "out"))) == best


def test_a_block_that_is_gone_is_made_up_for(tmp_path: Path, other_text: CalibrationSet) -> None:
    """The parent's stream still has what the dropped block added; the others aim at it."""
    text = build_batches(CalibrationConfig(samples=32, length=128), load_tokenizer(TINY))
    base = loss(TINY, other_text)
    shape = replace(shape_of(Architecture.from_config(read_config(TINY))), layers=3)
    harm = {}
    for share, align in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0)):
        folder = tmp_path / f"{share}-{align}"
        mix = mixing.Mix(shape, (0, 2, 3), 2.0, shrinkage=0.0, propagate=share, align=align)
        result = mixing.prune_mix(mix, TINY, text.batches, context(folder))
        verify_tensors(TINY, folder, result.changed, removed=result.removed, renamed=result.renamed)
        roles = {name.split(".")[-2] for name in result.changed}
        undone = {"o_proj", "down_proj"} if share else set()
        seen = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if align else set()
        assert roles == undone | seen
        assert not any(".layers.0." in name for name in result.changed)
        harm[share, align] = loss(folder, other_text) - base
    assert harm[0.5, 0.0] < 0.9 * harm[0.0, 0.0]
    assert harm[0.0, 1.0] < 0.99 * harm[0.0, 0.0]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_matrix_is_fitted_to_what_is_left_of_its_inputs(share: float) -> None:
    """What the parent's inputs are linearly told by is undone: W' X = W X_parent where s = 1."""
    generator = torch.Generator().manual_seed(0)
    inputs, lost, weight = (torch.randn(8, n, generator=generator) for n in (200, 8, 6))
    parents, weight = inputs + 0.3 * lost @ inputs, weight.T
    seen = Inputs(
        hessian=2 / 200 * inputs @ inputs.T,
        mean=inputs.mean(1),
        drift=2 / 200 * (parents - inputs) @ inputs.T,
    )
    found = aligned(1e-7, share)(weight, seen).float() @ inputs
    wanted = weight @ ((1 - share) * inputs + share * parents)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(weight @ inputs, wanted, atol=0.1)


def test_tokens_count_relative_to_the_size_of_their_stream() -> None:
    """A stream a thousand times as large, as a first token's may be, does not decide alone."""
    stream = torch.tensor([[1000.0, 1000.0], [1.0, 1.0], [3.0, 3.0]])
    torch.testing.assert_close(token_weights(stream), torch.tensor([1e-6, 1.0, 1 / 9]))


def test_a_robust_stage_weighs_domains_and_keeps_the_best_round(
    tmp_path: Path, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code is farthest in the first trial, gains weight, and does not win by measuring worse."""
    distances = iter([0.5, 0.3, 0.4])

    def measured(_: object, mix: mixing.Mix, __: object) -> dict[str, dict[str, float]]:
        weights.append(dict(mix.weights or {}))
        means = dict.fromkeys(weights[0], 0.1) | {"code": next(distances)}
        return {"mean": means, "error": dict.fromkeys(means, 0.001)}

    weights: list[dict[str, float]] = []
    monkeypatch.setattr(mixing.Held, "trial", measured)
    result = prune(tmp_path / "out", text, "prune.obs", intermediate=640, robust=True, rounds=3)
    assert [sum(shares.values()) for shares in weights] == pytest.approx([1, 1, 1])
    assert weights[1]["code"] > 1.4 * weights[0]["code"]
    assert all(weights[1][name] < weights[0][name] for name in weights[0] if name != "code")
    kept = {n.removeprefix("weight of "): v for n, v in result.notes.items() if "weight of" in n}
    assert kept == weights[1]
    assert result.notes["worst held-out KL, round 2"] == 0.3
    plain = prune(tmp_path / "plain", text, "prune.obs", intermediate=640)
    assert [m.loss for m in plain.metrics] != [m.loss for m in result.metrics]


def test_a_search_is_planned_again_when_it_has_decided(tmp_path: Path, recipe_file) -> None:
    recipe = recipe_file(
        """\
calibration: {samples: 4, length: 64}
stages:
  - {method: prune.search, ratio: 0.25, depths: [1], attention: [whole], multiple: 64}
  - {method: quantize.rtn, group_size: 64, grid: minmax}
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false, every_stage: false}
"""
    )
    outcome = run_recipe(recipe, "builtin:tiny", tmp_path / "run")
    config = read_config(tmp_path / "run" / "deliverable" / "compressed-tensors")
    assert config["num_hidden_layers"] == 3
    assert config["intermediate_size"] % 64 == 0
    sizes = [variant.size.tensor_bytes for variant in outcome.report.variants]
    stored = tmp_path / "run" / "stages" / "01-prune.search"
    reader = CheckpointReader(stored)
    assert sizes[1] == sum(reader.info(name).nbytes for name in reader)
    notes = outcome.report.variants[1].stage.notes
    assert not any(name.startswith("held-out KL") for name in notes)  # nothing to choose between


REFUSED = {
    "searched size": ("method: prune.search\n    ratio: 0.2\n    heads: 4", "what the search"),
    "no budget to search": ("method: prune.search", "exactly one of ratio"),
    "nothing found": ("method: prune.search\n    ratio: 0.95", "no mix of blocks"),
    "nothing asked": ("method: prune.obs", "nothing says how much goes"),
    "two budgets": ("method: prune.obs\n    ratio: 0.2\n    parameters: 1000", "both say how much"),
    "budget and size": ("method: prune.obs\n    ratio: 0.2\n    intermediate: 64", "given too"),
    "more heads": ("method: prune.obs\n    heads: 6", "6 heads cannot be kept: the model has 5"),
    "uneven": ("method: prune.width\n    heads: 3", "320"),
    "odd width": ("method: prune.obs\n    intermediate: 700", "no multiple of 64"),
    "wide": ("method: prune.obs\n    intermediate: 1024", "the model has 832"),
    "too much": ("method: prune.obs\n    ratio: 0.9", "cannot be reached by channels alone"),
    "layers": ("method: prune.depth\n    layers: 5", "5 layers cannot be kept: the model has 4"),
    "bytes": ("method: prune.depth\n    bytes: 100", "cannot be reached by layers alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_in_a_sentence(case: str, recipe_file) -> None:
    written, sentence = REFUSED[case]
    recipe = recipe_file(
        f"calibration: {{}}\nstages:\n  - {written}\n  - method: quantize.rtn\n    group_size: 64\n"
    )
    with pytest.raises(PlanError, match=sentence) as caught:
        make_plan(recipe, read_config(TINY), "builtin:tiny")
    assert caught.value.problems[0].line >= 3


def test_widths_suit_the_rounder_that_follows(recipe_file) -> None:
    recipe = recipe_file(
        "calibration: {}\nstages:\n  - method: prune.obs\n    ratio: 0.1\n"
        "  - method: quantize.rtn\n    group_size: 64\n"
    )
    assert recipe.stages[0].multiple == 64
    plan = make_plan(recipe, read_config(TINY), "builtin:tiny")
    assert plan.stages[0].parameters < plan.parameters
    alone = recipe_file(
        "calibration: {}\nstages:\n  - {method: prune.obs, ratio: 0.1}\nexport: [{format: dense}]\n"
    )
    assert alone.stages[0].multiple == 8
    near = make_plan(alone, read_config(TINY), "builtin:tiny").stages[0].parameters
    assert abs(near / plan.parameters - 0.9) < 0.002
    assert "832" in plan.stages[0].remarks[0]


def test_taylor_of_experts_is_refused(checkpoints: Callable[..., Path]) -> None:
    architecture = Architecture.from_config(read_config(checkpoints("mixtral")))
    found: list[str] = []
    PruneWidth(score="taylor", intermediate=8).plan(
        architecture, lambda *words: found.append(words[1])
    )
    assert "experts of Mixtral" in found[0]


def test_a_pruned_and_rounded_model_is_reported_with_its_true_size(
    tmp_path: Path, recipe_file
) -> None:
    recipe = recipe_file(
        """\
calibration: {samples: 8, length: 64}
stages:
  - {method: prune.depth, layers: 3, score: influence}
  - {method: prune.obs, ratio: 0.1}
  - {method: quantize.rtn, group_size: 64, grid: minmax}
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false, every_stage: true}
"""
    )
    run_recipe(recipe, "builtin:tiny", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    cache = [variant["size"]["kv_bytes_per_token"] for variant in report["variants"]]
    assert cache == [cache[0], *[cache[0] * 3 // 4] * 3]
    assert report["variants"][-1]["artifact"]["max_logit_difference"] == 0
    notes = report["variants"][2]["stage"]["notes"]
    assert notes["share of parameters removed"] == pytest.approx(0.1, abs=0.02)
