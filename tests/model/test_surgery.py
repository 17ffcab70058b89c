"""Cutting units out is exact in every family, and impossible sizes are refused without weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import ModelError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.load import load_model
from compressor.model.shape import faults, fitted, resized, shape_of
from compressor.model.surgery import BlockKeep, PruningPlan, apply, pruned_config
from tests.model.conftest import VARIANTS, build, config_of

HEADS = tuple(
    name
    for name in VARIANTS
    if not name.startswith(("gpt", "opt", "olmo2")) and name != "phi3-long-rope"
)
DEPTH = tuple(name for name in VARIANTS if name not in ("opt-postnorm", "qwen3_moe-mixed"))


def logits(folder: Path) -> Tensor:
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32)(ids).logits


def cut(parent: Path, plan: PruningPlan, folder: Path) -> Path:
    """The smaller checkpoint, made of one file."""
    architecture = Architecture.from_config(config_of(parent))
    tensors = apply(architecture, plan, CheckpointReader(parent))
    shape = shape_of(architecture)
    for keep in plan.blocks.values():
        heads = len(keep.heads) if keep.heads else shape.heads
        kv_heads = len(keep.kv_heads) if keep.kv_heads else shape.kv_heads
        channels = len(next(iter(keep.channels.values()))) if keep.channels else shape.channels
        shape = replace(shape, heads=heads, kv_heads=kv_heads, channels=channels)
    shape = replace(shape, layers=len(plan.layers))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    atomic_write_json(
        folder / "config.json", pruned_config(parent, architecture, shape, plan.layers)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    planned = dict(resized(architecture, shape).tensors())
    assert shapes == planned
    return folder


def killed(parent: Path, folder: Path, dead: Callable[[str, Tensor], None]) -> Path:
    """The parent with units that put out nothing."""
    reader = CheckpointReader(parent)
    tensors = {name: reader[name].clone() for name in reader}
    for name, tensor in tensors.items():
        dead(name, tensor)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((parent / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_dead_channels_can_go_in_every_family(
    tmp_path: Path, checkpoints: Callable[..., Path], variant: str
) -> None:
    parent = checkpoints(variant)
    architecture = Architecture.from_config(config_of(parent))
    width = shape_of(architecture).channels
    kept: dict[int, dict[int | None, list[int]]] = {}
    down = {}
    for number, matrix in enumerate(
        m for m in architecture.matrices if m.role in ("down", "fc_out")
    ):
        if architecture.experts and matrix.expert is None:
            continue
        channels = sorted({*range(number % 3, width, 3), 1, width - 1})[: width // 3]
        kept.setdefault(matrix.block, {})[matrix.expert] = channels
        down[matrix.tensor] = (matrix, [c for c in range(width) if c not in channels])

    def dead(name: str, tensor: Tensor) -> None:
        if name in down:
            matrix, gone = down[name]
            (tensor.T if matrix.transposed_on_disk else tensor)[:, gone] = 0

    blocks = {index: BlockKeep(channels=channels) for index, channels in kept.items()}
    plan = PruningPlan(range(architecture.layers), blocks)
    sparse = killed(parent, tmp_path / "sparse", dead)
    small = cut(sparse, plan, tmp_path / "small")
    expected = logits(sparse)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5)
    assert (expected - logits(parent)).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [(1, 3), (2, 3)], ids=["one of each group", "one group"])
@pytest.mark.parametrize("variant", HEADS)
def test_dead_heads_can_go(
    tmp_path: Path, checkpoints: Callable[..., Path], variant: str, heads: tuple[int, ...]
) -> None:
    parent = checkpoints(variant)
    architecture = Architecture.from_config(config_of(parent))
    shared = architecture.heads // architecture.kv_heads
    kv_heads = sorted({head // shared for head in heads})
    size = architecture.head_dim
    outputs = {m.tensor for m in architecture.matrices if m.role == "o"}

    def dead(name: str, tensor: Tensor) -> None:
        for head in range(architecture.heads):
            if name in outputs and head not in heads:
                tensor[:, head * size : (head + 1) * size] = 0

    keep = BlockKeep(heads=heads, kv_heads=kv_heads)
    plan = PruningPlan(range(2), {0: keep, 1: keep})
    sparse = killed(parent, tmp_path / "sparse", dead)
    small = cut(sparse, plan, tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(sparse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", DEPTH)
def test_a_dead_block_can_go(tmp_path: Path, variant: str) -> None:
    lists = {"layer_types", "no_rope_layers"} & set(VARIANTS[variant][1])
    changes = {key: [*VARIANTS[variant][1][key], VARIANTS[variant][1][key][0]] for key in lists}
    layers = {"num_hidden_layers": 3} | ({"n_layer": 3} if variant.startswith("gpt2") else {})
    parent = tmp_path / "parent"
    build(variant, **layers, **changes).save_pretrained(parent)
    architecture = Architecture.from_config(config_of(parent))
    writers = {m.name for m in architecture.block(1) if m.role in ("o", "down", "fc_out")}

    def dead(name: str, tensor: Tensor) -> None:
        if name.rpartition(".")[0] in writers:
            tensor.zero_()

    sparse = killed(parent, tmp_path / "sparse", dead)
    small = cut(sparse, PruningPlan((0, 2)), tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(sparse), rtol=0, atol=1e-5)
    model = load_model(small)
    for index, layer in enumerate(model.get_submodule(architecture.blocks_path)):
        attention = getattr(layer, "self_attn", None)
        assert getattr(attention, "layer_idx", index) == index


def test_keeping_everything_keeps_the_tensors_themselves(checkpoints) -> None:
    parent = checkpoints("llama")
    architecture = Architecture.from_config(config_of(parent))
    reader = CheckpointReader(parent)
    tensors = {name: reader[name] for name in reader}
    same = apply(architecture, PruningPlan(range(2)), tensors)
    assert all(same[name] is tensors[name] for name in tensors)


def of(variant: str, **changes: object) -> Architecture:
    return Architecture.from_config(build(variant, **changes).config.to_dict())


def test_a_budget_is_met_by_the_nearest_legal_width() -> None:
    architecture = of("llama")
    now = shape_of(architecture)
    for share in (0.05, 0.1, 0.2):
        budget = round(architecture.parameters * (1 - share))
        every = {
            channels: abs(
                resized(architecture, replace(now, channels=channels)).parameters - budget
            )
            for channels in range(1, 49)
        }
        found = fitted(architecture, now, "channels", budget).channels
        assert every[found] == min(every.values())
        within = fitted(architecture, now, "channels", budget, multiple=8, at_most=True)
        assert within.channels % 8 == 0
        assert resized(architecture, within).parameters <= budget
        wider = replace(within, channels=within.channels + 8)
        assert resized(architecture, wider).parameters > budget
    assert fitted(architecture, now, "channels", architecture.parameters) == now
    assert (
        fitted(
            of("llama", num_hidden_layers=4),
            now,
            "layers",
            0 + of("llama", num_hidden_layers=3).parameters,
        ).layers
        == 3
    )
    with pytest.raises(ModelError, match="cannot be reached by channels alone"):
        fitted(architecture, now, "channels", 1000)


@pytest.mark.parametrize(
    ("variant", "changes", "sentence"),
    [
        ("llama", {"heads": 5}, "5 heads cannot be kept: the model has 4"),
        ("llama", {"kv_heads": 3, "heads": 3}, "3 kv-heads cannot be kept: the model has 2"),
        ("llama", {"layers": 3}, "3 layers cannot be kept"),
        ("llama", {"channels": 0}, "0 channels cannot be kept"),
        ("mistral", {"heads": 3}, "3 query heads cannot share 2 key-value heads evenly"),
        ("mistral", {"kv_heads": 1, "heads": 3}, "are 3 each, and the model has 2"),
        ("gpt2", {"heads": 2}, "heads of GPT-2 cannot be pruned"),
        ("opt", {"heads": 2}, "heads of OPT cannot be pruned"),
        ("olmo2", {"heads": 2}, "normalises queries over all heads"),
        ("qwen3_moe-mixed", {"layers": 1}, "alternate"),
    ],
)
def test_an_impossible_size_is_refused_in_a_sentence(
    variant: str, changes: dict[str, int], sentence: str
) -> None:
    architecture = of(variant)
    found = list(faults(architecture, replace(shape_of(architecture), **changes)))
    assert len(found) == 1
    assert re.search(sentence, found[0].message)


def test_llama_needs_heads_that_divide_its_hidden_size() -> None:
    architecture = of("llama", num_attention_heads=4, num_key_value_heads=4)
    shape = replace(shape_of(architecture), heads=3, kv_heads=3)
    (fault,) = faults(architecture, shape)
    assert "32" in fault.message
    assert not list(faults(of("mistral", num_key_value_heads=4), shape))
