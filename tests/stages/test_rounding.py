"""The loop that rounders share: what counts as changed, and what was not done as asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.formats.codes import codes_name, read_codes
from compressor.model.architecture import Architecture
from compressor.resources import builtin_model
from compressor.stages.quantize_base import RounderConfig
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.quantize_rtn import QuantizeRtn
from compressor.types import BlockRecord, StageResult, TokenBatch
from compressor.verify import verify_tensors
from tests.helpers import stage_context
from tests.runs import SMALL, run

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QUERY = "model.layers.0.self_attn.q_proj"
Edit = Callable[[dict[str, Tensor]], None]


def checkpoint(folder: Path, edit: Edit = lambda _: None) -> Path:
    """A small random model."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=random) / 8).bfloat16()
        for name, shape in Architecture.from_config(CONFIG).tensors()
    }
    edit(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def on_grid(shape: torch.Size) -> Tensor:
    """Codes of 4 bits times the scale that `minmax` finds: every group holds both extremes."""
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(1))
    codes[:, ::16], codes[:, 1::16] = 7, -8
    return (codes / 64).bfloat16()


def stage_run(
    stage: RounderConfig, parent: Path, out: Path, rows: int = 4
) -> tuple[StageResult, list[BlockRecord]]:
    """Of four rows of text, so many in a batch."""
    records: list[BlockRecord] = []
    context = stage_context(out, block_done=records.append)
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(2))
    batches = tuple(
        TokenBatch(part, torch.ones_like(part, dtype=torch.bool), ("prose",) * len(part))
        for part in ids.split(rows)
    )
    return stage.run(parent, CalibrationSet(batches, (), {}, ""), context), records


STAGES = [
    QuantizeRtn(group_size=16, grid="minmax", symmetry="asymmetric"),
    QuantizeGptq(group_size=16, grid="minmax", symmetry="asymmetric"),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.method)
@pytest.mark.parametrize("same", [on_grid, torch.zeros], ids=["grid", "zero"])
def test_what_lies_on_the_grid_stays_and_is_reported(
    stage: RounderConfig, same: Callable[[torch.Size], Tensor], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = f"{QUERY}.weight"
        tensors[name] = same(tensors[name].shape).bfloat16()

    parent = checkpoint(tmp_path / "parent", edit)
    result, _ = stage_run(stage, parent, tmp_path / "out")
    assert [fallback.module for fallback in result.fallbacks] == [QUERY]
    assert "on the grid already" in result.fallbacks[0].reason
    assert len(result.metrics) == 14
    assert set(result.changed) == {f"{m.module}.weight" for m in result.metrics} - {
        f"{QUERY}.weight"
    }
    assert next(m.loss for m in result.metrics if m.module == QUERY) == 0
    verify_tensors(parent, tmp_path / "out", result.changed)


def test_how_text_is_batched_changes_only_the_order_of_sums(tmp_path: Path) -> None:
    parent = checkpoint(tmp_path / "parent")
    stage = QuantizeGptq(group_size=16, precision="float32")
    together, apart = (
        [metric.loss for metric in stage_run(stage, parent, tmp_path / str(rows), rows)[0].metrics]
        for rows in (4, 1)
    )
    assert len(together) == 14
    assert min(together) > 0
    assert apart == pytest.approx(together, rel=0.02)
    other = stage_run(stage.model_copy(update={"damping": 0.5}), parent, tmp_path / "other")[0]
    assert [metric.loss for metric in other.metrics] != pytest.approx(together, rel=0.02)


def test_an_embedding_on_its_grid_stays(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    parent = checkpoint(tmp_path / "parent", lambda t: t.update({name: torch.zeros_like(t[name])}))
    stage = QuantizeRtn(group_size=16, embeddings="quantize")
    result, _ = stage_run(stage, parent, tmp_path / "out")
    assert [fallback.module for fallback in result.fallbacks] == ["model.embed_tokens"]
    assert name not in result.changed


def test_compensation_beats_rounding_in_every_layer(tmp_path: Path) -> None:
    result, records = stage_run(
        QuantizeGptq(bits=3, group_size=16, grid="minmax"),
        checkpoint(tmp_path / "parent"),
        tmp_path / "out",
    )
    assert [record.block for record in records] == [0, 1]
    assert not result.fallbacks
    for metric in result.metrics:
        assert 0 < metric.loss <= metric.baseline_loss, metric


def test_sublayers_see_what_was_rounded_before_them(tmp_path: Path) -> None:
    parent = checkpoint(tmp_path / "parent")
    losses = {}
    for order in ("block", "sublayer"):
        stage = QuantizeGptq(bits=3, group_size=16, sequential=order)
        result, _ = stage_run(stage, parent, tmp_path / order)
        losses[order] = {metric.module: metric.loss for metric in result.metrics}
    block, sublayer = losses["block"], losses["sublayer"]
    first = "model.layers.0"
    for same in ("q_proj", "k_proj", "v_proj"):  # nothing before them
        assert block[f"{first}.self_attn.{same}"] == sublayer[f"{first}.self_attn.{same}"]
    for later in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert block[f"{first}.{later}"] != sublayer[f"{first}.{later}"]


def test_how_a_run_is_measured_moves_no_code(tmp_path: Path) -> None:
    """Weights of fp16 are rounded as they are stored, also where bf16 is enough to measure them."""
    model = tmp_path / "model"
    shutil.copytree(builtin_model("tiny"), model)
    file, draws = model / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor * (1 + torch.randn(tensor.shape, generator=draws) / 256)).half()
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float16"}), encoding="utf-8")
    found = []
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        stage = "  - {method: quantize.rtn, bits: 8, group_size: 64}\n"
        text = (SMALL + stage).replace("evaluate: {", f"evaluate: {{dtype: {dtype}, ")
        done = run(folder, text, str(model))
        found.append(read_codes(max((done.folder / "stages").iterdir()) / codes_name(0)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])
