"""Our checkpoints in vLLM on CPU, in its own environment, asked as `compress serve-check` asks it.

`tools/engines/install.py vllm` installs it once; about ten minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_json
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.formats.files import link_checkpoint
from compressor.model.architecture import Architecture
from compressor.model.cache import Entering, enter_cache
from compressor.model.load import load_model, load_tokenizer, read_config
from compressor.model.serving import cache_config, serving_config
from compressor.numerics.cache import cache_scale
from compressor.resources import builtin_model
from compressor.serving.ask import Answer, Question, ask_python, make_question
from compressor.serving.check import compare, judge
from compressor.serving.reference import expected
from compressor.types import ACTIVATIONS, ActivationScheme, CacheScheme, WeightScheme
from tests.formats.helpers import quantize_checkpoint
from tools.engines import install

pytestmark = pytest.mark.engines


@pytest.fixture(scope="session")
def python() -> Path:
    return install.install("vllm")


@pytest.fixture(scope="module")
def question() -> Question:
    return replace(make_question(load_tokenizer(builtin_model("tiny")), 512), timed=0)


def ask(python: Path, checkpoint: Path, question: Question) -> Answer:
    return ask_python(("serve_vllm",), python, checkpoint, question)


@pytest.mark.parametrize(
    ("form", "container", "scheme", "activations"),
    [
        ("compressed-tensors", "pack-quantized", WeightScheme(4, 64), None),
        ("gptq", "gptq", WeightScheme(4, 64), None),
        ("awq", "awq", WeightScheme(4, 64, "asymmetric"), None),
        ("compressed-tensors", "auto", WeightScheme(8, None), ACTIVATIONS["int8"]),
    ],
    ids=["W4A16 packed", "W4A16 GPTQ", "W4A16 AWQ", "W8A8 INT8"],
)
def test_log_probabilities_are_those_of_the_dense_weights(
    python: Path,
    tmp_path: Path,
    question: Question,
    form: str,
    container: Any,
    scheme: WeightScheme,
    activations: ActivationScheme | None,
) -> None:
    """vLLM computes in bf16, with sums of its own: up to four times transformers' bf16 noise."""
    checkpoint, codes = quantize_checkpoint(
        builtin_model("tiny"), tmp_path / "d", lambda m: scheme if ".layers." in m else None
    )
    inputs = dict.fromkeys(codes, activations) if activations else {}
    if inputs:
        config = read_config(checkpoint)
        atomic_write_json(checkpoint / "config.json", serving_config(config, inputs))
    out = tmp_path / "out"
    exporters.exporter(form).write(Source(checkpoint, codes, 1, container, inputs), out)
    answer = ask(python, out, question)
    found = compare(checkpoint, question, answer, builtin_model("tiny"))
    assert judge(found)[0] == "PASS", found
    assert abs(found["bias"]) < found["allowed"] / 4
    if scheme.bits == 4:  # it computes the rounded model, not the original
        assert found["to_original"] > 3 * found["difference"]


@pytest.mark.parametrize("shrink", [1, 8], ids=["measured scales", "scales that cut off"])
def test_keys_and_values_are_rounded_by_the_scales_in_the_file(
    python: Path, tmp_path: Path, question: Question, shrink: int
) -> None:
    """Scales that cut most values off leave no doubt that vLLM reads them."""
    base = read_config(builtin_model("tiny"))
    model = load_model(builtin_model("tiny"), dtype=torch.float32)
    scheme = CacheScheme(_scales(model, question, 1 / shrink))
    dense, out = tmp_path / "dense", tmp_path / "out"
    link_checkpoint(builtin_model("tiny"), dense)
    atomic_write_json(dense / "config.json", cache_config(base, scheme))
    architecture = Architecture.from_config(base)
    cache = dict(zip(architecture.cached_attention, scheme.scales, strict=True))
    source = Source(dense, CodesReader(), architecture.parameters, "auto", cache=cache)
    exporters.exporter("compressed-tensors").write(source, out)
    theirs = torch.tensor(ask(python, out, question).logprobs, dtype=torch.float64)
    ours = expected(load_model(dense, dtype=torch.float32), question, 1)
    unrounded = expected(model, question, 1)
    coarse = expected(load_model(dense, dtype=torch.bfloat16), question, 1)
    noise = float((coarse - ours).abs().mean())
    for attention, pair in zip(_attentions(model, architecture), scheme.scales, strict=True):
        enter_cache(attention, _cut_down(*pair))
    cut = expected(model, question, 1)
    difference = {
        name: float((theirs - other).abs().mean())
        for name, other in (("rounded", ours), ("cut down", cut), ("dense", unrounded))
    }
    print(f"from vLLM: {difference}; bf16 noise {noise:.4f}")
    # 0.32 cuts numbers down where it should round them; `capabilities` has that as its fault.
    assert min(difference["rounded"], difference["cut down"]) < 2 * noise
    if shrink > 1:
        assert difference["dense"] > 20 * difference["cut down"]


def _attentions(model: Any, architecture: Architecture) -> list[Any]:
    return [model.get_submodule(path) for path in architecture.cached_attention]


def _cut_down(keys: float, values: float) -> Entering:
    """Towards zero, to the next number of e4m3."""

    def cut(states: torch.Tensor, scale: float) -> torch.Tensor:
        steps = (states / scale).clamp(-448, 448)
        unit = 2.0 ** (torch.floor(torch.log2(steps.abs().clamp_min(2.0**-6))) - 3)
        return (steps / unit).trunc() * unit * scale

    return lambda k, v: (cut(k, keys), cut(v, values))


def _scales(model: Any, question: Question, headroom: float) -> tuple[tuple[float, float], ...]:
    """As `quantize.kv` finds them, from the cache of transformers."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(question.windows)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        keys, values = (
            cache_scale(float(states.abs().max()), torch.bfloat16, headroom)
            for states in (layer.keys, layer.values)
        )
        found.append((keys, values))
    return tuple(found)
