"""`transform.awq` and `transform.smoothquant` on real models of every family."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.engine import run_recipe
from compressor.errors import PlanError, VerificationError
from compressor.model import edges as edges_module
from compressor.model.architecture import Architecture
from compressor.model.block import Block
from compressor.model.edges import EDGE_KINDS, Edge
from compressor.model.load import load_model
from compressor.model.walk import BlockWalk
from compressor.numerics.rtn import rtn
from compressor.plan import make_plan
from compressor.recipe import load_recipe
from compressor.registry import registry
from compressor.stages import scaling
from compressor.stages.context import StageContext
from compressor.stages.scaling import Chosen, Sample, sampled, scale_model
from compressor.stages.transform_awq import TransformAwq
from compressor.stages.transform_smoothquant import TransformSmoothquant
from compressor.types import BlockRecord, ModuleMetric, StageResult, TokenBatch
from compressor.verify import verify_tensors
from tests.helpers import stage_context
from tests.model.conftest import VARIANTS, build, config_of

AWQ = TransformAwq(bits=3, group_size=16, grid="minmax", steps=4, tokens=1000)


def batch(seed: int = 0, rows: int = 3, length: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, length - 4 :] = False
    return TokenBatch(ids, mask, ("a",) * rows)


TEXT = (batch(0), batch(1))


def context(folder: Path, **changes: Any) -> StageContext:
    return stage_context(folder / "out", **changes)


def saved(variant: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    path = folder / variant
    build(variant, dtype, **changes).save_pretrained(path)
    return path


def logits(checkpoint: Path) -> Tensor:
    probe = batch(7)
    with torch.inference_mode():
        model = load_model(checkpoint, dtype=torch.float32)
        return model(probe.input_ids, attention_mask=probe.mask).logits[probe.mask]


class Everything:
    """Scales every edge by random factors between 1/4 and 4."""

    tokens = 8

    def __call__(
        self, walk: BlockWalk, block: Block, found: Sequence[Edge], sample: Sample
    ) -> Iterator[Chosen]:
        generator = torch.Generator().manual_seed(block.index)
        for edge in found:
            width = edge.readers[0].shape[1] // (edge.heads[1] if edge.heads else 1)
            scale = 4 ** (2 * torch.rand(width, generator=generator) - 1)
            yield Chosen(edge, scale, ModuleMetric(edge.name, 32, 1.0, 1.0))


class AllEdges(TransformAwq):
    """Edges as the family has them, without a plan."""


def scale_all(checkpoint: Path, folder: Path) -> StageResult:
    return scale_model(AllEdges(), Everything(), checkpoint, TEXT, context(folder))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_scales_on_every_edge_leave_the_function(variant: str, tmp_path: Path) -> None:
    checkpoint = saved(variant, tmp_path)
    result = scale_all(checkpoint, tmp_path)
    verify_tensors(checkpoint, result.checkpoint, result.changed)
    architecture = Architecture.from_config(config_of(checkpoint))
    for block in range(architecture.layers):
        for edge in edges_module.edges(architecture, block):
            touched = {f"{edge.source}.weight", *(m.tensor for m in edge.readers)}
            assert touched <= set(result.changed)
    before, after = logits(checkpoint), logits(result.checkpoint)
    assert (after - before).abs().max() <= 1e-4 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt2", "qwen2", "mixtral"])
def test_in_bf16_only_the_storage_rounds(variant: str, tmp_path: Path) -> None:
    checkpoint = saved(variant, tmp_path, torch.bfloat16)
    result = scale_all(checkpoint, tmp_path)
    before, after = logits(checkpoint), logits(result.checkpoint)
    change = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert 0 < change.median() < 0.02


def wrong_heads(values: Tensor, kv_heads: int, share: int) -> Tensor:
    """Heads dealt in turn instead of in runs."""
    return values.reshape(1, kv_heads, -1).expand(share, -1, -1).reshape(-1)


@pytest.mark.parametrize(
    ("variant", "module", "name", "mutant"),
    [
        ("llama", scaling, "spread_heads", wrong_heads),
        ("gemma2", edges_module, "_NORM_OFFSET", {}),
        ("gemma2", edges_module, "_GEMMA", None),
        ("gpt_neox", edges_module, "_value_rows", lambda _, source: edges_module.Rows(64, 32)),
        ("gpt2", edges_module, "_activation", lambda _: "relu"),
        ("llama", scaling, "fold_norm", lambda w, s, **_: (w, s)),
    ],
)
def test_wrong_folds_are_caught(
    variant: str,
    module: Any,
    name: str,
    mutant: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = saved(variant, tmp_path)
    if name == "_GEMMA":  # the norm behind attention instead of the one before the other half
        wrong = ("input_layernorm", "post_attention_layernorm")
        monkeypatch.setitem(module._NORMS_BEFORE, "gemma2", wrong)
    else:
        monkeypatch.setattr(module, name, mutant)
    with pytest.raises(VerificationError, match="block 0: scaling changed its output"):
        scale_all(checkpoint, tmp_path)


def test_a_router_left_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved("mixtral", tmp_path)
    original = edges_module.edges
    without = lambda a, b: (replace(edge, followers=()) for edge in original(a, b))  # noqa: E731
    monkeypatch.setattr(scaling, "edges", without)
    with pytest.raises((VerificationError, KeyError)):
        scale_all(checkpoint, tmp_path)


# ---------------------------------------------------------------------- AWQ


def run(stage: Any, checkpoint: Path, folder: Path, **changes: Any) -> StageResult:
    text = CalibrationSet(TEXT, (), {"a": 64}, "")
    return stage.run(checkpoint, text, context(folder, **changes))


@pytest.mark.parametrize("variant", ["llama", "gemma2", "phi3", "opt", "gpt2", "mixtral", "qwen3"])
def test_awq_is_never_worse_than_no_scales_and_keeps_the_function(
    variant: str, tmp_path: Path
) -> None:
    checkpoint = saved(variant, tmp_path)
    result = run(AWQ, checkpoint, tmp_path)
    verify_tensors(checkpoint, result.checkpoint, result.changed)
    assert result.changed
    assert all(m.loss <= m.baseline_loss for m in result.metrics)
    assert any(m.loss < 0.98 * m.baseline_loss for m in result.metrics)
    before, after = logits(checkpoint), logits(result.checkpoint)
    assert (after - before).abs().max() <= 1e-4 * max(1.0, float(before.abs().max()))


def mlp_inputs(checkpoint: Path) -> tuple[Any, Tensor]:
    """The first feed-forward half and the tokens that enter it."""
    model, found = load_model(checkpoint, dtype=torch.float32), []
    mlp = model.model.layers[0].mlp
    with torch.inference_mode(), mlp.register_forward_pre_hook(lambda _, a: found.append(a[0])):
        for part in TEXT:
            model(part.input_ids, attention_mask=part.mask)
    return mlp, torch.cat([x[part.mask] for x, part in zip(found, TEXT, strict=True)])


def test_the_reported_loss_is_that_of_the_folded_model_rounded(tmp_path: Path) -> None:
    checkpoint = saved("llama", tmp_path)
    result = run(AWQ.model_copy(update={"edges": ("norm_mlp",)}), checkpoint, tmp_path)
    metric = result.metrics[0]
    assert metric.module == "model.layers.0.mlp"
    assert metric.loss < metric.baseline_loss
    dense, inputs = mlp_inputs(checkpoint)
    folded, scaled = mlp_inputs(result.checkpoint)
    assert not torch.allclose(inputs, scaled)
    with torch.inference_mode():
        expected = dense(inputs)
        for mlp, x, loss in ((dense, inputs, metric.baseline_loss), (folded, scaled, metric.loss)):
            for name in ("gate_proj", "up_proj"):
                weight = mlp.get_submodule(name).weight
                weight.copy_(rtn(weight, AWQ.scheme, scale_dtype=torch.float32).dequantize())
            error = (mlp(x) - expected).square().sum() / expected.square().sum()
            # Row scaling of up by another edge does not enter: only norm_mlp was folded.
            if mlp is folded:
                assert float(error) == pytest.approx(loss, rel=1e-3)
    baseline = build("llama").model.layers[0].mlp
    with torch.inference_mode():
        for name in ("gate_proj", "up_proj"):
            weight = baseline.get_submodule(name).weight
            weight.copy_(rtn(weight, AWQ.scheme, scale_dtype=torch.float32).dequantize())
        error = (baseline(inputs) - expected).square().sum() / expected.square().sum()
    assert float(error) == pytest.approx(metric.baseline_loss, rel=1e-3)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_twice_gives_the_same_bytes_and_so_does_resuming(tmp_path: Path) -> None:
    checkpoint = saved("llama", tmp_path)
    whole = run(AWQ, checkpoint, tmp_path / "whole")
    records: list[BlockRecord] = []

    def stop(record: BlockRecord) -> None:
        records.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(AWQ, checkpoint, tmp_path / "parts", block_done=stop)
    resumed = run(AWQ, checkpoint, tmp_path / "parts", finished=tuple(records))
    assert resumed.metrics == whole.metrics
    assert resumed.notes == whole.notes
    assert resumed.changed == whole.changed
    for ours, theirs in zip(shards(whole.checkpoint), shards(resumed.checkpoint), strict=True):
        assert filecmp.cmp(ours, theirs, shallow=False)


def test_an_expert_that_no_token_reaches_is_reported(tmp_path: Path) -> None:
    checkpoint = saved("mixtral", tmp_path, num_local_experts=40, num_experts_per_tok=1)
    result = run(AWQ.model_copy(update={"edges": ("up_down",)}), checkpoint, tmp_path)
    missed = {fallback.module for fallback in result.fallbacks}
    assert missed
    assert all(f.action == "left unscaled" for f in result.fallbacks)
    assert not {f"{module}.weight" for module in missed} & set(result.changed)
    assert len(result.metrics) + len(missed) == 2 * 40


@pytest.mark.parametrize("weights", ["ignore", "use", "both"])
@pytest.mark.parametrize("grid", ["minmax", "imatrix"])
def test_more_candidates_are_never_worse(weights: str, grid: str, tmp_path: Path) -> None:
    checkpoint = saved("qwen2", tmp_path)
    options = {"grid": grid, "edges": ("value_output", "up_down")}
    few = run(AWQ.model_copy(update={**options, "weights": weights}), checkpoint, tmp_path / "few")
    every = run(AWQ.model_copy(update=options), checkpoint, tmp_path / "all")
    # Block 0 only: what enters block 1 has gone through other folds, hence other roundings.
    for own, best in zip(few.metrics[:2], every.metrics[:2], strict=True):
        assert best.loss <= own.loss <= own.baseline_loss == best.baseline_loss


def test_sampling_takes_whole_rows_spread_evenly() -> None:
    batches = [batch(seed, rows=4) for seed in range(4)]
    parts, sample = sampled(batches, 40)
    assert sum(len(part.domains) for part in parts) == 16
    assert [len(parts[place].domains) for place in sample.places] == [1, 1, 1, 1]
    assert 40 <= sample.tokens <= 48
    everything, whole = sampled(batches, 10**9)
    assert [len(part.domains) for part in everything] == [4] * 4
    assert whole.places == (0, 1, 2, 3)
    assert len(sampled(batches, 1)[1].places) == 1


# ---------------------------------------------------------------------- SmoothQuant


@pytest.mark.parametrize("variant", ["llama", "gemma3", "mixtral", "opt", "phi3"])
def test_smoothquant_balances_ranges_and_keeps_the_function(variant: str, tmp_path: Path) -> None:
    checkpoint = saved(variant, tmp_path)
    result = run(TransformSmoothquant(), checkpoint, tmp_path)
    verify_tensors(checkpoint, result.checkpoint, result.changed)
    assert len(result.metrics) == 4  # two edges in each of two blocks
    before, after = logits(checkpoint), logits(result.checkpoint)
    assert (after - before).abs().max() <= 1e-4 * max(1.0, float(before.abs().max()))
    if variant == "llama":
        mlp, inputs = mlp_inputs(result.checkpoint)
        columns = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).abs().amax(0)
        torch.testing.assert_close(inputs.abs().amax(0), columns, rtol=1e-3, atol=1e-5)


def test_smoothquant_helps_where_there_are_outliers(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for decoder in model.model.layers:
            decoder.input_layernorm.weight[::8] *= 50
    model.save_pretrained(tmp_path / "outliers")
    result = run(TransformSmoothquant(), tmp_path / "outliers", tmp_path)
    attention = [m for m in result.metrics if m.module.endswith("self_attn")]
    assert all(m.loss < 0.5 * m.baseline_loss for m in attention)


# ---------------------------------------------------------------------- plan and recipes

RECIPE = """\
calibration: {samples: 2, length: 32, batch_size: 2}
stages:
  - {method: METHOD, OPTIONS}
  - {method: quantize.rtn, bits: 4, group_size: 16}
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false, batch_size: 16}
"""


def recipe(folder: Path, method: str, options: str = "") -> Any:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("METHOD", method).replace(", OPTIONS", options))
    return load_recipe(path)


def refusal(variant: str, folder: Path, method: str, options: str) -> PlanError:
    model = build(variant, **({"n_inner": 64} if variant == "gpt2" else {}))
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(folder, method, options), model.config.to_dict(), variant)
    return caught.value


@pytest.mark.parametrize(
    ("variant", "method", "options", "words", "hint"),
    [
        ("olmo2", "transform.awq", ", group_size: 16", "behind", "[value_output, up_down]"),
        ("olmo2", "transform.smoothquant", "", "behind", ""),
        ("opt-plain", "transform.smoothquant", "", "no weight", ""),
        (
            "gpt2",
            "transform.awq",
            ", group_size: 16, edges: [up_down]",
            "gelu_new",
            "[norm_attention, value_output, norm_mlp]",
        ),
        ("llama", "transform.awq", ", group_size: 32", "do not divide the 48 inputs", "channel"),
    ],
)
def test_refusals(
    variant: str, method: str, options: str, words: str, hint: str, tmp_path: Path
) -> None:
    problems = refusal(variant, tmp_path, method, options).problems
    assert any(words in problem.message and hint in problem.hint for problem in problems)


@pytest.mark.parametrize("method", ["transform.awq", "transform.smoothquant"])
def test_scales_need_text(method: str) -> None:
    stage = registry().get(method)()
    assert stage.calibration_need() is not None
    assert stage.label


def test_two_scalings_or_a_late_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    stages = "stages:\n  - {method: quantize.rtn, group_size: 16}\n  - {method: transform.awq}\n"
    path.write_text("calibration: {samples: 2, length: 32}\n" + stages)
    with pytest.raises(PlanError, match="a transform edits weights that are rounded already"):
        make_plan(load_recipe(path), build("llama").config.to_dict(), "llama")


@pytest.mark.parametrize("method", ["transform.awq", "transform.smoothquant"])
def test_through_the_engine_with_a_rounder(method: str, tmp_path: Path) -> None:
    import shutil

    from compressor import resources

    model = tmp_path / "model"
    build("llama", torch.bfloat16, vocab_size=4096).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.builtin_model("tiny") / name, model)
    options = ", bits: 4, group_size: 16, steps: 3" if method == "transform.awq" else ""
    outcome = run_recipe(recipe(tmp_path, method, options), str(model), tmp_path / "out")
    stage = outcome.report.variants[1].stage
    assert stage is not None
    assert stage.method == method
    assert len(stage.metrics_per_module) == (8 if method == "transform.awq" else 4)
    kl = [
        outcome.report.evaluations[v.id].overall.divergence.mean.value
        for v in outcome.report.variants[1:]
    ]
    assert kl[0] < 0.05 * kl[1]  # storage rounding beside 4 bits


def test_all_kinds_are_offered() -> None:
    assert AWQ.edge_kinds(Architecture.from_config(build("llama").config.to_dict())) == EDGE_KINDS
