"""EAGLE-3 heads as GGUF, every tensor and back; llama.cpp decodes with one in `tests/engines`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as library
import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats import gguf, gguf_eagle3
from compressor.formats.atomic import atomic_write_json
from compressor.formats.eagle3 import default_layers, flat_config
from compressor.formats.exporters import Source
from compressor.formats.files import link_checkpoint
from compressor.formats.headers import read_json
from compressor.formats.shards import CheckpointWriter, shard_name
from compressor.resources import builtin_model
from compressor.verify import verify_weights

WIDTH, HEADS, CACHED, INNER, DRAFTED = 320, 5, 1, 832, 96


def head(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a head for `builtin:tiny` that can propose some of its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    kept = torch.randperm(4096, generator=generator)[:DRAFTED].sort().values
    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    return {
        "fc.weight": random(WIDTH, 3 * WIDTH),
        f"{attention}q_proj.weight": random(WIDTH, 2 * WIDTH),
        f"{attention}k_proj.weight": random(CACHED * 64, 2 * WIDTH),
        f"{attention}v_proj.weight": random(CACHED * 64, 2 * WIDTH),
        f"{attention}o_proj.weight": random(WIDTH, WIDTH),
        f"{mlp}gate_proj.weight": random(INNER, WIDTH),
        f"{mlp}up_proj.weight": random(INNER, WIDTH),
        f"{mlp}down_proj.weight": random(WIDTH, INNER),
        "midlayer.input_layernorm.weight": random(WIDTH),
        "midlayer.hidden_norm.weight": random(WIDTH),
        "midlayer.post_attention_layernorm.weight": random(WIDTH),
        "norm.weight": random(WIDTH),
        "lm_head.weight": random(DRAFTED, WIDTH),
        "d2t": kept - torch.arange(DRAFTED),
        "t2d": torch.zeros(4096, dtype=torch.bool).index_fill(0, kept, True),
    }


def written(folder: Path, features: tuple[int, ...]) -> Path:
    target = builtin_model("tiny")
    layer = read_json(target / "config.json")
    writer = CheckpointWriter(folder)
    writer.write_shard(shard_name(0), head())
    writer.finish(flat_config(layer, DRAFTED, layer["num_hidden_layers"], features), target, 1)
    return folder


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return written(tmp_path / "draft", (1, 2, 3))


def test_what_is_written_reads_back_exactly(draft: Path, tmp_path: Path) -> None:
    gguf_eagle3.write(draft, builtin_model("tiny"), tmp_path / "out")
    stored = dict(gguf_eagle3.read(tmp_path / "out"))
    given = head()
    assert stored.keys() == given.keys() - {"t2d"}
    assert all(torch.equal(t.to(given[name].dtype), given[name]) for name, t in stored.items())
    assert verify_weights([*stored.items(), ("t2d", given["t2d"])], draft, (), "gguf") == 0.0
    stored["fc.weight"] = stored["fc.weight"].flip(1)
    with pytest.raises(VerificationError, match=r"fc.weight differs from memory"):
        verify_weights([*stored.items(), ("t2d", given["t2d"])], draft, (), "gguf")


def test_the_file_says_what_llama_cpp_asks(draft: Path, tmp_path: Path) -> None:
    gguf_eagle3.write(draft, builtin_model("tiny"), tmp_path / "out")
    gguf.write(Source(builtin_model("tiny"), {}, 1, "gguf"), tmp_path / "target")
    reader = library.GGUFReader(tmp_path / "out" / gguf.FILE)
    other = library.GGUFReader(tmp_path / "target" / gguf.FILE)
    fields, target = ({k: f.contents() for k, f in r.fields.items()} for r in (reader, other))
    assert fields["general.architecture"] == "eagle3"
    assert fields["eagle3.target_layers"] == [1, 2, 3]
    assert fields["eagle3.target_hidden_size"] == WIDTH
    assert fields["eagle3.block_count"] == 1
    assert not fields["eagle3.norm_before_residual"]
    assert fields["tokenizer.ggml.tokens"] == target["tokenizer.ggml.tokens"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tokens = torch.from_numpy(tensors["d2t"].data.copy())
    assert torch.equal(tokens, head()["t2d"].nonzero()[:, 0])  # tokens, not distances
    # Rows of q and k are paired as in the target's own file.
    order = gguf.row_order("midlayer.self_attn.q_proj.weight", WIDTH, {"q_proj": HEADS})
    raw = head()["midlayer.self_attn.q_proj.weight"]
    data = torch.from_numpy(tensors["blk.0.attn_q.weight"].data.copy()).view(torch.bfloat16)
    assert order is not None
    assert torch.equal(data, raw[order])
    assert not torch.equal(data, raw)


def test_default_features_follow_from_the_target(tmp_path: Path) -> None:
    draft = written(tmp_path / "draft", default_layers(4))
    gguf_eagle3.write(draft, builtin_model("tiny"), tmp_path / "out")
    fields = library.GGUFReader(tmp_path / "out" / gguf.FILE).fields
    assert fields["eagle3.target_layers"].contents() == [2, 2, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "positions of type 'yarn'"),
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding windows"),
    ],
)
def test_targets_that_no_gguf_holds_are_refused(
    draft: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    target = tmp_path / "target"
    link_checkpoint(builtin_model("tiny"), target)
    atomic_write_json(target / "config.json", read_json(target / "config.json") | change)
    with pytest.raises(ModelError, match=says):
        gguf_eagle3.write(draft, target, tmp_path / "out")
    assert not (tmp_path / "out" / gguf.FILE).exists()
