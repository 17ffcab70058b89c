"""Forwards that stand still: what they report and leave is what running anew would give."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor

from compressor.errors import ResourceError
from compressor.model import standing as standing_module
from compressor.model.block import Block
from compressor.model.parking import Parked, ParkingLot
from compressor.model.passage import Passage
from compressor.model.standing import Standing
from compressor.model.walk import BlockWalk
from tests.helpers import files_end_at
from tests.model.conftest import VARIANTS
from tests.model.test_walk import BATCHES, Checkpoints

AMPLE = 1 << 30


def counted(block: Block, runs: list[int]) -> None:
    run = block.run
    block.run = lambda batch: (runs.append(batch), run(batch))[1]  # type: ignore[method-assign]


def groups_of(block: Block) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for matrix in block.matrices:
        found.setdefault(matrix.info.input_group, []).append(matrix.info.name)
    return found


def disturb(block: Block, names: Sequence[str]) -> None:
    for name in names:
        matrix = block.matrix(name)
        matrix.set_weight(matrix.weight * 1.05)


def rounded(walk: BlockWalk, runs: list[int]) -> list[Tensor]:
    """Every input of a model whose matrices change one group after the other, and what leaves."""
    seen: list[Tensor] = []
    for block in walk.blocks():
        counted(block, runs)
        for group, names in groups_of(block).items():
            for batch in range(len(BATCHES)):
                block.capture(lambda _, rows, __: seen.append(rows.clone()), [group], [batch])
            disturb(block, names)
        block.save_outputs()
    return [*seen, *walk.final_hidden()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_standing_still_changes_nothing(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    runs: dict[int, list[int]] = {0: [], AMPLE: []}
    results = [
        rounded(
            BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path / str(b), memory_budget=b), r
        )
        for b, r in runs.items()
    ]
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    if VARIANTS[variant][0] not in ("mixtral", "qwen3_moe"):
        assert len(runs[AMPLE]) == 2 * len(BATCHES)  # one forward for each block and batch
        assert len(runs[0]) > len(runs[AMPLE])


def test_a_forward_that_used_what_changes_is_run_anew(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Also when the change is no matrix: nobody knows who has used a norm."""
    for index, name in enumerate(("self_attn.q_proj", "input_layernorm")):
        seen: list[Tensor] = []

        def keep(_: str, rows: Tensor, __: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(rows)

        for place in ("late", "early"):
            walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / f"{index}{place}")
            block = next(walk.blocks())
            tensor = f"model.layers.0.{name}.weight"
            if place == "late":
                block.capture(lambda *_: None, ["model.layers.0.mlp.in"])
            block.set_tensor(tensor, block.tensor(tensor) * 1.5)
            block.capture(keep, ["model.layers.0.mlp.out"])
            block.forward()
            seen += [block._outputs[batch] for batch in range(len(BATCHES))]
        late, early = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        assert all(torch.equal(x, y) for x, y in zip(late, early, strict=True)), name


