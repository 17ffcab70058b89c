"""Options: one that is only given another default keeps the words and rules of its parent's."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from compressor.stages.base import StageConfig, option, redefault
from compressor.stages.prune_dro import PruneDro
from compressor.stages.train_base import TrainConfig


class Parent(StageConfig):
    depth: int = option(3, "How deep.", effect="Deeper is slower.", source="a paper", ge=1, le=9)


class Child(Parent):
    method: Literal["child"] = "child"
    depth: int = redefault(Parent.model_fields["depth"], 5, effect="Slower here too.")


def described(config: type[BaseModel], name: str) -> dict[str, object]:
    return dict(config.model_json_schema()["properties"][name])


def test_another_default_leaves_words_and_rules() -> None:
    assert described(Child, "depth") == described(Parent, "depth") | {
        "default": 5,
        "effect": "Slower here too.",
    }
    assert described(Parent, "depth")["default"] == 3
    assert described(Parent, "depth")["effect"] == "Deeper is slower."


@pytest.mark.parametrize("depth", [0, 10])
def test_rules_of_the_parent_hold(depth: int) -> None:
    with pytest.raises(ValidationError, match="depth"):
        Child.model_validate({"depth": depth})


def test_robust_pruning_leans_by_default_with_the_options_of_training() -> None:
    for name, default in {"sampler": "dro", "reference": "forecast", "drift": True}.items():
        own, parent = described(PruneDro, name), described(TrainConfig, name)
        assert own["default"] == default != parent["default"]
        assert own["description"] == parent["description"]
        assert own.get("source") == parent.get("source")
