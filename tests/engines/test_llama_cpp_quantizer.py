"""What llama.cpp's own quantizer makes for us, drafts, and pruned shapes, in llama.cpp itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch

from compressor.engine import run_recipe
from compressor.formats import gguf, llama_quantize
from compressor.formats.exporters import Source
from compressor.formats.gguf_types import MIXTURES, estimated_bytes
from compressor.formats.imatrix import Importance, write_imatrix
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.recipe import load_recipe
from compressor.report.schema import Report
from compressor.requantize import relative_error
from compressor.resources import builtin_model
from compressor.text import evaluation_documents
from tests.engines.llama_cpp import (
    BUILT,
    GREEDY,
    divergence,
    llama,
)
from tools.engines import build_llama_cpp

pytestmark = pytest.mark.engines

SMOLLM2 = Path(__file__).resolve().parents[2] / "cache" / "SmolLM2-135M-Instruct"
LENGTH = 256
EVALUATE = f"evaluate: {{text: {{prose: TEXT}}, protocol: llama.cpp, length: {LENGTH}}}\n"


@pytest.fixture(scope="session", autouse=True)
def _built(stand_in: Path) -> None:
    """The real program, for this folder's tests."""
    build_llama_cpp.build(BUILT, jobs=1)


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> Path:
    path: Path = BUILT / "bin" / llama_quantize.PROGRAM
    monkeypatch.setenv(llama_quantize.VARIABLE, str(path))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose of the evaluation split, about 6 000 tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    documents = [document.text for document in evaluation_documents("prose")]
    path.write_text("\n\n".join(documents)[:24_000], encoding="utf-8")
    return path


def compressed(folder: Path, recipe: str, model: str = "builtin:tiny") -> tuple[Path, Report]:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    outcome = run_recipe(load_recipe(path, allow_outside=True), model, folder / "out")
    return outcome.folder, outcome.report


# ---------------------------------------------------------------------- K- and I-quants


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths 256 divides, so that every type has its own blocks."""
    tiny, out = builtin_model("tiny"), tmp_path_factory.mktemp("wide")
    config = read_config(tiny) | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 1,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / 16).to(torch.bfloat16)

    from compressor.model.architecture import Architecture

    shapes = Architecture.from_config(config).tensors()
    tensors = {name: random(*shape) for name, shape in shapes}
    writer = CheckpointWriter(out)
    writer.write_shard(shard_name(0), tensors)
    writer.finish(config, tiny, 1)
    return out


@pytest.fixture(scope="module")
def importance(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    generator = torch.Generator().manual_seed(4)
    reader = CheckpointReader(wide)
    found = {
        name.removesuffix(".weight"): Importance(
            torch.rand(reader.shape(name)[1], generator=generator) + 0.1, 512
        )
        for name in reader
        if "_proj." in name
    }
    write_imatrix(folder / "imatrix.gguf", found, dataset="random", chunk=256)
    gguf.write(Source(wide, {}, 1, "llama-quantize"), folder)
    return folder


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_type_is_read_as_llama_cpp_reads_it(
    wide: Path, importance: Path, tmp_path: Path, program: Path, kind: Any
) -> None:
    """Its own unpacking (requantizing to F32) against ours, weight by weight, to the last bit."""
    dense, out = importance / gguf.FILE, tmp_path / kind
    out.mkdir()
    llama_quantize.quantize(
        program, dense, out / gguf.FILE, kind, importance=importance / "imatrix.gguf"
    )
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    llama("quantize", "--allow-requantize", out / gguf.FILE, unpacked / gguf.FILE, "F32", 1)
    ours, theirs = dict(gguf.read(out)), dict(gguf.read(unpacked))
    assert set(ours) == set(theirs) == set(CheckpointReader(wide))
    for name, value in ours.items():
        assert torch.equal(value.float(), theirs[name].float()), name
    error = relative_error(out, wide)
    assert 0.002 < error < 0.6
    shapes = [(t.shape, n == "model.embed_tokens.weight") for n, t in ours.items() if t.ndim == 2]
    whole = sum(t.n_bytes for t in library.GGUFReader(out / gguf.FILE).tensors if len(t.shape) == 2)
    assert estimated_bytes(kind, shapes) == pytest.approx(whole, rel=0.25)  # type: ignore[arg-type]


def test_the_importance_matrix_is_used(
    wide: Path, importance: Path, tmp_path: Path, program: Path
) -> None:
    """Errors move to the inputs that matter less: by more than chance in nearly all matrices."""
    errors = {}
    for name, weighed in (("with", importance / "imatrix.gguf"), ("without", None)):
        out = tmp_path / name
        out.mkdir()
        llama_quantize.quantize(
            program, importance / gguf.FILE, out / gguf.FILE, "Q2_K", importance=weighed
        )
        errors[name] = dict(gguf.read(out))
    dense = CheckpointReader(wide)
    squares = {
        tensor.name: np.array(tensor.data).reshape(-1)
        for tensor in library.GGUFReader(importance / "imatrix.gguf").tensors
    }
    better = total = 0
    for name in dense:
        if "_proj." in name:
            weight = torch.from_numpy(squares[f"{gguf.gguf_name(name)}.in_sum2"].copy())
            loss = {
                key: float(((tensors[name].float() - dense[name].float()).square() * weight).sum())
                for key, tensors in errors.items()
            }
            better, total = better + (loss["with"] < loss["without"]), total + 1
    assert total == 56
    assert better > 50


@pytest.fixture(scope="module")
def typed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The original, Q4_K_M and IQ3_XXS of the built-in model, by recipe."""
    os.environ[llama_quantize.VARIABLE] = str(BUILT / "bin" / llama_quantize.PROGRAM)
    recipe = (
        "calibration: {samples: 16, length: 256}\nstages: []\n"
        + EVALUATE.replace("TEXT", str(text))
        + "export: [{format: gguf}, {format: gguf, type: Q4_K_M}, {format: gguf, type: IQ3_XXS}]\n"
    )
    return compressed(tmp_path_factory.mktemp("typed"), recipe)


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ3_XXS"])
def test_what_the_report_says_is_what_llama_cpp_computes(
    typed: tuple[Path, Report], text: Path, tmp_path: Path, kind: str
) -> None:
    """llama.cpp rounds activations to 8 bits for the rounded file: 0.3 per cent, 0.0005 nats."""
    folder, report = typed
    ours = report.evaluations[f"gguf-{kind}"].overall
    dense = folder / "deliverable" / "gguf" / gguf.FILE
    file = folder / "deliverable" / f"gguf-{kind}" / gguf.FILE
    found = divergence(dense, file, text, LENGTH, tmp_path)
    assert ours.perplexity is not None
    assert ours.divergence is not None
    assert found["ours"] == pytest.approx(ours.perplexity.value, rel=0.003)
    assert found["kl"] == pytest.approx(ours.divergence.mean.value, rel=0.02, abs=0.0005)
    assert found["kl"] > 0.002  # so that the dense weights would not pass


