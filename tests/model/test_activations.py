from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.errors import ResumeError
from compressor.model.activations import ActivationStore

SIZE = 4 * 2 * 3 * 5


def tensors(count: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5) for _ in range(count)]


def filled(folder: Path, budget: int, count: int = 4) -> ActivationStore:
    store = ActivationStore(folder, budget)
    for tensor in tensors(count):
        store.append(tensor)
    return store


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize(("budget", "files"), [(0, 4), (2 * SIZE, 2), (4 * SIZE, 0)])
def test_what_exceeds_the_budget_goes_to_files(tmp_path: Path, budget: int, files: int) -> None:
    store = filled(tmp_path / "s", budget)
    assert store.bytes_in_memory == SIZE * (4 - files)
    assert len(list((tmp_path / "s").glob("*"))) == files
    assert all(same_bits(a, b) for a, b in zip(store, tensors(), strict=True))


@pytest.mark.parametrize("budget", [0, 3 * SIZE, 1 << 20])
def test_saved_is_loaded_bit_for_bit(tmp_path: Path, budget: int) -> None:
    store = filled(tmp_path, budget)
    store.save("label")
    store.free()
    loaded = ActivationStore.load(tmp_path, budget, "label")
    assert len(loaded) == 4
    assert all(same_bits(a, b) for a, b in zip(loaded, tensors(), strict=True))


def test_bf16_and_odd_bit_patterns_survive(tmp_path: Path) -> None:
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-40]).bfloat16()
    odd = torch.cat([odd, torch.tensor([0x7FC1], dtype=torch.int16).view(torch.bfloat16)])
    store = ActivationStore(tmp_path, 0)
    store.append(odd)
    store.save()
    assert same_bits(ActivationStore.load(tmp_path, 0)[0], odd)


def test_without_manifest_nothing_was_saved(tmp_path: Path) -> None:
    """What a crash in the middle of `save` leaves."""
    filled(tmp_path, 0)
    (tmp_path / "activations.tmp").write_text("{")
    with pytest.raises(ResumeError, match="no saved activations"):
        ActivationStore.load(tmp_path, 0)


def test_writing_anew_invalidates_what_was_saved(tmp_path: Path) -> None:
    filled(tmp_path, 0).save()
    filled(tmp_path, 0, count=1)
    with pytest.raises(ResumeError):
        ActivationStore.load(tmp_path, 0)


def test_a_cut_file_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path, 0).save()
    path = tmp_path / "batch-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResumeError, match="damaged"):
        ActivationStore.load(tmp_path, 0)


def test_another_label_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 0).save("one")
    with pytest.raises(ResumeError, match="another text"):
        ActivationStore.load(tmp_path, 0, "two")


def test_free_keeps_only_what_was_saved(tmp_path: Path) -> None:
    filled(tmp_path / "spilled", 0).free()
    assert not (tmp_path / "spilled").exists()
    saved = filled(tmp_path / "saved", 0)
    saved.save()
    saved.free()
    assert len(ActivationStore.load(tmp_path / "saved", 0)) == 4
    saved.delete()
    assert not (tmp_path / "saved").exists()
