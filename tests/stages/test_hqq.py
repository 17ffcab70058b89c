"""`quantize.hqq`: what its plan refuses, and what its run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.formats.codes import CodesReader
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.stages.quantize_hqq import QuantizeHqq
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.verify import verify_tensors
from tests.runs import TINY
from tests.stages.test_rounding import checkpoint, stage_run


def problems(**options: Any) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    stage = QuantizeHqq(**options)
    stage.plan(Architecture.from_config(TINY), lambda place, said, _: found.append((place, said)))
    return found


def test_a_plain_stage_has_nothing_wrong_and_zero_points() -> None:
    assert problems() == []
    assert QuantizeHqq().label == "HQQ W4 g64 asym"
    assert QuantizeHqq().calibration_need() is None


@pytest.mark.parametrize(
    ("options", "place", "said"),
    [
        ({"bits": 2}, "bits", "ruins a model"),
        ({"overrides": [{"pattern": "down", "bits": 2}]}, "overrides.0.bits", "ruins a model"),
        ({"group_size": "channel"}, "group_size", "loses to plain rounding"),
        ({"weights": "mxfp4"}, "method", "not to floats"),
        ({"group_size": 48}, "group_size", "do not divide"),
    ],
)
def test_what_ruins_a_model_is_refused(options: dict[str, Any], place: str, said: str) -> None:
    found = problems(**options)
    assert place in [where for where, _ in found]
    assert any(said in sentence for _, sentence in found)


def test_force_lets_2_bits_and_channels_through() -> None:
    assert problems(bits=2, group_size="channel", force=True) == []


def test_a_run_leaves_codes_of_a_smaller_objective(tmp_path: Path) -> None:
    parent = checkpoint(tmp_path / "parent")
    options = {"group_size": 16, "symmetry": "asymmetric"}
    result, records = stage_run(QuantizeHqq(**options), parent, tmp_path / "out")
    plain, _ = stage_run(QuantizeRtn(**options, grid="minmax"), parent, tmp_path / "plain")
    assert len(records) == 2
    assert result.changed == plain.changed
    assert result.fallbacks == ()
    verify_tensors(parent, tmp_path / "out", result.changed)
    weights, codes = CheckpointReader(parent), CodesReader(tmp_path / "out")
    baseline = CodesReader(tmp_path / "plain")
    assert len(codes) == 14
    for module, rounded in codes.items():
        weight = weights[f"{module}.weight"].float()
        errors = [
            (weight - one.dequantize().float()).abs().pow(0.7).sum()
            for one in (rounded, baseline[module])
        ]
        assert errors[0] < errors[1]
        assert torch.equal(
            CheckpointReader(tmp_path / "out")[f"{module}.weight"], rounded.dequantize()
        )
