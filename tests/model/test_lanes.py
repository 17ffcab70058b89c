"""Forwards side by side: what they report and leave is what one after another would give."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.calibration import CalibrationSet
from compressor.model.block import Block
from compressor.model.lanes import Lanes
from compressor.model.parking import ParkingLot
from compressor.model.walk import BlockWalk
from compressor.numerics.rtn import rtn
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.types import TokenBatch, WeightScheme
from tests.helpers import stage_context
from tests.model.conftest import VARIANTS
from tests.model.test_passage import groups_of
from tests.model.test_walk import BATCHES, Checkpoints

MANY = [*BATCHES, *BATCHES, BATCHES[0]]


def side_by_side(walk: BlockWalk) -> list[Tensor]:
    """Every input of a model whose matrices are rounded one group after the other, and the end."""
    seen: list[Tensor] = []

    for block in walk.blocks():
        for group, names in groups_of(block).items():

            def run(batch: int, block: Block = block, group: str = group) -> list[Tensor]:
                own: list[Tensor] = []
                block.capture(lambda _, rows, __: own.append(rows.clone()), [group], [batch])
                return own

            for own in walk.lanes.each(run, range(len(MANY))):
                seen += own
            for matrix in map(block.matrix, names):
                scheme = WeightScheme(8, None, "symmetric")
                matrix.set_weight(rtn(matrix.weight.float(), scheme).dequantize())
        block.save_outputs()
    return [*seen, *walk.final_hidden()]


@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lanes_change_nothing(
    variant: str, parks: bool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    results = [
        side_by_side(
            BlockWalk(
                checkpoints(variant), MANY, scratch=tmp_path / str(count), parks=parks,
                lanes=Lanes(count),
            )
        )
        for count in (1, 2, 3)
    ]  # fmt: skip
    for found in results[1:]:
        assert len(found) == len(results[0])
        assert all(map(torch.equal, found, results[0]))
    assert torch.get_num_threads() == before


def test_a_weight_is_that_of_all_lanes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Also one that changes when forwards have passed it: they are run anew, each in its lane."""
    lanes = Lanes(2)
    walk = BlockWalk(checkpoints("llama"), MANY, scratch=tmp_path / "two", lanes=lanes)
    block = next(walk.blocks())
    weights = lanes.each(lambda _: next(block.module.parameters()).data_ptr(), range(2))
    assert len(set(weights)) == 1
    list(lanes.each(lambda batch: block.capture(lambda *_: None, ["model.layers.0.mlp.out"],
                                                [batch]), range(len(MANY))))  # fmt: skip
    assert [sorted(standing) for standing in block._standing] == [[0, 2, 4], [1, 3]]
    query = block.matrix("model.layers.0.self_attn.q_proj")
    query.set_weight(query.weight * 2)
    assert not any(block._standing)
    block.forward()

    single = next(BlockWalk(checkpoints("llama"), MANY, scratch=tmp_path / "one").blocks())
    query = single.matrix("model.layers.0.self_attn.q_proj")
    query.set_weight(query.weight * 2)
    single.forward()
    assert all(map(torch.equal, block.outputs, single.outputs))


def test_lanes_run_at_the_same_time_and_each_in_its_thread() -> None:
    lanes, meeting = Lanes(2), threading.Barrier(2, timeout=20)

    def task(batch: int) -> tuple[int, int, int]:
        if batch < 4:  # the last one is alone
            meeting.wait()
        return lanes.here, threading.get_ident(), torch.get_num_threads()

    found = list(lanes.each(task, range(5)))
    assert [lane for lane, _, _ in found] == [0, 1, 0, 1, 0]
    assert len({thread for _, thread, _ in found} - {threading.get_ident()}) == 2
    assert {threads for _, _, threads in found} == {max(1, torch.get_num_threads() // 2)}
    assert lanes.here == 0
    assert lanes.on(1, lambda: (lanes.here, lanes.on(1, lambda: lanes.here))) == (1, 1)


def test_what_fails_in_a_lane_is_raised_and_the_lanes_go_on(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    lanes, before = Lanes(2), torch.get_num_threads()

    def task(batch: int) -> int:
        if batch == 1:
            raise KeyError("in lane 1")
        return batch

    with pytest.raises(KeyError, match="in lane 1"):
        list(lanes.each(task, range(4)))
    assert torch.get_num_threads() == before
    assert list(lanes.each(task, (0, 2, 3))) == [0, 2, 3]
    walk = BlockWalk(checkpoints("llama"), MANY, scratch=tmp_path, lanes=lanes)
    block = next(walk.blocks())
    with pytest.raises(ValueError, match="batch 0 comes next, not 2"):
        block.capture(lambda *_: None, batches=[2], onward=True)


def test_threads_end_with_their_lanes() -> None:
    before = threading.active_count()
    lanes = Lanes(2)
    list(lanes.each(lambda batch: batch, range(2)))
    running = [thread for pool in lanes._threads for thread in pool._threads]
    assert threading.active_count() == before + 2
    del lanes
    gc.collect()
    for thread in running:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in running)


def test_an_accelerator_has_one_lane() -> None:
    assert Lanes.of(torch.device("cuda")).count == 1
    assert Lanes.of(torch.device("cpu")).count == min(2, torch.get_num_threads())


@pytest.mark.parametrize("options", [{}, {"sequential": "block"}])
def test_gptq_leaves_the_same_bytes_in_two_lanes(
    options: dict[str, object], checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first run has one lane; both take one thread for each operation."""
    monkeypatch.setattr("compressor.model.walk.ROOM_BESIDE_PARKED", 0)
    ids = torch.randint(96, (10, 16), generator=torch.Generator().manual_seed(2))
    batches = tuple(
        TokenBatch(part, torch.ones_like(part, dtype=torch.bool), (name,) * len(part))
        for part, name in zip(
            ids.split(2), ["prose", "code", "prose", "code", "prose"], strict=True
        )
    )
    text = CalibrationSet(batches[:3], batches[3:], {}, "")
    stage = QuantizeGptq(bits=3, group_size=16, **options)  # type: ignore[arg-type]
    parked: set[int] = set()
    park = ParkingLot.park
    monkeypatch.setattr(
        ParkingLot, "park", lambda lot, storage: (parked.add(id(lot)), park(lot, storage))[1]
    )
    for count in (1, 2):
        monkeypatch.setattr(Lanes, "of", lambda _, count=count: Lanes(count))
        stage.run(checkpoints("llama"), text, stage_context(tmp_path / str(count)))
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in "12"
    ]
    assert files[0] == files[1] != {}
    assert len(parked) >= 3 or options == {"sequential": "block"}
