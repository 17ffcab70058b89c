"""`propagate`: two models in lockstep, on real activations, also when killed."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor import resources
from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.model.load import load_model, load_tokenizer
from compressor.numerics.rtn import rtn
from compressor.stages.context import StageContext
from compressor.stages.moments import Moments
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.rounding import Rounded, round_model
from compressor.types import StageResult, TokenBatch, WeightScheme
from tests.helpers import stage_context
from tests.model.conftest import build
from tests.test_resume import RECIPE, at_line, at_rename, attempt, events, result

TINY = resources.builtin_model("tiny")


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    config = CalibrationConfig(samples=6, length=64, batch_size=2)
    return build_batches(config, load_tokenizer(TINY))


def context(folder: Path) -> StageContext:
    return stage_context(folder / "stage", scratch=folder / "scratch")


def stage(**options: Any) -> QuantizeGptq:
    quick = {"bits": 3, "group_size": 64, "grid": "minmax", "sweeps": 0, "sequential": "sublayer"}
    return QuantizeGptq(**(quick | options))


def entering(model: Any, path: str, batches: Sequence[TokenBatch]) -> Tensor:
    """What enters a module of a whole model, valid tokens only, [tokens, in]."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        for batch in batches:
            model(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
    rows = [x[batch.mask] for x, batch in zip(seen, batches, strict=True)]
    return torch.cat(rows).double()


@pytest.mark.parametrize("sublayers", [False, True])
def test_moments_pair_the_parent_with_the_rounded_model(
    sublayers: bool, calibration: CalibrationSet, tmp_path: Path
) -> None:
    """Against whole models from transformers: the parent, and the checkpoint that came out."""
    seen: list[Moments] = []

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        assert moments is not None
        seen.append(moments)
        pairs = zip(weights, schemes, strict=True)
        return [Rounded(rtn(weight, scheme, scale_dtype=dtype)) for weight, scheme in pairs]

    found = round_model(
        stage(), solve, TINY, calibration.batches, context(tmp_path),
        sublayers=sublayers, reference=True,
    )  # fmt: skip
    before = load_model(TINY, dtype=torch.float32)
    after = load_model(found.checkpoint, dtype=torch.float32)
    # Four inputs a block. Those within a block have seen it rounded in `sublayers` only.
    paths = {8: "model.layers.2.self_attn.q_proj"}
    if sublayers:
        paths |= {7: "model.layers.1.mlp.down_proj", 9: "model.layers.2.self_attn.o_proj"}
    for place, path in paths.items():
        x, y = (entering(model, path, calibration.batches) for model in (before, after))
        hessian, drift = 2 / len(y) * y.T @ y, 2 / len(y) * (x - y).T @ y
        assert (x - y).norm() > 0.05 * x.norm()
        assert (seen[place].hessian - hessian).norm() < 1e-4 * hessian.norm()
        moment = seen[place].drift
        assert moment is not None
        assert (moment - drift).norm() < 1e-3 * drift.norm()
    first = seen[0].drift
    assert first is not None
    assert not first.any()  # nothing has been rounded before the first matrix


def checkpoint_bytes(outcome: StageResult) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(outcome.checkpoint.iterdir())}


def test_share_zero_is_plain_gptq_to_the_byte(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the parent is run beside: looking does not change what is rounded."""
    exact = stage(propagate=0, precision="float32")  # the dtype that `context` has
    plain = exact.run(TINY, calibration, context(tmp_path / "plain"))
    from compressor.stages import solving

    beside = round_model(
        stage(), solving.compensated(stage(propagate=0)), TINY, calibration.batches,
        context(tmp_path / "beside"), sublayers=True, reference=True,
    )  # fmt: skip
    assert checkpoint_bytes(plain) == checkpoint_bytes(beside)
    assert not (tmp_path / "plain" / "scratch" / "reference").exists()


def output_error(checkpoint: Path, batches: Sequence[TokenBatch]) -> float:
    """Squared distance of what leaves the last block from the original's, on its own text."""
    path = "model.norm"
    x, y = (
        entering(load_model(folder, dtype=torch.float32), path, batches)
        for folder in (TINY, checkpoint)
    )
    return float((x - y).square().sum() / x.square().sum())


def test_propagating_brings_the_output_closer(calibration: CalibrationSet, tmp_path: Path) -> None:
    errors = {}
    for share in (0.0, 0.5, 1.0):
        outcome = stage(propagate=share).run(TINY, calibration, context(tmp_path / str(share)))
        assert all(0 < m.loss <= m.baseline_loss for m in outcome.metrics)
        errors[share] = output_error(outcome.checkpoint, calibration.batches)
    assert errors[0.5] < 0.5 * errors[0.0]
    assert errors[1.0] < 0.8 * errors[0.5]


def test_routed_experts_keep_their_own_target(tmp_path: Path) -> None:
    """The streams may route a token differently; everything else of the block is paired."""
    build("mixtral", torch.bfloat16).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (4, 16), generator=generator)
    mask = torch.ones(4, 16, dtype=torch.bool)
    batches = (TokenBatch(ids, mask, ("prose",) * 4),)
    text = CalibrationSet(batches, (), {"prose": 64}, "")
    options = {"bits": 4, "group_size": 16, "propagate": 1.0, "shrinkage": 0.0}
    outcome = stage(**options).run(tmp_path / "model", text, context(tmp_path))
    assert outcome.metrics
    weights = {}
    for path in outcome.checkpoint.glob("*.safetensors"):
        weights |= load_file(path)
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


def test_experts_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four passes instead of two for every expert, and the same bytes."""
    from compressor.stages import rounding

    build("mixtral", torch.bfloat16).save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = (TokenBatch(ids, torch.ones(4, 16, dtype=torch.bool), ("prose",) * 4),)
    text = CalibrationSet(batches, (), {"prose": 64}, "")
    waves: list[int] = []
    measure = rounding._measure
    monkeypatch.setattr(
        rounding, "_measure", lambda *args: (waves.append(len(args[-1])), measure(*args))[1]
    )
    written = []
    for room, expected in ((1 << 30, [1, 1, 3, 3]), (1, [1] * 8)):
        monkeypatch.setattr(rounding, "MOMENTS_AT_ONCE", room)
        folder = tmp_path / str(room)
        outcome = stage(bits=4, group_size=16).run(tmp_path / "model", text, context(folder))
        assert waves == expected * 2
        waves.clear()
        written.append(checkpoint_bytes(outcome))
    assert written[0] == written[1]


KILLS: dict[str, tuple[Any, ...]] = {
    "the parent's activations are on disk, the rounded model's not": (
        at_rename, "/reference/inputs-00002/activations.json", "after"),
    "both are, the journal does not say so": (at_line, 0, "torn"),
}  # fmt: skip


def test_killed_within_a_block(tmp_path: Path) -> None:
    """Both streams go on from disk, and the bytes are those of a run that nothing interrupted."""
    recipe = RECIPE.replace("    bits: 4\n", "    bits: 4\n    propagate: 0.5\n    sweeps: 0\n")
    recipe = recipe[: recipe.index("export:")].replace("length: 64", "length: 16")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert attempt(tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    for name, (trap, place, moment) in KILLS.items():
        # An attempt begins with a line of its own; the second is that of block 1.
        line = len(events(folder)) + 2 if trap is at_line else place
        assert attempt(folder, trap, line, moment) == -signal.SIGKILL, name
        assert events(folder).count("block_done") == 1
    assert attempt(folder) == 0
    assert events(folder).count("block_done") == 4
    assert result(folder) == result(tmp_path / "whole")
