"""GGUF files in llama.cpp itself: text, tokens, perplexity, divergence, its own converter.

`tools/engines/build_llama_cpp.py` builds the tools once; about five minutes on one core.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch

from compressor.compare import compare_models
from compressor.evaluation.config import EvaluateConfig
from compressor.formats import gguf
from compressor.formats.exporters import Source
from compressor.formats.imatrix import write_imatrix
from compressor.importance import measure_importance
from compressor.model.load import load_model, load_tokenizer
from compressor.progress import SilentObserver
from compressor.resources import builtin_model
from compressor.text import evaluation_documents
from compressor.types import TokenBatch, WeightScheme
from tests.engines.llama_cpp import (
    BUILT,
    PROMPTS,
    complete,
    convert,
    divergence,
    llama,
    same_tensors,
)
from tests.formats.helpers import quantize_checkpoint
from tools.engines import build_llama_cpp

pytestmark = pytest.mark.engines

TEXT = "The history of  the 1234 größte 3.14 — don't!\n\tx = f(y)  # 中文\n"
LENGTH = 256


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    build_llama_cpp.build(BUILT, jobs=1)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return builtin_model("tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose of the evaluation split, about 6 000 tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    documents = [document.text for document in evaluation_documents("prose")]
    path.write_text("\n\n".join(documents)[:24_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense")
    gguf.write(Source(tiny, {}, 1, "gguf"), out)
    return out / gguf.FILE


def rounded(tiny: Path, folder: Path, scheme: WeightScheme) -> tuple[Path, Path]:
    """A dense checkpoint of rounded weights and the GGUF of its codes."""
    checkpoint, codes = quantize_checkpoint(
        tiny, folder / "d", lambda module: scheme if ".layers." in module else None
    )
    gguf.write(Source(checkpoint, codes, 1, "gguf"), folder / "out")
    return checkpoint, folder / "out" / gguf.FILE


@pytest.fixture(scope="module")
def four_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return rounded(tiny, tmp_path_factory.mktemp("w4"), WeightScheme(4, 64))


def test_tokens_are_those_of_transformers(tiny: Path, dense: Path) -> None:
    done = llama("tokenize", "-m", dense, "-p", TEXT, "--ids", "--no-escape")
    ids = json.loads(done.stdout.strip().splitlines()[-1])
    assert ids == load_tokenizer(tiny)(TEXT).input_ids


@pytest.mark.parametrize(
    "scheme",
    [WeightScheme(4, 64), WeightScheme(4, 32, "asymmetric"), WeightScheme(8, None)],
    ids=str,
)
def test_greedy_text_is_that_of_the_dense_weights(
    tiny: Path, tmp_path: Path, scheme: WeightScheme
) -> None:
    checkpoint, file = rounded(tiny, tmp_path, scheme)
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, dtype=torch.float32)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        assert complete(file, prompt, 16) == tokenizer.decode(ids).rstrip("\n"), prompt


def test_perplexity_and_divergence_are_ours(
    tiny: Path, dense: Path, four_bits: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    """llama.cpp rounds activations to 8 bits, and stored logits to 16: 0.2 and 2 per cent."""
    checkpoint, file = four_bits
    config = EvaluateConfig.model_validate(
        {"text": {"prose": str(text)}, "protocol": "llama.cpp", "length": LENGTH}
    )
    base, ours = compare_models([str(tiny), str(checkpoint)], config, SilentObserver())
    found = divergence(dense, file, text, LENGTH, tmp_path)
    assert base.overall.perplexity is not None
    assert ours.overall.perplexity is not None
    assert ours.overall.divergence is not None
    assert found["base"] == pytest.approx(base.overall.perplexity.value, rel=0.002)
    assert found["ours"] == pytest.approx(ours.overall.perplexity.value, rel=0.002)
    assert found["kl"] == pytest.approx(ours.overall.divergence.mean.value, rel=0.02)


def test_importance_is_what_llama_cpp_measures(
    tiny: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    """On the same windows; llama.cpp multiplies bf16, so single inputs differ by a per cent."""
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    options = ("-c", LENGTH, "-b", LENGTH, "-t", 1, "--chunks", 8)
    llama("imatrix", "-m", dense, "-f", text, "-o", theirs, *options)
    ids = torch.tensor(load_tokenizer(tiny)(text.read_text("utf-8")).input_ids[: 8 * LENGTH])
    rows = ids.view(8, LENGTH)
    batch = TokenBatch(rows, torch.ones_like(rows, dtype=torch.bool), ("prose",) * 8)
    found = measure_importance(tiny, (batch,), SilentObserver())
    write_imatrix(ours, found, dataset="prose", chunk=LENGTH)
    mine, other = (
        {t.name: np.array(t.data).reshape(-1) for t in library.GGUFReader(path).tensors}
        for path in (ours, theirs)
    )
    assert len(mine) == 2 * 28
    for name, values in mine.items():
        if name.endswith("in_sum2"):
            assert np.linalg.norm(values - other[name]) < 0.02 * np.linalg.norm(other[name]), name
        else:
            assert values == other[name] == 8 * LENGTH
    small = tmp_path / "small.gguf"
    done = llama("quantize", "--imatrix", ours, dense, small, "IQ4_NL", 1)
    assert "loaded 28 importance matrix entries" in done.stdout + done.stderr
    assert small.stat().st_size < 0.55 * dense.stat().st_size


def test_its_converter_writes_the_same_tensors_and_keys(
    tiny: Path, dense: Path, tmp_path: Path
) -> None:
    convert(tiny, tmp_path / "theirs.gguf", tmp_path)
    assert same_tensors(dense, tmp_path / "theirs.gguf")
