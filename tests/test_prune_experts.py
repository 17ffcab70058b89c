"""Experts go whole: exact where nothing was asked of them, chosen by what they add, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import CalibrationSet
from compressor.errors import ModelError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model
from compressor.model.shape import shape_of
from compressor.resources import builtin_model
from compressor.stages.prune_experts import PruneExperts
from compressor.types import BlockRecord, TokenBatch
from tests.model.conftest import build
from tests.model.conftest import checkpoints as checkpoints  # noqa: PLC0414 — a fixture
from tests.test_prune import batches, context, prune

MANY = {
    "mixtral": {"num_local_experts": 16},
    "qwen3_moe": {"num_experts": 16, "norm_topk_prob": True},
    "qwen3_moe-mixed": {"num_experts": 16, "norm_topk_prob": True},
}


@pytest.fixture(scope="module", params=MANY)
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen experts, of which a token is given to two."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, **MANY[request.param]).save_pretrained(folder)
    return folder


def three_tokens() -> CalibrationSet:
    """Given to six experts of a block at most; what stands behind them is padding."""
    ids = torch.tensor([[5, 17, 44, 60, 61, 62, 63, 64]])
    batch = TokenBatch(ids, torch.arange(8)[None] < 3, ("a",))
    return CalibrationSet((batch,), (), {"a": 3}, "")


def logits(folder: Path, text: CalibrationSet) -> Tensor:
    (batch,) = text.batches
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32)(batch.input_ids).logits[batch.mask]


def test_keeping_all_keeps_every_byte(tmp_path: Path, parent: Path) -> None:
    result = prune(tmp_path / "out", three_tokens(), "prune.experts", parent, experts=16)
    before, after = CheckpointReader(parent), CheckpointReader(tmp_path / "out")
    assert all(before.tensor_sha256(name) == after.tensor_sha256(name) for name in before)
    assert (result.changed, result.resized, result.removed, result.renamed) == ((), (), (), {})
    assert read_config(parent) == read_config(tmp_path / "out")
    assert torch.equal(*(logits(path, batches()) for path in (parent, tmp_path / "out")))


@pytest.mark.parametrize("score", ["output", "reap", "frequency"])
def test_experts_that_are_never_asked_are_not_missed(
    tmp_path: Path, parent: Path, score: str
) -> None:
    text = three_tokens()
    result = prune(tmp_path / "out", text, "prune.experts", parent, experts=6, score=score)
    before, after = (logits(path, text) for path in (parent, tmp_path / "out"))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert result.notes["share of the tokens' places that went"] == 0
    assert load_model(tmp_path / "out").config.num_experts_per_tok == 2
    other = batches()
    assert (logits(parent, other) - logits(tmp_path / "out", other)).abs().max() > 1e-2


def test_experts_that_are_asked_are_missed(tmp_path: Path, parent: Path) -> None:
    """The mutant of the test above: two of those that were given a token go as well."""
    text = three_tokens()
    result = prune(tmp_path / "out", text, "prune.experts", parent, experts=2)
    assert result.notes["share of the tokens' places that went"] > 0
    assert (logits(parent, text) - logits(tmp_path / "out", text)).abs().max() > 1e-2


def by_hand(folder: Path, text: CalibrationSet) -> list[Tensor]:
    """Σ g ‖f(x)‖ of every expert by block, from the routers' own outputs."""
    model, found = load_model(folder, dtype=torch.float32), []
    (batch,) = text.batches

    def sum_up(experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, gates = args
        total = torch.zeros(experts.num_experts, dtype=torch.float64)
        for token in batch.mask.flatten().nonzero()[:, 0].tolist():
            for expert, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
                gate_part, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                answer = experts.down_proj[expert] @ (nn.functional.silu(gate_part) * up)
                total[expert] += gate * float(answer.norm())
        found.append(total)

    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(sum_up)
    with torch.inference_mode():
        model(batch.input_ids)
    return found


def test_those_that_add_most_stay_under_new_numbers(tmp_path: Path, parent: Path) -> None:
    text = batches()
    result = prune(tmp_path / "out", text, "prune.experts", parent, experts=5)
    before, after = CheckpointReader(parent), CheckpointReader(tmp_path / "out")
    architecture = Architecture.from_config(read_config(parent))
    blocks = [i for i in range(2) if any(m.expert is not None for m in architecture.block(i))]
    for index, worth in zip(blocks, by_hand(parent, text), strict=True):
        wanted = sorted(worth.topk(5).indices.tolist())
        for matrix in architecture.block(index):
            if matrix.role == "router":
                router = before[matrix.tensor][wanted]
                assert torch.equal(after[matrix.tensor], router)
            elif matrix.expert in wanted:
                new = f".experts.{wanted.index(matrix.expert)}."
                name = matrix.tensor.replace(f".experts.{matrix.expert}.", new)
                assert torch.equal(after[name], before[matrix.tensor])
                assert result.renamed.get(name, name) == matrix.tensor


def test_an_interrupted_stage_ends_with_the_same_bytes(tmp_path: Path, parent: Path) -> None:
    whole = prune(tmp_path / "whole", batches(), "prune.experts", parent, experts=5)
    done: list[BlockRecord] = []

    def stop(record: BlockRecord) -> None:
        done.append(record)
        raise KeyboardInterrupt

    stage = PruneExperts(experts=5)
    with pytest.raises(KeyboardInterrupt):
        stage.run(parent, batches(), context(tmp_path / "parts", (), stop))
    result = stage.run(parent, batches(), context(tmp_path / "parts", tuple(done)))
    assert (result.renamed, result.notes) == (whole.renamed, whole.notes)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_a_budget_decides_how_many_go(parent: Path) -> None:
    architecture = Architecture.from_config(read_config(parent))
    target = PruneExperts(ratio=0.2).target(architecture)
    assert 2 <= target.experts < 16
    assert target.channels == shape_of(architecture).channels
    with pytest.raises(ModelError, match="cannot be reached by experts alone"):
        PruneExperts(ratio=0.99).target(architecture)


def refusals(folder: Path, **options: object) -> list[str]:
    found: list[str] = []
    architecture = Architecture.from_config(read_config(folder))
    PruneExperts(**options).plan(architecture, lambda *words: found.append(words[1]))
    return found


def test_the_plan_refuses_in_a_sentence(checkpoints: Callable[..., Path]) -> None:
    (few,) = refusals(checkpoints("mixtral"), experts=1)
    assert few == (
        "1 experts are fewer than the 2 that every token is given to (num_experts_per_tok)"
    )
    (more,) = refusals(checkpoints("qwen3_moe"), experts=4)
    assert more == "4 experts cannot be kept: the model has 3"
    for options in ({"experts": 2}, {"ratio": 0.2}):
        assert "has no experts" in refusals(builtin_model("tiny"), **options)[0]
    assert "nothing says how much goes" in refusals(checkpoints("mixtral"))[0]
