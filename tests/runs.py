"""Recipes that tests write, load, plan and run, most of them on the built-in model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.engine import RunOutcome, run_recipe
from compressor.errors import PlanError
from compressor.journal import Journal
from compressor.model.files import read_config
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe, load_recipe
from compressor.resources import builtin_model
from tests.model.conftest import build

TINY: dict[str, Any] = read_config(builtin_model("tiny"))
SMOL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
MIXTRAL: dict[str, Any] = {
    **{"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"vocab_size": 256, "num_local_experts": 2, "num_experts_per_tok": 1},
    **{"max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "bfloat16"},
}
SMALL = """\
calibration: {samples: 2, length: 64, batch_size: 2}
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
stages:
"""


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    """Write a recipe into a folder and load it."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def plan(folder: Path, text: str, config: dict[str, Any] = SMOL, *overrides: str) -> Plan:
    return make_plan(load(folder, text, *overrides), config, "the-model")


def refusals(folder: Path, text: str, config: dict[str, Any] = SMOL, *overrides: str) -> list[Any]:
    """What the plan says against a recipe, which it must refuse."""
    with pytest.raises(PlanError) as caught:
        plan(folder, text, config, *overrides)
    return list(caught.value.problems)


def run(folder: Path, text: str, model: str = "builtin:tiny") -> RunOutcome:
    """Run a recipe to `out` in a folder."""
    return run_recipe(load(folder, text), model, folder / "out")


# ---------------------------------------------------------------------- stages alone


def plan_stages(folder: Path, stages: str, config: dict[str, Any] = TINY) -> Plan:
    """Plan `SMALL` with these stages, and whatever keys follow them."""
    return plan(folder, SMALL + stages, config)


def refused(folder: Path, stages: str, config: dict[str, Any] = TINY) -> str:
    """What the plan says against them."""
    return "\n".join(map(str, refusals(folder, SMALL + stages, config)))


@dataclass(frozen=True)
class Ran:
    """A finished run with one deliverable, of this format."""

    outcome: RunOutcome
    form: str

    @property
    def folder(self) -> Path:
        return self.outcome.folder

    @property
    def stage(self) -> Path:
        """What the last stage left."""
        return max((self.folder / "stages").iterdir())

    @property
    def deliverable(self) -> Path:
        return self.folder / "deliverable" / self.form

    @property
    def exported(self) -> dict[str, Any]:
        found: dict[str, Any] = Journal(self.folder / "journal.jsonl").all("exported")[0]
        return found

    @property
    def kl(self) -> float:
        """To the base, mean, in nats per token."""
        divergence = self.outcome.report.evaluations[self.stage.name].overall.divergence
        assert divergence is not None
        return divergence.mean.value


def ran(
    folder: Path, stages: str, form: str = "compressed-tensors", model: str = "builtin:tiny"
) -> Ran:
    """Run `SMALL` with these stages, and whatever keys follow them."""
    return Ran(run(folder, SMALL + stages, model), form)


def power_of_two(folder: Path) -> Path:
    """A random model whose widths 128 divides, and which reads what the built-in model reads.

    What its blocks add is small beside the embedding, so that it survives being pruned.
    """
    made = build(
        "llama",
        torch.bfloat16,
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(4)
        for block in made.model.layers:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
    made.save_pretrained(folder)
    for path in builtin_model("tiny").glob("*token*"):
        shutil.copy(path, folder)
    return folder
