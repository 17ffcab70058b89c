"""Acceptance during training: when, fitted how, and kept over an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from compressor import resources
from compressor.decoding.cached import CachedModel
from compressor.decoding.probes import Probes, log_fit, probe_steps
from compressor.decoding.proposals import ModelDraft
from compressor.decoding.results import CurvePoint
from compressor.model.load import load_model, load_tokenizer


def test_probes_are_halvings_of_the_steps() -> None:
    assert probe_steps(200, 4) == (25, 50, 100, 200)
    assert probe_steps(3, 4) == (1, 2, 3)
    assert probe_steps(200, 0) == probe_steps(0, 4) == ()


def test_the_fit_finds_the_line_and_its_interval() -> None:
    exact = [CurvePoint(tokens=10**k, length=1 + 0.2 * k * math.log(10)) for k in range(2, 6)]
    found = log_fit(exact)
    assert found is not None
    assert found.slope == pytest.approx(0.2)
    assert found.intercept == pytest.approx(1.0)
    noisy = [
        point.model_copy(update={"length": point.length + shift})
        for point, shift in zip(exact, (0.1, -0.1, 0.05, -0.05), strict=True)
    ]
    found = log_fit(noisy)
    assert found is not None
    x = torch.tensor([math.log(point.tokens) for point in noisy], dtype=torch.float64)
    y = torch.tensor([point.length for point in noisy], dtype=torch.float64)
    rest = y - found.intercept - found.slope * x
    error = float((rest @ rest / 2 / ((x - x.mean()) @ (x - x.mean()))).sqrt())
    half = 4.302652729911275 * error  # Student's t, two degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.slope - half, found.slope + half))
    assert stats.t.ppf(0.975, 2) == pytest.approx(4.302652729911275)


def test_too_few_points_have_no_fit_or_no_interval() -> None:
    assert log_fit([CurvePoint(tokens=10, length=1.5)] * 3) is None
    two = log_fit([CurvePoint(tokens=10, length=1.5), CurvePoint(tokens=20, length=1.6)])
    assert two is not None
    assert (two.low, two.high) == (None, None)


def test_a_probe_on_disk_is_not_repeated(tmp_path: Path) -> None:
    folder = resources.builtin_model("tiny")
    model, made = load_model(folder, "cpu", torch.float32), []

    def probes() -> Probes:
        def draft() -> ModelDraft:
            made.append(1)
            return ModelDraft(CachedModel(model))

        return Probes(
            CachedModel(model), load_tokenizer(folder), draft, 3, (2, 4), tmp_path / "probes.json"
        )

    first = probes()
    assert first.curve(10.0) is None
    for step in range(3):
        first(step)
    assert json.loads((tmp_path / "probes.json").read_text()) == {"2": 4.0}  # its own draft
    again = probes()
    for step in range(5):
        again(step)
    assert len(made) == 2
    curve = again.curve(10.0)
    assert curve is not None
    assert [(point.tokens, point.length) for point in curve.points] == [(20, 4.0), (40, 4.0)]
