"""Shipped recipes on a device that is not the processor: CUDA, or one that is played.

Run by tests/test_second_device.py in a process of its own, which the played device changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compressor import calibration, following, sessions
from compressor.decoding import measure
from compressor.recipe import load_recipe, shipped_recipes
from compressor.stages import distilling, masking
from tests.command import leave
from tests.place import report
from tests.runs import power_of_two

EVALUATION = ("suite=quick", "documents=1", "length=32", "resamples=100", "noise_floor=false")
CALIBRATION = ("samples=4", "length=32")
TRAINING = ("tokens=256", "windows=8", "length=32", "batch=4")
DRAFT = ("tokens=128", "length=16", "prompt=4", "steps=2", "prompts=1", "new_tokens=6", "drafted=2")
OTHERS = ("steps=4", "sweeps=1", "target_bpw=6")


def telling() -> list[str]:
    """Of all recipes those that together have every method, the longest first; on CUDA all."""
    if torch.cuda.is_available():
        return list(shipped_recipes())
    methods = {name: [one.method for one in load_recipe(name).stages] for name in shipped_recipes()}
    chosen: list[str] = []
    for name in sorted(methods, key=lambda name: (-len(methods[name]), name)):
        if not set(methods[name]) <= {method for one in chosen for method in methods[one]}:
            chosen.append(name)
    return chosen


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """CUDA where there is some."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from tests.second_device import second_device

    with pytest.MonkeyPatch.context() as patch, second_device() as played:
        for module in (sessions, following):
            patch.setattr(module, "default_device", lambda: played)
        patch.setattr(measure, "_ROUNDS", 1)  # of timing, which says nothing here
        patch.setattr(masking, "_FISHER_WINDOWS", 4)
        patch.setattr(distilling, "_HELD", 2)
        patch.setattr(calibration, "DEVELOPMENT_WINDOWS", 2)
        patch.setattr(calibration, "DEVELOPMENT_LENGTH", 16)
        yield played


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return power_of_two(tmp_path_factory.mktemp("model"))


def small(name: str) -> list[str]:
    """Options that make a recipe short."""
    recipe = load_recipe(name)
    chosen = [f"evaluate.{entry}" for entry in EVALUATION]
    if recipe.calibration is not None:
        chosen += [f"calibration.{entry}" for entry in CALIBRATION]
    for index, stage in enumerate(recipe.stages):
        entries = TRAINING if stage.method in ("prune.dro", "recover.distill") else OTHERS
        entries = DRAFT if stage.beside else entries
        known = [entry for entry in entries if entry.partition("=")[0] in type(stage).model_fields]
        chosen += [f"stages.{index}.{entry}" for entry in known]
    return [word for entry in chosen for word in ("--set", entry)]


@pytest.mark.parametrize("name", telling())
def test_a_recipe_runs_elsewhere(
    name: str, model: Path, device: torch.device, tmp_path: Path
) -> None:
    code = leave(name, str(model), "-o", str(tmp_path / "run"), "-q", *small(name))
    assert code in (0, 4, 5)
    assert device.type in report(tmp_path / "run")["env"]["device"]


@pytest.mark.parametrize(
    ("name", "option"),
    [("w4-rotate-gptq", "stages.0.learn=1"), ("w4-gptq", "stages.0.robust=true")],
)
def test_what_no_default_does_runs_elsewhere(
    name: str, option: str, model: Path, device: torch.device, tmp_path: Path
) -> None:
    chosen = [*small(name), "--set", option, "--set", "stages.0.bits=4"]
    assert leave(name, str(model), "-o", str(tmp_path / "run"), "-q", *chosen) in (0, 4, 5)
    assert device.type in report(tmp_path / "run")["env"]["device"]


def test_tensors_of_two_memories_do_not_mix(device: torch.device) -> None:
    far, near = torch.ones(3, 3, device=device), torch.ones(3, 3)
    assert (far @ far + 1).device.type == device.type
    assert torch.equal((far * torch.tensor(2.0)).cpu(), near * 2)  # a number may come from here
    assert far[torch.tensor([0, 2])].shape == (2, 3)  # and so may indices
    assert torch.equal(near.to(device).cpu(), near.copy_(far))
    refused = [
        lambda: far + near,
        lambda: near @ far,
        lambda: torch.cat([far, near]),
        lambda: near[far.long()],
        lambda: far.add_(near),
        lambda: torch.stack([far.sum(), near.sum()]),
        lambda: torch.rand(3, device=device, generator=torch.Generator()),
    ]
    for mix in refused:
        with pytest.raises((RuntimeError, IndexError)):
            mix()
    with pytest.raises((TypeError, RuntimeError)):
        far.numpy()


def test_gradients_stay_where_their_tensors_are(device: torch.device) -> None:
    far = torch.nn.Parameter(torch.ones(3, 3, device=device))
    (far @ far).sum().backward()
    assert far.grad is not None
    assert far.grad.device.type == device.type
    assert torch.equal(far.grad.cpu(), torch.full((3, 3), 6.0))
