"""Our checkpoints in vLLM on CPU, in its own environment: log-probabilities and greedy text.

`tools/engines/install_vllm.py` installs it once; about ten minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
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
from compressor.model.architecture import Architecture, cache_config
from compressor.model.cache import Entering, enter_cache
from compressor.model.load import load_model, load_tokenizer, read_config
from compressor.numerics.cache import cache_scale
from compressor.resources import builtin_model
from compressor.text import evaluation_documents
from compressor.types import CacheScheme, WeightScheme
from tests.formats.helpers import quantize_checkpoint
from tools.engines import install_vllm

pytestmark = pytest.mark.engines

SCRIPT = Path(__file__).with_name("vllm_scores.py")
LENGTH, TOKENS = 256, 16
PROMPTS = ("The history of the", "def main():\n", "It is a truth universally")


@pytest.fixture(scope="session")
def python() -> Path:
    return install_vllm.install(install_vllm.FOLDER)


def ask(python: Path, checkpoint: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run vLLM on a checkpoint; one process a question, one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, SCRIPT, checkpoint],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, **offline, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def expected(
    checkpoint: Path, texts: list[list[int]], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Log-probabilities of every token but the first of each text, from transformers."""
    model = load_model(checkpoint, dtype=dtype)
    with torch.inference_mode():
        return torch.cat([_chosen(model, ids) for ids in texts])


@pytest.mark.parametrize(
    ("form", "container", "scheme"),
    [
        ("compressed-tensors", "pack-quantized", WeightScheme(4, 64)),
        ("gptq", "gptq", WeightScheme(4, 64)),
        ("awq", "awq", WeightScheme(4, 64, "asymmetric")),
    ],
)
def test_log_probabilities_are_those_of_the_dense_weights(
    python: Path, tmp_path: Path, form: str, container: Any, scheme: WeightScheme
) -> None:
    """vLLM computes in bf16, with sums of its own: up to four times transformers' bf16 noise."""
    checkpoint, codes = quantize_checkpoint(
        builtin_model("tiny"), tmp_path / "d", lambda m: scheme if ".layers." in m else None
    )
    out = tmp_path / "out"
    exporters.exporter(form).write(Source(checkpoint, codes, 1, container), out)
    tokenizer = load_tokenizer(checkpoint)
    documents = evaluation_documents("prose")[:3]
    texts = [tokenizer(document.text).input_ids[: LENGTH - 1] for document in documents]
    answer = ask(
        python,
        out,
        {
            "dtype": "bfloat16",
            "length": LENGTH,
            "texts": texts,
            "prompts": [tokenizer(prompt).input_ids for prompt in PROMPTS],
            "tokens": TOKENS,
        },
    )
    theirs = torch.tensor([p for row in answer["logprobs"] for p in row])
    ours = expected(checkpoint, texts)
    noise = float((expected(checkpoint, texts, torch.bfloat16) - ours).abs().mean())
    difference = float((theirs - ours).abs().mean())
    worst = float((theirs - ours).abs().max())
    assert difference < 4 * noise
    unrounded = float((theirs - expected(builtin_model("tiny"), texts)).abs().mean())
    assert unrounded > 3 * difference  # it computes the rounded model, not the original
    assert abs(float((theirs - ours).mean())) < noise
    model = load_model(checkpoint, dtype=torch.float32)
    for prompt, written in zip(PROMPTS, answer["greedy"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(torch.cat([ids, torch.tensor([written])], 1)).logits[0]
        steps = logits[ids.shape[1] - 1 : -1].log_softmax(-1)
        chosen = steps.gather(1, torch.tensor(written)[:, None])[:, 0]
        # Greedy may take the second of two words between which its own error does not decide.
        assert float((steps.amax(-1) - chosen).max()) < 2 * worst


@pytest.mark.parametrize("shrink", [1, 8], ids=["measured scales", "scales that cut off"])
def test_keys_and_values_are_rounded_by_the_scales_in_the_file(
    python: Path, tmp_path: Path, shrink: int
) -> None:
    """Scales that cut most values off leave no doubt that vLLM reads them."""
    base = read_config(builtin_model("tiny"))
    model = load_model(builtin_model("tiny"), dtype=torch.float32)
    tokenizer = load_tokenizer(builtin_model("tiny"))
    documents = evaluation_documents("prose")[:3]
    texts = [tokenizer(document.text).input_ids[: LENGTH - 1] for document in documents]
    scheme = CacheScheme(_scales(model, texts, 1 / shrink))
    dense, out = tmp_path / "dense", tmp_path / "out"
    link_checkpoint(builtin_model("tiny"), dense)
    atomic_write_json(dense / "config.json", cache_config(base, scheme))
    architecture = Architecture.from_config(base)
    cache = dict(zip(architecture.cached_attention, scheme.scales, strict=True))
    source = Source(dense, CodesReader(), architecture.parameters, "auto", cache=cache)
    exporters.exporter("compressed-tensors").write(source, out)
    request = {"dtype": "bfloat16", "length": LENGTH, "texts": texts, "prompts": [], "tokens": 1}
    answer = ask(python, out, request)
    theirs = torch.tensor([p for row in answer["logprobs"] for p in row])
    ours, unrounded = expected(dense, texts), expected(builtin_model("tiny"), texts)
    noise = float((expected(dense, texts, torch.bfloat16) - ours).abs().mean())
    for attention, pair in zip(_attentions(model, architecture), scheme.scales, strict=True):
        enter_cache(attention, _cut_down(*pair))
    with torch.inference_mode():
        cut = torch.cat([_chosen(model, ids) for ids in texts])
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


def _chosen(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token of a text but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def _cut_down(keys: float, values: float) -> Entering:
    """Towards zero, to the next number of e4m3."""

    def cut(states: torch.Tensor, scale: float) -> torch.Tensor:
        steps = (states / scale).clamp(-448, 448)
        unit = 2.0 ** (torch.floor(torch.log2(steps.abs().clamp_min(2.0**-6))) - 3)
        return (steps / unit).trunc() * unit * scale

    return lambda k, v: (cut(k, keys), cut(v, values))


def _scales(model: Any, texts: list[list[int]], headroom: float) -> tuple[tuple[float, float], ...]:
    """As `quantize.kv` finds them, from the cache of transformers."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([ids[: min(map(len, texts))] for ids in texts])
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
