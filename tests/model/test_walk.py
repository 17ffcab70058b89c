from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.errors import ModelError, ResumeError
from compressor.model.block import Block
from compressor.model.load import load_model
from compressor.model.walk import BlockWalk
from compressor.types import TokenBatch
from tests.model.conftest import VARIANTS

Checkpoints = Callable[..., Path]


def text(rows: int = 2, length: int = 9, padding: int = 0, seed: int = 1) -> TokenBatch:
    """Random tokens; every second row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padding:
        mask[1::2, -padding:] = False
    ids = torch.randint(3, 96, (rows, length), generator=generator) * mask
    domains = tuple(("prose", "code")[row % 2] for row in range(rows))
    return TokenBatch(ids, mask, domains)


BATCHES = (text(), text(rows=3, length=7, padding=3, seed=2))


def logits_of(walk: BlockWalk) -> list[Tensor]:
    for _ in walk.blocks():
        pass
    return [walk.logits(hidden) for hidden in walk.final_hidden()]


def reference_logits(model: transformers.PreTrainedModel, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        output = model(batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
    return output.logits


def write(walk: BlockWalk, folder: Path, edit: Callable[[Block], None]) -> Path:
    """Walk, edit every block, and write what results as a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for block in walk.blocks():
        edit(block)
        tensors |= block.state()
    tensors |= {name: walk.tensor(name) for name in walk.rest()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(walk.reader.checkpoint / "config.json", folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_equals_the_whole_model(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(variant)
    streamed = logits_of(BlockWalk(folder, BATCHES, scratch=tmp_path))
    model = load_model(folder)
    for batch, logits in zip(BATCHES, streamed, strict=True):
        expected = reference_logits(model, batch)
        assert torch.equal(logits[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3", "granite", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_a_bf16_checkpoint(
    variant: str, dtype: torch.dtype, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(variant, torch.bfloat16)
    streamed = logits_of(BlockWalk(folder, BATCHES, dtype=dtype, scratch=tmp_path))
    model = load_model(folder, dtype=dtype)
    for batch, logits in zip(BATCHES, streamed, strict=True):
        expected = reference_logits(model, batch)
        assert logits.dtype == expected.dtype
        assert torch.equal(logits[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("variant", ["llama", "opt", "gemma3"])
def test_the_mask_reaches_attention(variant: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Padding on the right is invisible to causal attention; on the left it is not."""
    batch = text(rows=2, length=8)
    batch.mask[1, :3] = False
    model = load_model(checkpoints(variant))
    (logits,) = logits_of(BlockWalk(checkpoints(variant), [batch], scratch=tmp_path))
    assert torch.equal(logits[batch.mask], reference_logits(model, batch)[batch.mask])
    unmasked = TokenBatch(batch.input_ids, torch.ones_like(batch.mask), batch.domains)
    assert not torch.allclose(logits[1, 4:], reference_logits(model, unmasked)[1, 4:], atol=1e-3)


def test_eager_transformers_agrees_as_well(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The reference of the other tests uses the same attention kernel; this one does not."""
    folder = checkpoints("gemma3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    (logits,) = logits_of(BlockWalk(folder, BATCHES[1:], scratch=tmp_path))
    expected = reference_logits(model.eval(), BATCHES[1])
    mask = BATCHES[1].mask
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-5, rtol=1e-5)


def captured(walk: BlockWalk) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = defaultdict(list)
    for block in walk.blocks():
        block.capture(lambda group, rows, _: found[group].append(rows))
    return {group: torch.cat(rows) for group, rows in found.items()}


def hooked(folder: Path, walk: BlockWalk) -> dict[str, Tensor]:
    """Inputs of every linear layer in a plain forward, valid tokens only."""
    model, found, masks = load_model(folder), defaultdict(list), []
    for matrix in walk.architecture.matrices:
        if matrix.block is not None and matrix.expert is None:
            path = walk.architecture.module_tensor(matrix.tensor).removesuffix(".weight")

            def note(_: nn.Module, args: tuple[Tensor], name: str = matrix.name) -> None:
                found[name].append(args[0].reshape(-1, args[0].shape[-1])[masks[-1]])

            model.get_submodule(path).register_forward_pre_hook(note)
    for batch in BATCHES:
        masks.append(batch.mask.flatten())
        reference_logits(model, batch)
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_captured_inputs_equal_hooks_on_the_whole_model(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    walk = BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path)
    seen, expected = captured(walk), hooked(checkpoints(variant), walk)
    assert len(expected) >= 8
    for name, rows in expected.items():
        group = walk.architecture.matrix(name).input_group
        assert rows.shape[0] == sum(int(batch.mask.sum()) for batch in BATCHES)
        assert torch.equal(seen[group], rows), name


def test_every_group_is_reported_once_per_batch_in_execution_order(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
    block = next(walk.blocks())
    seen: list[str] = []
    block.capture(lambda group, *_: seen.append(group.rsplit("0.", 1)[1]))
    assert seen == ["attention.in", "attention.out", "mlp.in", "mlp.out"] * len(BATCHES)


def test_capture_of_one_group_leaves_the_forward_there(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
    block = next(walk.blocks())
    ran: list[object] = []
    block.module.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    seen: list[str] = []
    group = "model.layers.0.attention.in"
    block.capture(lambda name, *_: seen.append(name), [group])
    assert seen == [group] * len(BATCHES)
    assert not ran


def test_two_walks_in_lockstep_pair_their_inputs(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Inputs of block 1 with and without a change of block 0, token by token."""
    first = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / "a").blocks()
    second = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / "b").blocks()
    changed = next(second).matrices[-1]
    changed.set_weight(changed.weight * 1.01)
    next(first)
    pairs: list[list[Tensor]] = []
    original, edited = next(first), next(second)
    for batch in range(len(BATCHES)):
        pairs.append([])
        for block in (original, edited):
            block.capture(
                lambda *seen: pairs[-1].append(seen[1]), ["model.layers.1.attention.in"], [batch]
            )
    for batch, (x, y) in zip(BATCHES, pairs, strict=True):
        assert x.shape == y.shape == (int(batch.mask.sum()), 32)
        assert 0 < (x - y).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_capture_goes_onward(variant: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The outputs kept on the way are those of `forward`, and nothing is run twice for them."""
    plain, kept = (BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path / s) for s in "ab")
    ran: list[int] = []
    for block in kept.blocks():
        run = block.run
        block.run = lambda batch, run=run: (ran.append(batch), run(batch))[1]  # type: ignore[method-assign]
        for batch in range(len(BATCHES)):
            block.capture(lambda *_: None, block._groups, [batch], onward=True)
        block.save_outputs()
    assert ran == [0, 1] * kept.architecture.layers
    for _ in plain.blocks():
        pass
    for ours, expected in zip(kept.final_hidden(), plain.final_hidden(), strict=True):
        assert torch.is_grad_enabled()
        assert torch.equal(ours, expected)
    assert torch.is_grad_enabled()


def test_capture_goes_onward_in_order_only(checkpoints: Checkpoints, tmp_path: Path) -> None:
    block = next(BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path).blocks())
    with pytest.raises(ValueError, match="batch 0 comes next, not 1"):
        block.capture(lambda *_: None, batches=[1], onward=True)


def test_capture_refuses_a_group_of_another_block(checkpoints: Checkpoints, tmp_path: Path) -> None:
    block = next(BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path).blocks())
    with pytest.raises(ModelError, match=r"no input group 'model\.layers\.1\.mlp\.in'"):
        block.capture(lambda *_: None, ["model.layers.1.mlp.in"])


def test_domains_follow_their_tokens(checkpoints: Checkpoints, tmp_path: Path) -> None:
    walk = BlockWalk(checkpoints("llama"), BATCHES[1:], scratch=tmp_path)
    assert walk.domains == ("code", "prose")
    domains: list[Tensor] = []
    next(walk.blocks()).capture(
        lambda *seen: domains.append(seen[2]), ["model.layers.0.attention.in"]
    )
    assert domains[0].tolist() == [1] * 7 + [0] * 4 + [1] * 7


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_experts_see_exactly_the_tokens_routed_to_them(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Against routing noted in the whole model, and against arithmetic on the disk tensors."""
    folder = checkpoints(variant)
    walk = BlockWalk(folder, BATCHES[1:], scratch=tmp_path)
    block = next(walk.blocks())
    seen: dict[str, Tensor] = {}
    domains: dict[str, Tensor] = {}

    def observe(group: str, rows: Tensor, domain: Tensor) -> None:
        seen[group], domains[group] = rows, domain

    block.capture(observe)
    model, routed = load_model(folder), []
    experts = model.get_submodule("model.layers.0.mlp.experts")
    experts.register_forward_pre_hook(lambda _, args: routed.append(args[:2]))
    reference_logits(model, BATCHES[1])
    hidden, chosen = routed[0]
    valid = BATCHES[1].mask.flatten()
    rows = torch.tensor([1, 0, 1]).repeat_interleave(7)
    total = 0
    for matrix in block.matrices:
        info = matrix.info
        if info.role != "down" or info.expert is None:
            continue
        tokens = ((chosen == info.expert).any(-1) & valid).nonzero()[:, 0]
        total += len(tokens)
        into = seen[info.input_group.replace(".out", ".in")]
        assert torch.equal(sort_rows(into), sort_rows(hidden[tokens]))
        assert domains[info.input_group].sort()[0].tolist() == rows[tokens].sort()[0].tolist()
        gate, up = (disk_weight(block, info.expert, role) for role in ("gate", "up"))
        torch.testing.assert_close(
            seen[info.input_group], nn.functional.silu(into @ gate.T) * (into @ up.T)
        )
    assert total == 2 * int(valid.sum())


def sort_rows(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def disk_weight(block: Block, expert: int, role: str) -> Tensor:
    (info,) = (m.info for m in block.matrices if (m.info.expert, m.info.role) == (expert, role))
    return block.tensor(info.tensor)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe-mixed"])
def test_what_was_set_is_what_a_reloaded_model_computes(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints(variant)
    walk = BlockWalk(source, BATCHES, scratch=tmp_path / "scratch")

    def edit(block: Block) -> None:
        for number, matrix in enumerate(block.matrices):
            if number % 2:
                matrix.set_weight(torch.round(matrix.weight * 8) / 8)
                assert torch.equal(matrix.weight, torch.round(matrix.weight * 8) / 8)

    folder = write(walk, tmp_path / "edited", edit)
    model, before = load_model(folder), load_model(source)
    for batch, hidden in zip(BATCHES, walk.final_hidden(), strict=True):
        expected = reference_logits(model, batch)[batch.mask]
        assert torch.equal(walk.logits(hidden)[batch.mask], expected)
        assert (expected - reference_logits(before, batch)[batch.mask]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["llama", "mixtral", "gpt2"])
def test_only_what_was_set_changes_on_disk(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints(variant, torch.bfloat16)
    walk = BlockWalk(source, BATCHES[:1], scratch=tmp_path / "scratch")
    target = walk.architecture.block(1)[-1]

    def edit(block: Block) -> None:
        if block.index == 1:
            block.matrix(target.name).set_weight(torch.full(target.shape, 1 / 3))

    folder = write(walk, tmp_path / "edited", edit)
    old, new = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == torch.bfloat16
        assert torch.equal(new[name].view(torch.int16), tensor.view(torch.int16)) == (
            name != target.tensor
        )
    assert torch.equal(new[target.tensor], torch.full(target.disk_shape, 1 / 3).bfloat16())


def test_activations_are_those_of_the_weights_on_disk(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A weight that bf16 cannot hold is rounded before it is computed with."""
    walk = BlockWalk(checkpoints("llama", torch.bfloat16), BATCHES[:1], scratch=tmp_path)
    matrix = next(walk.blocks()).matrices[0]
    matrix.set_weight(torch.full(matrix.info.shape, 1 / 3))
    assert torch.equal(matrix.weight, torch.full(matrix.info.shape, 1 / 3).bfloat16().float())


def test_a_weight_is_a_copy(checkpoints: Checkpoints, tmp_path: Path) -> None:
    block = next(BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path).blocks())
    block.matrices[0].weight.zero_()
    assert block.matrices[0].weight.abs().sum() > 0


def test_norms_and_biases_can_be_set(checkpoints: Checkpoints, tmp_path: Path) -> None:
    walk = BlockWalk(checkpoints("qwen2"), BATCHES, scratch=tmp_path / "scratch")

    def edit(block: Block) -> None:
        for name in ("input_layernorm.weight", "self_attn.q_proj.bias"):
            full = f"model.layers.{block.index}.{name}"
            block.set_tensor(full, block.tensor(full) * 2)

    model = load_model(write(walk, tmp_path / "edited", edit))
    (logits, _) = (walk.logits(hidden) for hidden in walk.final_hidden())
    assert torch.equal(logits, reference_logits(model, BATCHES[0]))


@pytest.mark.parametrize("variant", ["llama", "llama-tied-biased"])
def test_a_changed_embedding_reaches_everything_behind_it(
    variant: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    walk = BlockWalk(checkpoints(variant), BATCHES, scratch=tmp_path / "scratch")
    logits_of(walk)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        walk.set_tensor(name, walk.tensor(name) * 1.5)
    model = load_model(write(walk, tmp_path / "edited", lambda _: None))
    (logits, _) = (walk.logits(hidden) for hidden in walk.final_hidden())
    assert torch.equal(logits, reference_logits(model, BATCHES[0]))


def test_wrong_names_and_shapes_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    walk = BlockWalk(checkpoints("gpt2"), BATCHES, scratch=tmp_path)
    block = next(walk.blocks())
    with pytest.raises(ModelError, match=r"is \[56, 32\] \(out, in\), so \[32, 56\] cannot"):
        block.matrix("transformer.h.0.mlp.c_fc").set_weight(torch.zeros(32, 56))
    with pytest.raises(ModelError, match=r"has shape \[32\], so \[31\] cannot replace it"):
        block.set_tensor("transformer.h.0.ln_1.weight", torch.zeros(31))
    with pytest.raises(ModelError, match="belongs to another block"):
        block.matrix("transformer.h.1.mlp.c_fc")
    with pytest.raises(ModelError, match="has no tensor"):
        block.set_tensor("transformer.h.1.ln_1.weight", torch.zeros(32))
    with pytest.raises(ModelError, match="outside the blocks"):
        walk.set_tensor("transformer.h.0.ln_1.weight", torch.zeros(32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(
    bad: float, name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints("llama", torch.bfloat16), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors[name].view(-1)[5] = bad
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^{name} of .* holds a NaN or an infinity"):
        for _ in BlockWalk(tmp_path / "bad", BATCHES, scratch=tmp_path / "scratch").blocks():
            pass


def test_a_token_without_a_row_in_the_embedding(checkpoints: Checkpoints, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 96]])
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",))
    walk = BlockWalk(checkpoints("llama"), [batch], scratch=tmp_path)
    with pytest.raises(ModelError, match=r"token 96, but the embedding of .* has 96 rows"):
        next(walk.blocks())


def test_blocks_and_rest_cover_the_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
    names = [name for block in walk.blocks() for name in block.names] + list(walk.rest())
    assert sorted(names) == sorted(walk.reader.names)


def test_one_block_is_alive_at_a_time(checkpoints: Checkpoints, tmp_path: Path) -> None:
    walk = BlockWalk(checkpoints("mixtral"), BATCHES, scratch=tmp_path)
    modules = [block.module for block in walk.blocks()]
    assert all(p.is_meta for module in modules for p in module.parameters())


class TestResume:
    def test_from_any_block_gives_the_same_bits(
        self, checkpoints: Checkpoints, tmp_path: Path
    ) -> None:
        folder = checkpoints("llama")
        walk = BlockWalk(folder, BATCHES, scratch=tmp_path)
        for block in walk.blocks():
            block.matrices[0].set_weight(block.matrices[0].weight * 0.5)
            block.save_outputs()
        expected = [walk.logits(hidden) for hidden in walk.final_hidden()]
        behind = BlockWalk(folder, BATCHES, scratch=tmp_path)
        assert not list(behind.blocks(start=2))
        for hidden, logits in zip(behind.final_hidden(), expected, strict=True):
            assert torch.equal(behind.logits(hidden), logits)
        resumed = BlockWalk(folder, BATCHES, scratch=tmp_path)
        for block in resumed.blocks(start=1):
            block.matrices[0].set_weight(block.matrices[0].weight * 0.5)
        for hidden, logits in zip(resumed.final_hidden(), expected, strict=True):
            assert torch.equal(resumed.logits(hidden), logits)

    def test_two_points_stay_on_disk(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
        for block in walk.blocks():
            block.save_outputs()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs-00001", "inputs-00002"]

    def test_nothing_saved(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        walk = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
        with pytest.raises(ResumeError, match="holds no saved activations"):
            next(walk.blocks(start=1))

    def test_other_text(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        first = BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path)
        next(first.blocks()).save_outputs()
        other = BlockWalk(checkpoints("llama"), (text(seed=5), BATCHES[1]), scratch=tmp_path)
        with pytest.raises(ResumeError, match="belong to another text"):
            next(other.blocks(start=1))

    def test_activations_beyond_the_budget_change_nothing(
        self, checkpoints: Checkpoints, tmp_path: Path
    ) -> None:
        plenty = logits_of(BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / "a"))
        none = logits_of(
            BlockWalk(checkpoints("llama"), BATCHES, scratch=tmp_path / "b", memory_budget=0)
        )
        assert all(torch.equal(a, b) for a, b in zip(plenty, none, strict=True))
        assert not (tmp_path / "a").exists()
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["inputs-00002"]


def test_other_tensors_are_computed_with_but_not_kept(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The walk over one model also computes another, without a trace on its own."""
    for variant in ("llama-tied-biased", "mixtral", "granite"):
        own, other = checkpoints(variant), checkpoints(variant, torch.bfloat16)
        walk = BlockWalk(own, BATCHES[:1], scratch=tmp_path)
        tensors = {name: value.float() for name, value in _all_tensors(other).items()}
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        hidden = walk.embedded_with(0, tensors["model.embed_tokens.weight"])
        for block in walk.blocks():
            hidden = block.run_with(0, hidden, {name: tensors[name] for name in block.names})
        norm = {"model.norm.weight": tensors["model.norm.weight"]}
        found = walk.logits_with(0, hidden, norm, head)
        expected = reference_logits(load_model(other, dtype=torch.float32), BATCHES[0])
        assert torch.equal(found, expected)
        unchanged = walk.logits(next(walk.final_hidden()))
        assert torch.equal(unchanged, reference_logits(load_model(own), BATCHES[0]))
        assert not torch.equal(found, unchanged)


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
