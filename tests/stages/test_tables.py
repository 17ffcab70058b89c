"""What rounding an embedding or a head costs: predicted, and measured on the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor import resources
from compressor.calibration import CalibrationConfig, build_batches
from compressor.model.backward import Gradients
from compressor.model.load import load_model, load_tokenizer
from compressor.model.walk import BlockWalk
from compressor.numerics.rtn import rtn
from compressor.stages import tables
from compressor.stages.allocating import _start_back
from compressor.stages.tables import table_losses
from compressor.types import TokenBatch, WeightScheme

TINY = resources.builtin_model("tiny")
GRIDS = (None, WeightScheme(3, 32), WeightScheme(4, 64), WeightScheme(8, None))
TABLE = "model.embed_tokens"


@pytest.fixture(scope="module")
def batches() -> tuple[TokenBatch, ...]:
    config = CalibrationConfig(samples=8, length=128, batch_size=4)
    return tuple(build_batches(config, load_tokenizer(TINY)).batches)


def walked(batches: tuple[TokenBatch, ...], scratch: Path) -> BlockWalk:
    walk = BlockWalk(TINY, batches, scratch=scratch)
    _start_back(walk, seed=0)
    for index in reversed(range(walk.architecture.layers)):
        block = walk.kept(index)
        Gradients(walk).pass_through(block, lambda *_: None)
        walk.release(block)
    return walk


def divergence(batches: tuple[TokenBatch, ...], scheme: WeightScheme, *uses: str) -> float:
    """Mean KL in nats per token of the model with its table rounded in these uses."""
    model, changed = load_model(TINY).float(), load_model(TINY).float()
    table = model.get_input_embeddings().weight
    rounded = rtn(table.detach(), scheme, search="mse", scale_dtype=torch.bfloat16).dequantize()
    places = {"embed": changed.get_input_embeddings(), "head": changed.get_output_embeddings()}
    for use, module in places.items():
        module.weight = torch.nn.Parameter(rounded.float() if use in uses else table.detach())
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            before, after = (
                torch.log_softmax(m(batch.input_ids).logits[batch.mask].double(), -1)
                for m in (model, changed)
            )
            total += float((before.exp() * (before - after)).sum())
            count += int(batch.mask.sum())
    return total / count


@pytest.mark.parametrize("uses", [("embed", "head"), ("embed",), ("head",)])
def test_predicted_losses_are_near_the_measured_divergence(
    batches: tuple[TokenBatch, ...],
    tmp_path: Path,
    uses: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if len(uses) == 1:
        own = tables._drawn

        def drawn(*arguments: object) -> object:
            table = own(*arguments)  # type: ignore[arg-type]
            object.__setattr__(table, "uses", uses)
            return table

        monkeypatch.setattr(tables, "_drawn", drawn)
    walk = walked(batches, tmp_path)
    (losses,) = table_losses(walk, {TABLE: GRIDS}, batches, 64).values()
    assert losses[0] == 0
    for scheme, loss in zip(GRIDS[1:], losses[1:], strict=True):
        assert scheme is not None
        measured = divergence(batches, scheme, *uses)
        # At 3 bits the second order overstates.
        assert loss == pytest.approx(measured, rel=0.1 if scheme.bits > 3 else 0.5)
    assert losses[1:] == sorted(losses[1:], reverse=True)
