"""Keys and values in 8 bits, from the recipe to what transformers serves (`builtin:tiny`)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compressor import resources
from compressor.calibration import CalibrationConfig, build_batches
from compressor.engine import run_recipe
from compressor.errors import ModelError, NumericalError
from compressor.evaluation.scoring import StreamingScorer, TransformersScorer
from compressor.formats.compressed_tensors import export
from compressor.formats.files import checkpoint_files
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import measure
from compressor.journal import Journal
from compressor.model.architecture import Architecture
from compressor.model.families import FAMILIES
from compressor.model.load import load_model, load_tokenizer, read_config
from compressor.model.serving import SERVING, cache_config, serving_config
from compressor.order import order_problems
from compressor.progress import SilentObserver
from compressor.recheck import verify_folder
from compressor.recipe import load_recipe
from compressor.stages.context import StageContext
from compressor.stages.quantize_kv import QuantizeKv
from compressor.types import ACTIVATIONS, BlockRecord, CacheScheme, TokenBatch
from compressor.verify import verify_tensors
from tests.helpers import stage_context
from tests.model.conftest import build
from tests.runs import SMALL, TINY, Ran, plan_stages, ran, refused

BASE = resources.builtin_model("tiny")
RTN = "  - {method: quantize.rtn, bits: 4, group_size: 64}\n"
KV = "  - {method: quantize.kv}\n"
CT = "compressed-tensors"


def scales_of(run: Ran) -> list[list[float]]:
    found: list[list[float]] = read_config(run.stage)[SERVING]["cache"]["scales"]
    return found


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Weights to 4 bits, then the cache."""
    return ran(tmp_path_factory.mktemp("w4-kv8"), RTN + KV)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(tmp_path_factory.mktemp("kv8"), KV)


def tokens(length: int = 40, rows: int = 2) -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 500, (rows, length), generator=generator)
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",) * rows)


def with_cache(folder: Path, scheme: CacheScheme, base: Path = BASE) -> Path:
    """A copy of a checkpoint whose cache is rounded."""
    shutil.copytree(base, folder)
    (folder / "config.json").write_text(json.dumps(cache_config(read_config(base), scheme)))
    return folder


# ---------------------------------------------------------------------- what is computed


def e4m3(numbers: Tensor, scale: float) -> Tensor:
    """Rounded to a float of 4 and 3 bits by its definition, in fp64."""
    steps = (numbers.double() / scale).clamp(-448, 448)
    exponent = torch.floor(torch.log2(steps.abs().clamp_min(2.0**-6)))
    unit = 2.0 ** (exponent - 3)
    return (steps / unit).round() * unit * scale


