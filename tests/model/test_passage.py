"""Forwards that stand still: what they report and leave is what running anew would give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.model.block import Block
from compressor.model.passage import Passage
from compressor.model.walk import BlockWalk
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
            name.split(".")[-2] for p in ahead._standing.values() for name in p.passed
        }
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert stands == {
        "attention.in": set(), "attention.out": attention, "mlp.in": attention, "mlp.out": set(),
    }  # fmt: skip
    assert runs == list(range(len(BATCHES)))


def test_a_full_budget_runs_anew(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Room for the first batch only; the second one gives way."""
    path = checkpoints("llama")
    probe = BlockWalk(path, BATCHES, scratch=tmp_path / "probe")
    room = BATCHES[0].mask.numel() * probe.bytes_standing(0)
    walk = BlockWalk(path, BATCHES, scratch=tmp_path / "walk", memory_budget=2 * room)
    block = next(walk.blocks())
    block.capture(lambda *_: None, ["model.layers.0.attention.in"])
    assert list(block._standing) == [0]
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