def test_where_256_does_not_divide_other_blocks_are_told(typed: tuple[Path, Report]) -> None:
    _, report = typed
    told = {(item.variant, item.action) for item in report.fallbacks}
    stored = {
        ("gguf-Q4_K_M", "llama-quantize stored them as Q5_0"),
        ("gguf-IQ3_XXS", "llama-quantize stored them as IQ4_NL"),
    }
    assert stored <= told
    (row,) = [variant for variant in report.variants if variant.id == "gguf-Q4_K_M"]
    assert row.stage is not None
    assert re.fullmatch(r"llama-quantize \d.*", row.stage.params["quantizer"])


# ---------------------------------------------------------------------- pruned shapes


@pytest.mark.parametrize(
    "stage",
    [
        "{method: prune.depth, ratio: 0.15}",
        "{method: prune.width, ratio: 0.1}",
        "{method: prune.obs, ratio: 0.1}",
    ],
)
def test_pruned_models_compute_what_was_measured(tmp_path: Path, text: Path, stage: str) -> None:
    recipe = (
        "calibration: {samples: 8, length: 128}\n"
        f"stages:\n  - {stage}\n  - {{method: quantize.rtn, bits: 4, group_size: 32}}\n"
        + EVALUATE.replace("TEXT", str(text))
        + "export: [{format: gguf, engines: [llama.cpp]}]\n"
    )
    folder, report = compressed(tmp_path, recipe)
    (last,) = (folder / "stages").glob("02-*")
    assert read_config(last) != read_config(builtin_model("tiny"))
    gguf.write(Source(builtin_model("tiny"), {}, 1, "gguf"), tmp_path / "base")
    file = folder / "deliverable" / "gguf" / gguf.FILE
    found = divergence(tmp_path / "base" / gguf.FILE, file, text, LENGTH, tmp_path)
    ours = report.evaluations[report.headline].overall
    assert ours.perplexity is not None
    assert ours.divergence is not None
    assert found["ours"] == pytest.approx(ours.perplexity.value, rel=0.003)
    assert found["kl"] == pytest.approx(ours.divergence.mean.value, rel=0.02)


# ---------------------------------------------------------------------- a chat


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="tools/build_smollm2.py builds it")
def test_a_chat_is_asked_and_answered_as_in_transformers(tmp_path: Path) -> None:
    """Template, special tokens and the end of an answer are those of the file alone."""
    gguf.write(Source(SMOLLM2, {}, 1, "gguf"), tmp_path)
    question, tokens = "What is the capital of France?", 12
    tokenizer, model = load_tokenizer(SMOLLM2), load_model(SMOLLM2, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    chat = ("-p", question, "-n", tokens, "-st", "--jinja", "--no-warmup", *GREEDY)
    said = llama("completion", "-m", tmp_path / gguf.FILE, *chat).stdout
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "named SmolLM" in expected  # the template's own system prompt
    assert said.replace("[end of text]", "").split() == expected.split()