def reference(ids: Tensor, scales: list[tuple[float, float]]) -> Tensor:
    """Final states of `builtin:tiny` with attention written out token by token, in fp64.

    Keys are rounded after the rotary embedding, where they enter the cache; queries are not.
    """
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).model
    hidden = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.rotary_emb(hidden, positions)
    for layer, (k_scale, v_scale) in zip(model.layers, scales, strict=True):
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (*ids.shape, -1, attention.head_dim)
        q, k, v = (
            project(normed).view(shape).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = e4m3(k, k_scale), e4m3(v, v_scale)
        out = torch.zeros_like(q)
        for head in range(q.shape[1]):
            shared = head // attention.num_key_value_groups
            for place in range(ids.shape[1]):
                logits = k[:, shared, : place + 1] @ q[:, head, place, :, None]
                weights = torch.softmax(logits[..., 0] * attention.head_dim**-0.5, -1)
                out[:, head, place] = (weights[:, None] @ v[:, shared, : place + 1])[:, 0]
        joined = out.transpose(1, 2).reshape(*ids.shape, -1)
        hidden = hidden + attention.o_proj(joined)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.norm(hidden)


SCALES = [(0.11, 0.013), (0.09, 0.021), (0.15, 0.017), (0.07, 0.025)]


@pytest.mark.parametrize("streamed", [True, False], ids=["by blocks", "whole"])
def test_scoring_computes_attention_with_a_rounded_cache(tmp_path: Path, streamed: bool) -> None:
    layers = TINY["num_hidden_layers"]
    scales = (SCALES * layers)[:layers]
    checkpoint = with_cache(tmp_path / "m", CacheScheme(tuple(scales)))
    batch = tokens(length=20)
    cpu, precise = torch.device("cpu"), torch.float32
    scorer: Any = (
        StreamingScorer(
            checkpoint, cpu, precise, scratch=tmp_path / "s", budget=1 << 24,
            observer=SilentObserver(),
        )
        if streamed
        else TransformersScorer(checkpoint, cpu, precise)
    )  # fmt: skip
    (states,) = scorer.states([batch])
    with torch.no_grad():
        exact = reference(batch.input_ids, scales)
        swapped = reference(batch.input_ids, [(v, k) for k, v in scales])
        fine = reference(batch.input_ids, [(k * 1.3, v) for k, v in scales])
    size = float(exact.norm())

    def distance(other: Tensor) -> float:
        return float((states.double() - other).norm()) / size

    # A state that lies between two numbers of the cache may fall on either side in fp32.
    assert distance(exact) < 2e-3
    assert distance(swapped) > 20 * distance(exact)
    assert distance(fine) > 3 * distance(exact)


def test_a_step_at_a_time_gives_what_all_at_once_gives(alone: Ran) -> None:
    """The real cache behind the rounding holds rounded states, and decoding reads them."""
    model = load_model(alone.stage, dtype=torch.float32)
    ids = tokens(length=24).input_ids
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        steps = [
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
            for place in range(ids.shape[1])
        ]
    apart = torch.cat(steps, 1) - whole
    assert float(apart.norm() / whole.norm()) < 2e-3
    for layer, (keys, values) in zip(cache.layers, scales_of(alone), strict=True):
        for held, scale in ((layer.keys, keys), (layer.values, values)):
            assert held.shape[2] == ids.shape[1]
            assert torch.equal(held, (held / scale).to(torch.float8_e4m3fn).float() * scale)


def test_gradients_pass_the_rounding(alone: Ran) -> None:
    model = load_model(alone.stage, dtype=torch.float32)
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_()
    model(tokens(length=8).input_ids).logits.square().mean().backward()
    assert float(weight.grad.abs().sum()) > 0


# ---------------------------------------------------------------------- the stage


def test_no_weight_changes_and_the_scales_are_what_text_reaches(rounded: Ran) -> None:
    parent, stage = sorted((rounded.folder / "stages").iterdir())
    verify_tensors(parent, stage, changed=())
    for path in checkpoint_files(parent):
        if path.name != "config.json":
            assert (stage / path.name).read_bytes() == path.read_bytes()
    model = load_model(parent, dtype=torch.float32)
    config = load_recipe(rounded.folder / "recipe.yaml").calibration
    assert config is not None
    largest = [[0.0, 0.0] for _ in scales_of(rounded)]
    for batch in build_batches(config, load_tokenizer(parent)).batches:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(batch.input_ids, past_key_values=cache, use_cache=True)
        for found, layer in zip(largest, cache.layers, strict=True):
            found[0] = max(found[0], float(layer.keys.abs().max()))
            found[1] = max(found[1], float(layer.values.abs().max()))
    headroom = QuantizeKv.model_fields["headroom"].default
    for found, scales in zip(largest, scales_of(rounded), strict=True):
        for reached, scale in zip(found, scales, strict=True):
            assert math.isclose(448 * scale, headroom * reached, rel_tol=2.0**-8)
            assert float(torch.tensor(scale, dtype=torch.bfloat16)) == scale


def test_the_export_says_it_in_the_words_of_the_library(rounded: Ran, alone: Ran) -> None:
    for run, form in ((rounded, "pack-quantized"), (alone, "dense")):
        config = json.loads((run.deliverable / "config.json").read_text())
        assert SERVING not in config
        read = QuantizationConfig.model_validate(config["quantization_config"])
        assert read.format == form
        assert read.kv_cache_scheme is not None
        kept = read.kv_cache_scheme
        assert (kept.num_bits, kept.type, kept.strategy) == (8, "float", "tensor")
        assert (kept.symmetric, kept.dynamic) == (True, False)
        reader = CheckpointReader(run.deliverable)
        for index, scales in enumerate(scales_of(run)):
            for part, scale in zip("kv", scales, strict=True):
                stored = reader[f"model.layers.{index}.self_attn.{part}_scale"]
                assert (stored.dtype, list(stored.shape)) == (torch.bfloat16, [1])
                assert stored.item() == scale


def test_what_is_served_is_what_was_measured(rounded: Ran, alone: Ran) -> None:
    batch = tokens()
    for run in (rounded, alone):
        (exported,) = Journal(run.folder / "journal.jsonl").all("exported")
        assert exported["max_logit_difference"] == 0
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode():
                dense, packed = (
                    load_model(folder, dtype=dtype)(batch.input_ids).logits
                    for folder in (run.stage, run.deliverable)
                )
            assert torch.equal(dense, packed)
        served = AutoModelForCausalLM.from_pretrained(run.deliverable, dtype="auto")
        parent = load_model(max((run.folder / "stages").iterdir()).parent / min(
            path.name for path in (run.folder / "stages").iterdir()
        ) if run is rounded else BASE)  # fmt: skip
        with torch.inference_mode():
            assert torch.equal(served(batch.input_ids).logits, packed)
            assert not torch.equal(parent(batch.input_ids).logits, packed)
        checks = {check.name: check for check in verify_folder(run.folder)}
        assert all(check.passed for check in checks.values())
        assert checks["shapes"].detail.endswith(f"{2 * len(scales_of(run))} scales of the cache")


def test_the_report_has_the_distance_and_half_the_cache(alone: Ran) -> None:
    base, variant = alone.outcome.report.variants
    assert variant.label == "KV fp8"
    assert base.size.kv_bytes_per_token == 2 * variant.size.kv_bytes_per_token
    divergence = alone.outcome.report.evaluations[variant.id].overall.divergence
    assert divergence is not None
    assert 1e-5 < divergence.mean.value < 0.02


def test_the_plan_prices_the_scales_to_the_byte(rounded: Ran, alone: Ran, tmp_path: Path) -> None:
    for run, stages in ((rounded, RTN + KV), (alone, KV)):
        made = plan_stages(tmp_path, stages)
        found = measure(run.deliverable, made.parameters)
        assert found.tensor_bytes == made.exports[0].tensor_bytes
        assert found.by_role["scales"] == made.stages[-1].by_role["scales"]


def test_the_same_run_gives_the_same_bytes(alone: Ran, tmp_path: Path) -> None:
    again = ran(tmp_path, KV)
    for path in alone.deliverable.iterdir():
        assert (again.deliverable / path.name).read_bytes() == path.read_bytes()


def test_a_draft_speculates_for_a_model_with_a_rounded_cache(tmp_path: Path) -> None:
    small = "tokens: 256, length: 32, prompt: 8, steps: 2, prompts: 1, new_tokens: 6"
    found = ran(tmp_path, KV + f"  - {{method: draft.standalone, {small}}}\n")
    (draft,) = found.outcome.report.drafts
    assert draft.target == "01-quantize.kv"
    config = json.loads((found.folder / draft.path / "config.json").read_text())
    assert SERVING not in config  # its own cache is as it was


# ---------------------------------------------------------------------- interruptions, padding


def context(folder: Path, done: list[BlockRecord], stop: int = 99) -> StageContext:
    def block_done(record: BlockRecord) -> None:
        done.append(record)
        if record.block == stop:
            raise KeyboardInterrupt

    return stage_context(folder / "stage", finished=tuple(done), block_done=block_done)


def test_an_interrupted_stage_goes_on_behind_the_last_block(tmp_path: Path) -> None:
    config = CalibrationConfig(samples=2, length=32)
    calibration = build_batches(config, load_tokenizer(BASE))
    stage = QuantizeKv()
    whole = stage.run(BASE, calibration, context(tmp_path / "a", []))
    done: list[BlockRecord] = []
    with pytest.raises(KeyboardInterrupt):
        stage.run(BASE, calibration, context(tmp_path / "b", done, stop=1))
    assert [record.block for record in done] == [0, 1]
    resumed = stage.run(BASE, calibration, context(tmp_path / "b", done))
    assert [record.block for record in done] == list(range(TINY["num_hidden_layers"]))
    configs = [(result.checkpoint / "config.json").read_bytes() for result in (whole, resumed)]
    assert configs[0] == configs[1]
    assert whole.notes == resumed.notes
    assert (BASE / "config.json").read_text().find(SERVING) < 0


def test_padding_reaches_nothing(tmp_path: Path) -> None:
    calibration = build_batches(CalibrationConfig(samples=2, length=64), load_tokenizer(BASE))
    (batch,) = calibration.batches
    half = TokenBatch(batch.input_ids[:, :32], batch.mask[:, :32], batch.domains)
    padded = replace(batch, mask=batch.mask & (torch.arange(64) < 32))
    found = {}
    for name, text in (("half", half), ("padded", padded), ("all", batch)):
        done: list[BlockRecord] = []
        QuantizeKv().run(
            BASE, replace(calibration, batches=(text,)), context(tmp_path / name, done)
        )
        found[name] = torch.tensor([list(record.notes.values()) for record in done])
    torch.testing.assert_close(found["padded"], found["half"], rtol=1e-5, atol=0)
    assert (found["all"] >= found["half"] * 0.9999).all()
    assert (found["all"] > found["half"] * 1.01).any()


def test_text_that_overflows_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = 3e38
    model.save_pretrained(tmp_path / "m")
    calibration = build_batches(CalibrationConfig(samples=1, length=32), load_tokenizer(BASE))
    with pytest.raises(NumericalError, match="not finite"):
        QuantizeKv().run(tmp_path / "m", calibration, context(tmp_path, []))


# ---------------------------------------------------------------------- what cannot be


def test_the_plan_says_what_a_token_takes(tmp_path: Path) -> None:
    (remark,) = plan_stages(tmp_path, KV).stages[0].remarks
    per_token = 2 * TINY["num_hidden_layers"] * TINY["num_key_value_heads"] * TINY["head_dim"]
    assert remark.startswith(
        f"a token of context takes {per_token:,} bytes of cache instead of {2 * per_token:,}"
    )


@pytest.mark.parametrize(
    ("stages", "export", "words"),
    [
        (KV, "[{format: dense}]", "dense cannot say that the cache is rounded (to fp8)"),
        (KV, "[{format: gguf}]", "gguf cannot say that the cache is rounded"),
        (RTN + KV, "[{format: gptq}]", "gptq cannot say that the cache is rounded"),
        (RTN + KV, "[{format: awq}]", "awq cannot say that the cache is rounded"),
        (KV, f"[{{format: {CT}, engines: [sglang]}}]", "sglang: it does not take the rounding"),
        (KV, f"[{{format: {CT}, engines: [vllm-cpu]}}]", "vllm-cpu: its CPU kernels cut keys"),
        (
            "  - {method: quantize.rtn, group_size: 64, symmetry: asymmetric}\n" + KV,
            f"[{{format: {CT}}}]",
            "load in transformers only where the cache is not rounded",
        ),
        (
            "  - {method: quantize.rtn, group_size: 64, embeddings: quantize}\n" + KV,
            f"[{{format: {CT}}}]",
            "load in transformers only where the cache is not rounded",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, stages: str, export: str, words: str
) -> None:
    assert words in refused(tmp_path, f"{stages}export: {export}\n")


def test_engines_that_take_it_are_accepted(tmp_path: Path) -> None:
    engines = f"export: [{{format: {CT}, engines: [transformers, vllm]}}]\n"
    assert plan_stages(tmp_path, KV + engines).exports[0].ratio < 1.001


def test_weights_come_before_the_cache(tmp_path: Path) -> None:
    found = refused(tmp_path, KV + RTN)
    assert "the scales of the cache were measured on the model as it was" in found
    assert "order that works: quantize.rtn → quantize.kv" in found
    assert list(order_problems(["quantize.kv", "draft.eagle3"])) == []
    for then in (
        "quantize.gptq",
        "transform.awq",
        "prune.depth",
        "allocate.bits",
        "recover.distill",
    ):
        (problem,) = order_problems(["quantize.kv", then])
        assert "scales of the cache" in problem.message


def test_it_needs_text_and_heads_that_kernels_take(tmp_path: Path) -> None:
    from compressor.errors import RecipeError

    (tmp_path / "recipe.yaml").write_text(f"stages:\n{KV}")
    with pytest.raises(RecipeError, match="measures keys and values on calibration text"):
        load_recipe(tmp_path / "recipe.yaml")
    assert "heads are 24 wide" in refused(tmp_path, KV, TINY | {"head_dim": 24})


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox"])
def test_attention_that_the_library_does_not_know_is_refused(tmp_path: Path, variant: str) -> None:
    config = build(variant).config.to_dict()
    assert "not one whose cache compressed-tensors can describe" in refused(tmp_path, KV, config)


WRONG = {
    "a name": ({"format": "int4", "scales": [[1.0, 1.0]]}, "known is: fp8"),
    "no mapping": (3, "known is: fp8"),
    "too few": ({"format": "fp8", "scales": [[1.0, 1.0]]}, "1 scales of the cache for"),
    "half a pair": ({"format": "fp8", "scales": "half"}, "scales of the cache for"),
    "zero": ({"format": "fp8", "scales": "zero"}, "are no use"),
    "negative": ({"format": "fp8", "scales": "negative"}, "are no use"),
    "infinite": ({"format": "fp8", "scales": "infinite"}, "are no use"),
}
PAIRS = {"half": [1.0], "zero": [1.0, 0.0], "negative": [-1.0, 1.0], "infinite": [math.inf, 1.0]}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_configuration_is_refused(case: str) -> None:
    written, words = WRONG[case]
    if isinstance(written, dict) and isinstance(written["scales"], str):
        bad = PAIRS[written["scales"]]
        rest = [[1.0, 1.0]] * (TINY["num_hidden_layers"] - 1)
        written = written | {"scales": [*rest, bad]}
    with pytest.raises(ModelError, match=words):
        Architecture.from_config({**TINY, SERVING: {"cache": written}})


def test_both_roundings_stand_side_by_side_in_the_configuration() -> None:
    scheme = CacheScheme(((1.0, 2.0),) * TINY["num_hidden_layers"])
    inputs = {"model.layers.0.mlp.up_proj": ACTIVATIONS["int8"]}
    for config in (
        serving_config(cache_config(TINY, scheme), inputs),
        cache_config(serving_config(TINY, inputs), scheme),
    ):
        found = Architecture.from_config(config)
        assert (found.cache, dict(found.activations)) == (scheme, inputs)


# ---------------------------------------------------------------------- families


def test_every_family_is_mapped_or_refused() -> None:
    mapped = {
        name for name in FAMILIES if Architecture.from_config({"model_type": name}).cached_attention
    }
    assert set(FAMILIES) - mapped == {"gpt2", "gpt_neox"}


DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3")
DENSE += ("granite", "opt")


@pytest.mark.parametrize("variant", DENSE)
def test_transformers_serves_every_family_as_we_measure_it(tmp_path: Path, variant: str) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path / "base")
    architecture = Architecture.from_config(read_config(tmp_path / "base"))
    scheme = CacheScheme(((0.03, 0.017),) * architecture.layers)
    dense = with_cache(tmp_path / "dense", scheme, tmp_path / "base")
    cache = dict(zip(architecture.cached_attention, scheme.scales, strict=True))
    parameters = architecture.parameters
    export(dense, {}, tmp_path / "out", logical_parameters=parameters, cache=cache)
    ids = torch.arange(3, 35)[None] % 90
    with torch.inference_mode():
        plain, ours, theirs = (
            load_model(tmp_path / name)(ids, use_cache=False).logits
            for name in ("base", "dense", "out")
        )
    assert torch.equal(ours, theirs)
    assert not torch.equal(plain, ours)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_experts_must_be_quantized_beside_a_rounded_cache(tmp_path: Path, variant: str) -> None:
    model = build(variant, torch.bfloat16, vocab_size=4096, head_dim=16)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / "base")
    config = read_config(tmp_path / "base")
    assert "loads experts beside a rounded cache only" in refused(tmp_path, KV, config)
    text = SMALL + RTN.replace("64", "16") + KV
    (tmp_path / "recipe.yaml").write_text(text.replace("length: 64", "length: 32"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    run_recipe(recipe, str(tmp_path / "base"), tmp_path / "run")
    (exported,) = Journal(tmp_path / "run" / "journal.jsonl").all("exported")
    assert exported["max_logit_difference"] == 0
