"""Every supported family, from a checkpoint to a deliverable, through the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compressor import resources
from compressor.cli import main
from compressor.engine import run_recipe
from compressor.errors import PlanError
from compressor.formats.codes import CodesReader
from compressor.formats.shards import CheckpointReader
from compressor.model.families import FAMILIES
from compressor.model.load import load_model
from compressor.model.walk import BlockWalk
from compressor.recipe import load_recipe
from compressor.stages import rounding
from compressor.types import TokenBatch
from compressor.verify import verify_tensors
from tests.model.conftest import build

RECIPE = """\
calibration: {samples: 2, length: 32, batch_size: 2}
stages:
  - method: quantize.gptq
    bits: 4
    group_size: 16
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false, batch_size: 16}
export:
  - format: EXPORT
"""
VARIANTS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
    "gpt_neox",
    "opt",
    "gpt2",
    "mixtral",
    "qwen3_moe",
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of the family in bf16, with a real tokenizer."""
    variant: str = request.param
    sizes = {"vocab_size": 4096, **({"n_inner": 64} if variant == "gpt2" else {})}
    folder = tmp_path / variant
    build(variant, torch.bfloat16, **sizes).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(resources.builtin_model("tiny") / name, folder)
    return folder


def recipe(folder: Path, export: str):
    path = folder.parent / f"{export}.yaml"
    path.write_text(RECIPE.replace("EXPORT", export))
    return load_recipe(path)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[BlockWalk]:
    """The walks that the rounder opens."""
    opened: list[BlockWalk] = []

    class Kept(BlockWalk):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            opened.append(self)

        def blocks(self, start: int = 0):
            yield from super().blocks(start)
            self.last = list(self.final_hidden())  # before the engine clears its scratch folder

    monkeypatch.setattr(rounding, "BlockWalk", Kept)
    return opened


def logits(checkpoint: Path, batch: TokenBatch, dtype: torch.dtype | None = None) -> torch.Tensor:
    with torch.inference_mode():
        model = load_model(checkpoint, dtype=dtype)
        return model(batch.input_ids, attention_mask=batch.mask).logits


def test_every_family_of_the_table_is_here() -> None:
    types = {build(variant).config.model_type for variant in VARIANTS}
    assert types == set(FAMILIES)


@pytest.mark.parametrize("model", VARIANTS, indirect=True)
def test_from_checkpoint_to_deliverable(model: Path, tmp_path: Path, walks) -> None:
    packed = model.name != "gpt2"
    form = "compressed-tensors" if packed else "dense"
    outcome = run_recipe(recipe(model, form), str(model), tmp_path / "run")
    stage = outcome.folder / "stages" / "01-quantize.gptq"
    deliverable = outcome.folder / "deliverable" / form

    facts = outcome.report.variants[1].stage
    assert facts is not None
    names = [f"{module.module}.weight" for module in facts.metrics_per_module]
    verify_tensors(model, stage, names)
    rounded = [matrix for matrix in _planned(model) if matrix.scheme is not None]
    assert {matrix.tensor for matrix in rounded} == set(names)
    codes, disk = CodesReader(stage), CheckpointReader(stage)
    for matrix in rounded:
        weight = disk[matrix.tensor].T if matrix.transposed_on_disk else disk[matrix.tensor]
        assert torch.equal(codes[matrix.name].dequantize(), weight), matrix.name
    assert all(0 < module.loss <= module.baseline_loss for module in facts.metrics_per_module)

    walk, _ = walks  # the second is the parent that runs beside
    batch = walk.batches[0]
    dense = logits(stage, batch)
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense, logits(deliverable, batch))
    own = walk.logits(walk.last[0])
    whole = logits(stage, batch, walk.dtype)
    near = 1e-4 if walk.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(own, whole, rtol=near, atol=near * float(whole.abs().max()))


def _planned(model: Path):
    from compressor.model.architecture import Architecture

    config = json.loads((model / "config.json").read_text())
    stage = recipe(model, "dense").stages[0]
    return stage.plan(Architecture.from_config(config), None).matrices


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_conv1d_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"Conv1D stored as \[in, out\]") as caught:
        run_recipe(recipe(model, "compressed-tensors"), str(model), tmp_path / "run")
    assert "export `dense`" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "strange"
    shutil.copytree(resources.builtin_model("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "retnet9"}))
    for command in ("run", "plan"):
        with pytest.raises(SystemExit) as caught:
            main([command, "quickstart", str(folder)])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert "retnet9" in message
        assert "Traceback" not in message
        for family in FAMILIES:
            assert family in message