def test_a_parent_runs_ahead_to_where_little_is_held(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    walks = [BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / s) for s in "ab"]
    plain, ahead = (next(walk.blocks()) for walk in walks)
    runs: list[int] = []
    counted(ahead, runs)
    groups = list(groups_of(ahead))
    stands = {}
    for group in groups:
        seen: dict[str, list[Tensor]] = {"plain": [], "ahead": []}
        for batch in range(len(BATCHES)):
            plain.capture(lambda _, x, __, s=seen: s["plain"].append(x), [group], [batch])
            ahead.capture(
                lambda _, x, __, s=seen: s["ahead"].append(x), [group], [batch],
                onward=group == groups[-1], ahead=True,
            )  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(*seen.values(), strict=True))
        stands[group.rpartition("0.")[2]] = {
            name.split(".")[-2] for p in ahead._standing[0].values() for name in p.passed
        }
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert stands == {
        "attention.in": set(), "attention.out": attention, "mlp.in": attention, "mlp.out": set(),
    }  # fmt: skip
    assert runs == list(range(len(BATCHES)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_still_in_a_file_changes_nothing(
    variant: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room in memory every forward is parked but the last, and none runs anew."""
    monkeypatch.setattr("compressor.model.walk.ROOM_BESIDE_PARKED", 0)
    parked: list[int] = []
    park = ParkingLot.park

    def counting(lot: ParkingLot, storage: torch.UntypedStorage) -> Parked:
        parked.append(storage.nbytes())
        return park(lot, storage)

    monkeypatch.setattr(ParkingLot, "park", counting)
    runs: list[int] = []
    plain = BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path / "plain")
    parking = BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path / "parking", parks=True)
    results = [rounded(plain, []), rounded(parking, runs)]
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert parked
    if VARIANTS[variant][0] not in ("mixtral", "qwen3_moe"):
        # In front of the first matrix nothing is done yet, so that it waits for nobody.
        assert len(runs) <= 2 * 2 * len(BATCHES)


def test_parked_forwards_hold_next_to_nothing(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of down_proj: its input, the residual stream and what was normed of it."""
    monkeypatch.setattr("compressor.model.walk.ROOM_BESIDE_PARKED", 0)
    walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path, parks=True)
    block = next(walk.blocks())
    reported: list[ref[Tensor]] = []
    block.capture(lambda _, x, __: reported.append(ref(x)), ["model.layers.0.mlp.out"])
    first, *_ = block._standing[0].values()
    assert first.is_parked
    assert reported[0]() is None  # nobody keeps what he was told, in a copy without padding
    tokens, width = BATCHES[0].mask.numel(), block.matrices[-1].info.shape
    sizes = [parked.size for parked in first._parked]
    assert 4 * tokens * width[1] in sizes  # what it stands right in front of
    assert sum(sizes) >= 4 * tokens * (width[1] + 2 * width[0])
    weights = {p.untyped_storage().data_ptr() for p in block.module.parameters()}
    assert all(p.storage.data_ptr() not in weights for p in first._parked)
    assert all(p.numel() and p.untyped_storage().nbytes() for p in block.module.parameters())


def test_a_full_disk_ends_a_walk_that_parks(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and what stands still unwinds with the walk."""
    monkeypatch.setattr("compressor.model.walk.ROOM_BESIDE_PARKED", 0)
    walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path, parks=True)
    block = next(walk.blocks())
    with files_end_at(16), pytest.raises(ResourceError, match=f"cannot write {tmp_path}: "):
        block.capture(lambda *_: None, ["model.layers.0.mlp.out"])
    assert block._standing[0]
    del block, walk
    gc.collect()


def test_a_parking_lot_gives_back_what_it_took(tmp_path: Path) -> None:
    lot = ParkingLot(tmp_path / "new")
    tensors = [torch.randn(size) for size in (1000, 10, 1000)]
    copies = [tensor.clone() for tensor in tensors]
    parked = [lot.park(tensor.untyped_storage()) for tensor in tensors]
    assert not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    for one in reversed(parked):
        lot.fetch(one)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    again = [lot.park(tensor.untyped_storage()) for tensor in tensors]
    assert {one.place for one in again} == {one.place for one in parked}  # places are used again
    assert not list((tmp_path / "new").iterdir())  # a file without a name goes with the process
    lot._opened().truncate(0)
    with pytest.raises(ResourceError, match="lost bytes"):
        lot.fetch(again[0])


@pytest.mark.parametrize("parks", [False, True])
def test_memory_goes_back_once_in_several_forwards(
    parks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted over all passes: how many stand at one time says nothing."""
    returned: list[int] = []
    monkeypatch.setattr(standing_module, "return_memory", lambda: returned.append(1))
    lot = ParkingLot(tmp_path) if parks else None
    standing = Standing(lambda _: 1, AMPLE, lot, lambda _: ())
    for _ in range(12):
        for batch in range(4):
            taken = standing.take(batch)
            if taken:
                taken.abandon()
            passage = Passage(lambda: torch.zeros(1))
            passage.passed.add("q_proj")
            standing.keep(batch, passage)
    standing.end(None)
    assert len(returned) == (6 if parks else 12)


def test_what_belongs_to_others_is_not_parked(tmp_path: Path) -> None:
    shared, own = torch.ones(4, 8), torch.ones(4, 8)

    def forward() -> Tensor:
        for tensor in (shared, own):
            passage.meet(tensor)
        passage.arrive("a", own)
        return own + shared

    passage = Passage(forward)
    passage.advance(lambda *_: False)
    passage.park(ParkingLot(tmp_path), {shared.untyped_storage().data_ptr()})
    assert (shared.untyped_storage().nbytes(), own.untyped_storage().nbytes()) == (128, 0)
    output = passage.advance()
    assert output is not None
    assert torch.equal(output, torch.full((4, 8), 2.0))


def test_a_full_budget_runs_anew(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Room for the first batch only; the second one gives way."""
    path = checkpoints("llama")
    probe = BlockWalk(path, BATCHES, scratch=tmp_path / "probe")
    room = BATCHES[0].mask.numel() * probe.bytes_standing(0)
    walk = BlockWalk(path, BATCHES, scratch=tmp_path / "walk", memory_budget=2 * room)
    block = next(walk.blocks())
    block.capture(lambda *_: None, ["model.layers.0.attention.in"])
    assert list(block._standing[0]) == [0]
    assert torch.is_grad_enabled()  # what stands still has its own state


def test_a_passage_stands_goes_on_and_unwinds() -> None:
    left: list[str] = []
    arrived: list[str] = []

    def forward() -> Tensor:
        try:
            for name in ("a", "b", "c"):
                passage.arrive(name, torch.zeros(1))
                arrived.append(name)
            return torch.ones(1)
        finally:
            left.append("left")

    passage = Passage(forward)
    assert passage.advance(lambda name, _: name == "a") is None
    assert passage.advance(lambda *_: False) is None
    assert arrived == ["a"]
    assert passage.passed == {"a"}
    output = passage.advance()
    assert output is not None
    assert (arrived, left) == (["a", "b", "c"], ["left"])

    passage = Passage(forward)
    assert passage.advance(lambda name, _: name == "a") is None
    passage.abandon()
    assert (arrived, left) == (["a", "b", "c", "a"], ["left"] * 2)


def test_errors_come_out_of_a_passage() -> None:
    def forward() -> Tensor:
        raise ArithmeticError("inside")

    with pytest.raises(ArithmeticError, match="inside"):
        Passage(forward).advance()
