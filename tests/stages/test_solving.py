"""Grids of GPTQ on the inputs of a real model, judged on text that it was not calibrated on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compressor import resources
from compressor.calibration import CalibrationConfig, build_batches
from compressor.model.load import load_model, load_tokenizer
from compressor.numerics.gptq import factorize
from compressor.numerics.grid import fit_grid
from compressor.numerics.hessian import HessianAccumulator, relative_loss
from compressor.stages.moments import Moments
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.solving import compensated
from compressor.types import WeightScheme

Layers = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def layers() -> Layers:
    """Weight, moments of calibration text and of other text: every matrix of `builtin:tiny`."""
    folder = resources.builtin_model("tiny")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    sums: dict[tuple[str, int], HessianAccumulator] = {}
    half = 0

    def watch(name: str) -> Any:
        def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            sums.setdefault((name, half), HessianAccumulator(rows.shape[1])).add(rows)

        return count

    chosen = {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, module in chosen.items():
        module.register_forward_pre_hook(watch(name))
    text = build_batches(CalibrationConfig(mix="default", samples=32, length=256), tokenizer)
    with torch.inference_mode():
        for number, batch in enumerate(text.batches):
            half = number % 2
            model.model(batch.input_ids)
    return [
        (module.weight.detach().float(), sums[name, 0].matrix(), sums[name, 1].matrix())
        for name, module in chosen.items()
    ]


def unseen_loss(layers: Layers, grid: str) -> float:
    """Geometric mean over matrices of the share of output energy that is lost, 3 bits."""
    options = QuantizeGptq(bits=3, group_size=64, grid=grid, sweeps=0)  # type: ignore[arg-type]
    solve, scheme = compensated(options), WeightScheme(3, 64, "asymmetric")
    total = 0.0
    for weight, hessian, unseen in layers:
        (rounded,) = solve([weight], [scheme], Moments(hessian), torch.bfloat16)
        total += math.log(relative_loss(weight, rounded.qtensor.dequantize(), unseen))
    return math.exp(total / len(layers))


def test_the_default_grid_loses_least_on_other_text(layers: Layers) -> None:
    losses = {grid: unseen_loss(layers, grid) for grid in ("obs", "imatrix", "mse", "minmax")}
    assert QuantizeGptq().grid == "obs"
    assert min(losses, key=losses.__getitem__) == "obs"
    assert losses["obs"] < 0.99 * losses["imatrix"]
    assert losses["obs"] < 0.9 * losses["minmax"]


def test_obs_weighs_inputs_by_what_the_others_leave_of_an_error(layers: Layers) -> None:
    weight, hessian, _ = layers[0]
    scheme = WeightScheme(3, 64, "asymmetric")
    options = QuantizeGptq(bits=3, group_size=64, grid="obs", act_order=False)
    (rounded,) = compensated(options)([weight], [scheme], Moments(hessian), torch.bfloat16)
    factor = factorize(hessian, damping=options.damping, act_order=False)
    expected = fit_grid(
        weight, scheme, search="imatrix", importance=factor.curvature(), scale_dtype=torch.bfloat16
    )
    assert torch.equal(rounded.qtensor.scale, expected.scale)
    assert rounded.qtensor.zero_point is not None
    assert expected.zero_point is not None
    assert torch.equal(rounded.qtensor.zero_point, expected.zero_point)
