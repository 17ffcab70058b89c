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

from compressor.formats import exporters
from compressor.formats.exporters import Source
from compressor.model.load import load_model, load_tokenizer
from compressor.resources import builtin_model
from compressor.text import evaluation_documents
from compressor.types import WeightScheme
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
    found = []
    with torch.inference_mode():
        for ids in texts:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            chosen = torch.tensor(ids[1:])[:, None]
            found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0])
    return torch.cat(found)


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
