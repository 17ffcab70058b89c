"""SmolLM2-135M through the command line, as a user would compress it.

The model is built once into `cache/`; two runs and a comparison then take a few minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import build_smollm2

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "tools" / "build_smollm2.py"
CALIBRATION = {"calibration.samples": 16, "calibration.length": 256}
QUICK = {
    "evaluate.suite": "quick",
    "evaluate.documents": 4,
    "evaluate.noise_floor": "false",
    "gates.max_kl": 0.4,  # GPTQ gives 0.27 in this setting, rounding to nearest 0.65
}
LAYERS, HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 30, 576, 1536, 192, 49_152
SHAPES = (  # of the matrices of a block, [out, in]
    (HIDDEN, HIDDEN),
    (KEYS, HIDDEN),
    (KEYS, HIDDEN),
    (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
WEIGHTS = LAYERS * sum(out * inputs for out, inputs in SHAPES)
DENSE = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # tied embedding and norms
PROMPTS = (
    "The capital of France is",
    "Water is made of hydrogen and",
    "One, two, three, four, five,",
    "The opposite of hot is",
    "In the year 1969, the first man walked on the",
)


def compress(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def overrides(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="session")
def base() -> Path:
    """SmolLM2 in bf16 off its 4-bit grid, built again when the builder has changed."""
    folder = ROOT / "cache" / "SmolLM2-135M-Instruct"
    complete = folder / "README.md"  # the builder writes it last
    if not complete.exists() or complete.stat().st_mtime < BUILDER.stat().st_mtime:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, BUILDER, "--delattice", "--out", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def gptq(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished GPTQ run that passed its gate."""
    out = tmp_path_factory.mktemp("smollm2") / "gptq"
    options = overrides(CALIBRATION | QUICK)
    done = compress("recipes/w4-gptq.yaml", base, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def rtn(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that rounds to nearest, and fails the same gate."""
    out = tmp_path_factory.mktemp("smollm2") / "rtn"
    done = compress("recipes/w4-rtn.yaml", base, "-o", out, *overrides(QUICK))
    assert done.returncode == 4, done.stderr
    return out


@pytest.fixture(scope="session")
def deliverable(gptq: Path) -> Path:
    return gptq / "deliverable" / "compressed-tensors"


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def divergences(run: Path) -> dict[str, dict[str, Any]]:
    """KL from the base by domain, and over all."""
    found = report(run)
    evaluation = found["evaluations"][found["variants"][-1]["id"]]
    scores = {"overall": evaluation["overall"], **evaluation["domains"]}
    return {name: score["divergence"]["mean"] for name, score in scores.items()}


# ---------------------------------------------------------------------- the model


def test_the_base_is_off_the_grid_of_its_package(base: Path) -> None:
    with safe_open(base / "model.safetensors", "pt") as file:
        matrices = [name for name in file.keys() if "_proj" in name]  # noqa: SIM118
        assert len(matrices) == LAYERS * len(SHAPES)
        for name in matrices:
            groups = file.get_tensor(name).float().view(-1, 32).sort(dim=1).values
            distinct = 1 + (groups.diff(dim=1) != 0).sum(dim=1)
            assert (distinct > 16).float().mean() > 0.99, name


# ---------------------------------------------------------------------- plan and size


def test_the_plan_knows_the_size_by_formula(base: Path) -> None:
    done = compress("plan", "recipes/w4-gptq.yaml", base, "--format", "json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["family"] == "Llama"
    assert planned["parameters"] == WEIGHTS + DENSE == 134_515_008
    assert planned["base_bytes"] == 2 * (WEIGHTS + DENSE)
    (stage,) = planned["stages"]
    assert stage["matrices"] == LAYERS * len(SHAPES)
    assert stage["packed_bytes"] == formula()


def formula() -> int:
    """Codes, a bf16 scale for 64 weights, an int64 shape of two; the rest in bf16."""
    return WEIGHTS // 2 + WEIGHTS // 64 * 2 + LAYERS * len(SHAPES) * 16 + 2 * DENSE


def test_what_was_written_has_the_size_of_the_plan(gptq: Path, deliverable: Path) -> None:
    size = report(gptq)["variants"][-1]["size"]
    assert size["tensor_bytes"] == formula()
    assert size["bits_linear"] == pytest.approx(4 + 16 / 64)
    assert size["bits_checkpoint"] == pytest.approx(8 * formula() / (WEIGHTS + DENSE))
    files = [path for path in deliverable.iterdir() if path.name != "README.md"]
    assert size["bytes_on_disk"] == sum(path.stat().st_size for path in files)


# ---------------------------------------------------------------------- accuracy


def test_the_run_passes_its_gate_and_was_read_back(gptq: Path) -> None:
    found = report(gptq)
    assert found["verdict"] == "PASS"
    assert found["run"]["status"] == "finished"
    assert found["base"]["licence"] == "apache-2.0"
    variant = found["variants"][-1]
    assert variant["artifact"]["reload_ok"]
    assert variant["artifact"]["max_logit_difference"] == 0
    assert not variant["stage"]["fallbacks"]
    modules = variant["stage"]["metrics_per_module"]
    assert len(modules) == LAYERS * len(SHAPES)
    assert all(0 < module["loss"] < module["baseline_loss"] for module in modules)


def test_gptq_stays_closer_to_the_base_than_rounding_to_nearest(gptq: Path, rtn: Path) -> None:
    solved, rounded = divergences(gptq), divergences(rtn)
    assert 0.02 < solved["overall"]["value"] < 0.4
    assert solved["overall"]["high"] < rounded["overall"]["low"]
    for domain, estimate in solved.items():
        assert estimate["value"] < rounded[domain]["value"], domain
    assert report(rtn)["verdict"] == "FAIL"


def test_a_model_compared_with_itself_does_not_differ(base: Path) -> None:
    options = ("--suite", "quick", "--documents", 2, "--gate", "max_kl=1e-9")
    done = compress("compare", base, base, *options, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "PASS"
    overall = found["evaluations"][-1]["overall"]
    assert overall["divergence"]["flips"] == 0
    assert overall["divergence"]["maximum"] == 0
    assert overall["delta_bits_per_byte"]["value"] == 0


# ---------------------------------------------------------------------- use


@torch.no_grad()
def test_the_deliverable_continues_text_like_the_base(base: Path, deliverable: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(deliverable)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    compressed = AutoModelForCausalLM.from_pretrained(deliverable, dtype=torch.float32)
    same = total = 0
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        continued = original.generate(**encoded, max_new_tokens=8, do_sample=False)
        start = encoded["input_ids"].shape[1]
        choices = compressed(input_ids=continued).logits[0, start - 1 : -1].argmax(dim=-1)
        same += int((choices == continued[0, start:]).sum())
        total += len(choices)
    assert same / total > 0.6
    encoded = tokenizer(PROMPTS[0], return_tensors="pt")
    answer = compressed.generate(**encoded, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert build_smollm2.perplexity(compressed, tokenizer) < 1.3 * build_smollm2.PERPLEXITY


def test_the_deliverable_keeps_tokenizer_and_chat_template(base: Path, deliverable: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (deliverable / name).read_bytes() == (base / name).read_bytes(), name
    messages = [{"role": "user", "content": "Name 3 rivers."}]
    prompt = AutoTokenizer.from_pretrained(deliverable).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nName 3 rivers.<|im_end|>\n<|im_start|>assistant\n"
    )
