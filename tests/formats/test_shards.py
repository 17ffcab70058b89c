from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.errors import ModelError, ResourceError
from compressor.formats import atomic
from compressor.formats.atomic import atomic_write_json, atomic_write_text, replacing
from compressor.formats.files import checkpoint_bytes, checkpoint_files
from compressor.formats.headers import INDEX, SINGLE, read_json
from compressor.formats.shards import CheckpointReader, CheckpointWriter, save_tensors, shard_name

from .helpers import logits, same_tensors


def blocks(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The checkpoint's tensors cut in three, in name order."""
    reader = CheckpointReader(folder)
    names = reader.names()
    return [{name: reader[name] for name in names[part::3]} for part in range(3)]


def write(source: Path, folder: Path) -> Path:
    writer = CheckpointWriter(folder)
    for number, tensors in enumerate(blocks(source)):
        writer.write_shard(shard_name(number), tensors)
    writer.finish(read_json(source / "config.json"), source, logical_parameters=12345)
    return folder


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    return write(llama, tmp_path / "sharded")


def test_rewritten_checkpoint_loads_and_is_identical(llama: Path, sharded: Path) -> None:
    assert same_tensors(CheckpointReader(llama), CheckpointReader(sharded))
    assert torch.equal(logits(llama), logits(sharded))


def test_finish_copies_parent_files_byte_for_byte(llama: Path, sharded: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (sharded / name).read_bytes() == (llama / name).read_bytes()
    index = read_json(sharded / INDEX)
    tensors = CheckpointReader(llama)
    total = sum(tensors.info(name).nbytes for name in tensors)
    assert index["metadata"] == {"total_size": total, "total_parameters": 12345}
    assert not list(sharded.glob(".*"))


def test_same_tensors_give_same_bytes(llama: Path, sharded: Path, tmp_path: Path) -> None:
    again = write(llama, tmp_path / "again")
    files = sorted(path.name for path in sharded.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        assert (sharded / name).read_bytes() == (again / name).read_bytes()


def test_hashes_tell_identity_from_change(llama: Path, sharded: Path) -> None:
    parent, child = CheckpointReader(llama), CheckpointReader(sharded)
    hashes = [parent.tensor_sha256(name) for name in parent]
    assert hashes == [child.tensor_sha256(name) for name in child]
    name = "model.norm.weight"
    tensors = {key: child[key].clone() for key in child}
    tensors[name].view(torch.int16)[5] ^= 1  # one bit
    CheckpointWriter(sharded).write_shard("model-other.safetensors", tensors)
    (sharded / INDEX).unlink()
    (sharded / "model-other.safetensors").rename(sharded / SINGLE)
    changed = CheckpointReader(sharded)
    assert [n for n in parent if parent.tensor_sha256(n) != changed.tensor_sha256(n)] == [name]


def test_reader_knows_shape_and_dtype_unread(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    assert reader.shape("model.layers.0.mlp.down_proj.weight") == (64, 96)
    assert reader.dtype("model.layers.0.mlp.down_proj.weight") is torch.bfloat16
    with pytest.raises(ModelError, match=r"holds no tensor model\.nothing"):
        reader["model.nothing"]


def test_checkpoint_bytes_counts_what_loading_reads(sharded: Path) -> None:
    (sharded / "notes.md").write_text("not needed")
    needed = [path for path in sharded.iterdir() if path.name != "notes.md"]
    assert checkpoint_files(sharded) == sorted(needed)
    assert checkpoint_bytes(sharded) == sum(path.stat().st_size for path in needed)


def test_truncated_shard_is_refused_and_rewritten(sharded: Path, llama: Path) -> None:
    shard = sharded / shard_name(1)
    whole = shard.read_bytes()
    writer = CheckpointWriter(sharded)
    assert writer.has_shard(shard.name)
    for cut in (len(whole) - 1, 40, 3):
        shard.write_bytes(whole[:cut])
        assert not writer.has_shard(shard.name)
        with pytest.raises(ModelError, match=r"model-block-00001.safetensors"):
            CheckpointReader(sharded)
    writer.write_shard(shard.name, blocks(llama)[1])
    assert shard.read_bytes() == whole


def test_damaged_header_is_refused(sharded: Path) -> None:
    shard = sharded / shard_name(0)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xfe\x00{"
    shard.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        CheckpointReader(sharded)


def edit_index(folder: Path, name: str, file: str) -> None:
    index = read_json(folder / INDEX)
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_index_lies_are_refused(sharded: Path) -> None:
    pristine = (sharded / INDEX).read_text()
    edit_index(sharded, "model.norm.weight", "model-absent.safetensors")
    with pytest.raises(ModelError, match=r"model-absent\.safetensors, which does not exist"):
        CheckpointReader(sharded)
    (sharded / INDEX).write_text(pristine)
    edit_index(sharded, "model.extra.weight", shard_name(0))
    with pytest.raises(ModelError, match=r"model\.extra\.weight in .*, which lacks it"):
        CheckpointReader(sharded)
    edit_index(sharded, "model.extra.weight", "../elsewhere.safetensors")
    with pytest.raises(ModelError, match="not a plain file name"):
        CheckpointReader(sharded)
    (sharded / INDEX).write_text("{not json")
    with pytest.raises(ModelError, match="not valid JSON"):
        CheckpointReader(sharded)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="holds no safetensors") as caught:
        CheckpointReader(tmp_path)
    assert "pickled" in caught.value.hint


def test_a_tensor_in_two_shards_is_refused(llama: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "twice")
    for number in range(2):
        writer.write_shard(shard_name(number), {"model.norm.weight": torch.ones(3)})
    with pytest.raises(ModelError, match="stored twice"):
        writer.finish({}, llama, logical_parameters=1)
    assert not writer.finished


def test_slices_of_one_tensor_and_strided_views_are_stored(tmp_path: Path) -> None:
    fused = torch.arange(24.0).view(4, 6)
    parts = {"a": fused[:2], "b": fused[2:], "c": fused.T}
    CheckpointWriter(tmp_path).write_shard("model-x.safetensors", parts)
    (tmp_path / "model-x.safetensors").rename(tmp_path / SINGLE)
    assert same_tensors(CheckpointReader(tmp_path), parts)


def test_shards_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path).write_shard("model-x.safetensors", {"x": torch.ones(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "model-x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shard_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model-"):
        CheckpointWriter(tmp_path).write_shard("weights.bin", {})


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from compressor.formats import atomic, shards

def die(source, target):
    if Path(target).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

rename, atomic.os.replace = os.replace, die
writer = shards.CheckpointWriter(Path(sys.argv[1]))
for block in range(3):
    if not writer.has_shard(shards.shard_name(block)):
        writer.write_shard(shards.shard_name(block), {f"layer.{block}": torch.full((4096,), block)})
writer.finish({"model_type": "llama"}, Path(sys.argv[1]), logical_parameters=9)
"""


def run_killed(folder: Path, at: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), at]
    return subprocess.run(command, env=environment, check=False).returncode


def test_kill_between_write_and_rename_then_resume(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    writer = CheckpointWriter(folder)
    assert run_killed(folder, shard_name(1)) == -signal.SIGKILL
    assert writer.shards() == [shard_name(0)]
    assert not writer.has_shard(shard_name(1))
    assert list(folder.glob(".*.partial"))
    first = (folder / shard_name(0)).stat().st_mtime_ns
    assert run_killed(folder, INDEX) == -signal.SIGKILL
    assert len(writer.shards()) == 3
    assert not writer.finished
    assert run_killed(folder, "nowhere") == 0
    assert writer.finished
    assert (folder / shard_name(0)).stat().st_mtime_ns == first
    assert not list(folder.glob(".*"))
    tensors = CheckpointReader(folder)
    assert all(torch.equal(tensors[f"layer.{n}"], torch.full((4096,), n)) for n in range(3))


def test_what_a_killed_process_left_is_never_read_and_goes(sharded: Path) -> None:
    """Also what safetensors had not renamed yet, under a name of its own."""
    partial = sharded / f".{shard_name(7)}.partial"
    for left in (partial, sharded / f".{shard_name(8)}.partial"):
        left.mkdir()
        (left / shard_name(7)).write_bytes(b"half a sh")
        (left / ".tmpA1b2C3").write_bytes(b"half a sh")
    writer = CheckpointWriter(sharded)
    assert not writer.has_shard(shard_name(7))
    assert partial.name not in writer.shards()
    writer.write_shard(shard_name(7), {"x": torch.ones(2)})
    assert not partial.exists()
    atomic.remove_partial(sharded)
    assert not list(sharded.glob(".*"))


def test_safetensors_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before our rename, it has left nothing but the folder that the next write clears."""

    def die(*_: object) -> None:
        monkeypatch.undo()
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    seen: list[str] = []
    monkeypatch.setattr(atomic.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "codes", {"x": torch.ones(2)}, {})
    assert seen == [".codes.partial"]
    assert not list(tmp_path.iterdir())


def interrupt(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError("interrupted")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    atomic_write_json(path, {"b": 1, "a": "ü"})
    before = path.read_text()
    assert before.index('"a"') < before.index('"b"')
    with pytest.raises(ValueError, match="interrupted"):
        interrupt(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(path, float("nan"))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_refusing_file_system_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        atomic_write_text(tmp_path / "file" / "below.txt", "text")
    with pytest.raises(ResourceError, match="cannot write"):
        CheckpointWriter(tmp_path / "file").write_shard("model-x.safetensors", {"x": torch.ones(1)})


def test_template_folder_travels(llama: Path, tmp_path: Path) -> None:
    parent = shutil.copytree(llama, tmp_path / "parent")
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    child = write(parent, tmp_path / "child")
    assert (child / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
