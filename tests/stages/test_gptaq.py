"""The option `gptaq`: what it excludes, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.formats.codes import codes_name, read_codes
from compressor.recipe import load_recipe
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.types import StageResult
from tests.runs import plan, refusals
from tests.stages.test_grids import recipe
from tests.stages.test_rounding import checkpoint, stage_run


def run(folder: Path, name: str, **options: Any) -> StageResult:
    parent = folder / "parent"
    if not parent.exists():
        checkpoint(parent)
    stage = QuantizeGptq(bits=3, group_size=16, grid="minmax", **options)
    return stage_run(stage, parent, folder / name)[0]


def test_propagate_gives_way_unless_it_is_written() -> None:
    assert QuantizeGptq().propagate == 0.5
    assert QuantizeGptq(gptaq=0.25).propagate == 0
    assert QuantizeGptq(gptaq=0.25, propagate=0.5).propagate == 0.5
    assert QuantizeGptq(gptaq=0).propagate == 0.5


def test_both_together_are_refused(tmp_path: Path) -> None:
    found = refusals(tmp_path, recipe("quantize.gptq", "gptaq: 0.25", "propagate: 0.5"))
    assert len(found) == 1
    assert "twice" in found[0].message
    assert "propagate: 0" in found[0].hint
    assert plan(tmp_path, recipe("quantize.gptq", "gptaq: 0.25", "propagate: 0"))
    assert plan(tmp_path, recipe("quantize.gptq", "gptaq: 0.25"))


def test_robust_is_refused(tmp_path: Path) -> None:
    found = refusals(tmp_path, recipe("quantize.gptq", "gptaq: 0.25", "robust: true"))
    assert "held-out text" in found[0].message


def test_a_written_out_recipe_is_itself(tmp_path: Path) -> None:
    """As in a lock, where every default stands."""
    stage = QuantizeGptq(gptaq=0.25)
    assert QuantizeGptq(**stage.model_dump()) == stage
    (tmp_path / "r.yaml").write_text(recipe("quantize.gptq", "gptaq: 0.25"), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml").stages[0].propagate == 0  # type: ignore[attr-defined]


def test_a_run_measures_drifts_and_uses_them(tmp_path: Path) -> None:
    """The first matrices see no drift yet: there, and only there, it is plain GPTQ."""
    plain = run(tmp_path, "plain", propagate=0.0)
    result = run(tmp_path, "gptaq", gptaq=1.0)
    run(tmp_path, "again", gptaq=1.0)
    assert not result.fallbacks
    assert {m.module for m in result.metrics} == {m.module for m in plain.metrics}
    assert all(0 < m.loss <= m.baseline_loss for m in result.metrics)
    codes = [
        {
            k: q
            for block in (0, 1)
            for k, q in read_codes(tmp_path / name / codes_name(block)).items()
        }
        for name in ("plain", "gptaq", "again")
    ]
    query, down = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(codes[0][query].codes, codes[1][query].codes)
    assert not torch.equal(codes[0][down].codes, codes[1][down].codes)
    assert all(torch.equal(q.codes, codes[2][module].codes) for module, q in codes[1].items())


def test_matrices_of_several_grids_keep_their_own_targets(tmp_path: Path) -> None:
    """q, k and v solved apart, each towards its own rows of the target."""
    together = run(tmp_path, "together", gptaq=1.0)
    apart = run(tmp_path, "apart", gptaq=1.0, overrides=({"pattern": "k", "bits": 4},))
    losses = [{m.module: m.loss for m in result.metrics} for result in (together, apart)]
    value = "model.layers.1.self_attn.v_proj"
    assert abs(losses[0][value] - losses[1][value]) < 0.25 * losses[0][value]
