"""Our drafts in vLLM on CPU: speculative decoding writes what the target writes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.model.load import load_model, load_tokenizer
from compressor.resources import builtin_model
from compressor.serving.ask import Answer, Question, ask_python, make_question
from compressor.serving.reference import greedy_steps
from tests import runs
from tools.engines import install

pytestmark = pytest.mark.engines
# The default features of four blocks name one block twice, which vLLM counts once and fails on.
RECIPE = """\
calibration: {mix: english, samples: 8, length: 128}
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
  - {method: draft.standalone, layers: 1, tokens: 3000, steps: 20, prompts: 1}
  - {method: draft.eagle3, features: [1, 2, 3], tokens: 3000, steps: 20, prompts: 1, tree_nodes: 4}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
"""
DRAFTED = 3


@pytest.fixture(scope="session")
def python() -> Path:
    return install.install("vllm")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(tmp_path_factory.mktemp("run"), RECIPE).folder


@pytest.fixture(scope="module")
def question() -> Question:
    asked = make_question(load_tokenizer(builtin_model("tiny")), 512)
    return replace(asked, windows=asked.windows[:1], tokens=48, timed=0)


def ask(python: Path, run: Path, question: Question, **speculative: Any) -> Answer:
    options = {"speculative_config": speculative} if speculative else {}
    target = run / "deliverable" / "compressed-tensors"
    return ask_python(("serve_vllm",), python, target, replace(question, options=options))


@pytest.fixture(scope="module")
def alone(python: Path, run: Path, question: Question) -> Answer:
    return ask(python, run, question)


@pytest.mark.parametrize(
    ("method", "folder"),
    [
        ("draft_model", "draft"),
        ("eagle3", "03-draft.eagle3"),
        ("eagle3", "03-draft.eagle3/speculators"),
    ],
    ids=["standalone", "EAGLE-3, flat", "EAGLE-3, speculators"],
)
def test_greedy_text_is_that_of_the_target_alone(
    python: Path, run: Path, question: Question, alone: Answer, method: str, folder: str
) -> None:
    draft = run / "deliverable" / folder
    found = ask(
        python, run, question, method=method, model=str(draft), num_speculative_tokens=DRAFTED
    )
    model = load_model(run / "stages" / "01-quantize.rtn", dtype=torch.float32)
    for prompt, ours, theirs in zip(question.prompt_ids, alone.greedy, found.greedy, strict=True):
        assert len(theirs) == len(ours) == question.tokens
        differs = [a != b for a, b in zip(ours, theirs, strict=True)]
        apart = differs.index(True) if any(differs) else None
        if apart is not None:  # several tokens at once are summed otherwise: only a tie may tip
            step = greedy_steps(model, prompt, theirs[: apart + 1])[-1]
            assert float(step) < 0.05, (prompt, ours, theirs)
    print(method, folder, dict(found.counters))
    assert found.counters["drafts"] > 0
    assert found.counters["draft_tokens"] == DRAFTED * found.counters["drafts"]
    assert found.counters["accepted_tokens"] > 0
