from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.model.files import read_config, weight_files
from compressor.model.reader import TensorReader
from compressor.model.walk import BlockWalk
from tests.model.conftest import build


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.uint8)
    written = {str(dtype): (torch.randn(3, 5) * 50).to(dtype) for dtype in dtypes}
    save_file(written, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    for name, tensor in written.items():
        assert reader.dtype(name) == tensor.dtype
        assert reader.shape(name) == (3, 5)
        assert torch.equal(reader.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_shards_are_one_checkpoint(tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 2
    whole = load_file(checkpoints("llama") / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert set(reader.names) == set(whole)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in whole.items())


def test_an_unindexed_copy_is_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert TensorReader(tmp_path).names == ("a",)


def index(folder: Path, **files: str) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "model.bin"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    index(tmp_path, a=name)
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        weight_files(tmp_path)


def test_a_shard_that_the_index_lists_is_missing(tmp_path: Path) -> None:
    index(tmp_path, a="model-1.safetensors")
    with pytest.raises(ModelError, match=r"lacks model-1\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="not an index"):
        weight_files(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only as pytorch_model\.bin; loading that would run"):
        weight_files(tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        TensorReader(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"x lies in both a\.safetensors and b\.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "holds no config.json"), ("{", "is not JSON"), ("[]", "must be a JSON object")],
)
def test_config(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=sentence):
        read_config(tmp_path)


class TestWalkRefuses:
    """A checkpoint that does not hold what its configuration calls for."""

    def broken(
        self,
        source: Path,
        folder: Path,
        edit: Callable[[dict[str, torch.Tensor]], None],
        **config: object,
    ) -> Path:
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        content = json.dumps({**read_config(source), **config})
        (folder / "config.json").write_text(content)
        return folder

    def test_a_missing_tensor(self, tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        folder = self.broken(checkpoints("llama"), tmp_path, lambda found: found.pop(name))
        with pytest.raises(ModelError, match=f"lacks the tensor {name}"):
            BlockWalk(folder, (), scratch=tmp_path)

    def test_another_shape(self, tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
        folder = self.broken(checkpoints("llama"), tmp_path, lambda _: None, intermediate_size=64)
        with pytest.raises(ModelError, match=r"\[48, 32\] on disk,.* calls for \[64, 32\]"):
            BlockWalk(folder, (), scratch=tmp_path)

    def test_compressed_weights(self, tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
        folder = self.broken(
            checkpoints("llama"), tmp_path, lambda _: None, quantization_config={"bits": 4}
        )
        with pytest.raises(ModelError, match="compressed already"):
            BlockWalk(folder, (), scratch=tmp_path)

    def test_tensors_that_the_model_does_not_use_are_carried_along(
        self, tmp_path: Path, checkpoints: Callable[..., Path]
    ) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        folder = self.broken(
            checkpoints("llama"), tmp_path, lambda found: found.update({name: torch.arange(4.0)})
        )
        walk = BlockWalk(folder, (), scratch=tmp_path)
        assert torch.equal(next(walk.blocks()).state()[name], torch.arange(4.0))
