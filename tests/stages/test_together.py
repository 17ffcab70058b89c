"""Experts that are alike are rounded as a batch: the result is what it is one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.errors import NumericalError
from compressor.formats.codes import codes_name, read_codes
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture, solving_bytes
from compressor.model.files import read_config
from compressor.stages import rounding
from compressor.stages.moments import Moments
from compressor.stages.quantize_autoround import QuantizeAutoround
from compressor.stages.quantize_base import RounderConfig
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.stages.solving import compensated
from compressor.types import BlockRecord, StageResult, TokenBatch, WeightScheme
from tests.helpers import Killed, stage_context
from tests.model.conftest import build

EXPERTS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    build("mixtral", torch.bfloat16, num_local_experts=EXPERTS).save_pretrained(folder)
    return folder


def text(tokens: int) -> CalibrationSet:
    ids = torch.randint(3, 96, (4, tokens), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",) * 4)
    return CalibrationSet((batch,), (), {"prose": ids.numel()}, "")


def gptq(**options: Any) -> QuantizeGptq:
    return QuantizeGptq(**({"bits": 4, "group_size": 16, "precision": "float32"} | options))


def run(
    stage: RounderConfig, model: Path, folder: Path, tokens: int = 48, **more: Any
) -> StageResult:
    return stage.run(model, text(tokens), stage_context(folder, **more))


def checkpoint(result: StageResult) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(result.checkpoint.iterdir())}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs were solved together, in turn."""
    seen: list[int] = []
    solve = rounding._solve_together
    monkeypatch.setattr(
        rounding,
        "_solve_together",
        lambda job, block, members, moments: (
            seen.append(len(members)),
            solve(job, block, members, moments),
        )[1],
    )
    return seen


STAGES = {
    "gptq": gptq(),
    "asymmetric": gptq(bits=3, symmetry="asymmetric", grid="neuqi", shrinkage=0.1),
    "by block": gptq(sequential="block", act_order=False, sweeps=0, symmetry="full_range"),
    "nvfp4": QuantizeGptq(weights="nvfp4", precision="float32"),
    "rtn": QuantizeRtn(bits=4, group_size=16, grid="imatrix"),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_together_or_one_by_one_the_result_is_the_same(
    stage: RounderConfig,
    model: Path,
    tmp_path: Path,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = run(stage, model, tmp_path / "together")
    assert max(batches) == EXPERTS
    batches.clear()
    monkeypatch.setattr(rounding, "SOLVED_AT_ONCE", 1)
    alone = run(stage, model, tmp_path / "alone")
    assert set(batches) == {1}
    assert checkpoint(together) == checkpoint(alone)
    assert together.fallbacks == alone.fallbacks
    assert [one.module for one in together.metrics] == [one.module for one in alone.metrics]
    for one, other in zip(together.metrics, alone.metrics, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.baseline_loss == pytest.approx(other.baseline_loss, rel=1e-4)


def test_a_batch_is_as_large_as_memory_allows(
    model: Path, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = Architecture.from_config(read_config(model))
    largest = max(
        solving_bytes(group) for group in architecture.groups(0).values() if group[0].expert == 0
    )
    monkeypatch.setattr(rounding, "SOLVED_AT_ONCE", 4 * largest)
    run(gptq(), model, tmp_path / "out")
    assert 4 in batches
    assert EXPERTS not in batches[: batches.index(4)]


def test_experts_without_tokens_are_left_out_of_the_batch(
    model: Path, tmp_path: Path, batches: list[int]
) -> None:
    result = run(gptq(), model, tmp_path / "out", tokens=1)
    unreached = {one.module for one in result.fallbacks if "no calibration token" in one.reason}
    assert unreached
    assert all(one.action == "rounded to nearest" for one in result.fallbacks)
    assert 1 < max(batches) < EXPERTS
    assert len(result.metrics) == 2 * (4 + 3 * EXPERTS)


def test_an_interrupted_stage_goes_on_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    whole = run(gptq(), model, tmp_path / "whole")
    records: list[BlockRecord] = []

    def die(record: BlockRecord) -> None:
        records.append(record)
        raise Killed

    with pytest.raises(Killed):
        run(gptq(), model, tmp_path / "parts", block_done=die)
    resumed = run(gptq(), model, tmp_path / "parts", finished=tuple(records))
    assert checkpoint(resumed) == checkpoint(whole)
    assert resumed.metrics == whole.metrics


def test_learned_codes_of_experts_go_to_their_own_matrices(model: Path, tmp_path: Path) -> None:
    stage = QuantizeAutoround(bits=4, group_size=16, grid="minmax", steps=2)
    learned = run(stage, model, tmp_path / "out")
    codes = read_codes(learned.checkpoint / codes_name(0))
    dense = CheckpointReader(learned.checkpoint)
    assert len(codes) == 4 + 3 * EXPERTS
    for module, quantized in codes.items():
        assert torch.equal(dense[f"{module}.weight"], quantized.dequantize())
    assert all(metric.loss < 2 * metric.baseline_loss for metric in learned.metrics)


def moments() -> tuple[Tensor, Moments]:
    """Of three experts; that of the second cannot be factorised, that of the third with effort."""
    random = torch.Generator().manual_seed(0)
    hessian = torch.eye(32).repeat(3, 1, 1)
    for member, product in ((1, 5.0), (2, 1.3)):
        hessian[member, 0, 1] = hessian[member, 1, 0] = product
    return torch.randn(3, 8, 32, generator=random), Moments(hessian)


def test_every_member_has_its_own_fallback() -> None:
    weight, together = moments()
    solve, scheme = compensated(gptq()), WeightScheme(4, 16)
    first, second = solve([weight, -weight], [scheme] * 2, together, torch.bfloat16)
    assert first.fallbacks == second.fallbacks
    assert {place: action for place, (_, action) in first.fallbacks.items()} == {
        1: "rounded to nearest",
        2: "damping raised to 1",
    }
    for i, member in enumerate(first.qtensor.members()):
        (alone,) = solve([weight[i]], [scheme], Moments(together.hessian[i]), torch.bfloat16)
        assert torch.equal(member.codes, alone.qtensor.codes)
        assert alone.fallbacks.get(0) == first.fallbacks.get(i)


def test_a_member_that_fails_stops_the_run_if_asked_to() -> None:
    weight, together = moments()
    solve = compensated(gptq(on_failure="stop"))
    with pytest.raises(NumericalError, match="positive definite"):
        solve([weight], [WeightScheme(4, 16)], together, torch.bfloat16)
