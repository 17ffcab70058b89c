"""A disk that fills up: one sentence wherever large files are written, and nothing half-written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from compressor.disk import link_or_copy, writing
from compressor.errors import ResourceError
from compressor.formats.atomic import atomic_write_bytes, replacing
from compressor.formats.shards import save_tensors
from compressor.journal import Journal
from compressor.model.activations import ActivationStore
from compressor.model.parking import ParkingLot
from tests.helpers import files_end_at

SMALL, LARGE = 1 << 12, 1 << 16


def _cache(folder: Path) -> None:
    with replacing(folder / "states.safetensors") as part:
        save_file({"hidden": torch.ones(LARGE)}, part)


def _activations(folder: Path) -> None:
    ActivationStore(folder, 0).append(torch.ones(LARGE))


def _saved_activations(folder: Path) -> None:
    store = ActivationStore(folder, 1 << 30)
    store.append(torch.ones(LARGE))
    store.save()


def _journal(folder: Path) -> None:
    Journal(folder / "journal.jsonl").append("noted", text="x" * LARGE)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: atomic_write_bytes(folder / "report.json", b"x" * LARGE),
    "codes": lambda folder: save_tensors(folder / "codes", {"w": torch.ones(LARGE)}, {}),
    "cache": _cache,
    "activations": _activations,
    "saved activations": _saved_activations,
    "journal": _journal,
    "parking": lambda folder: ParkingLot(folder).park(torch.ones(LARGE).untyped_storage()),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_every_large_writer_says_what_is_full(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    with files_end_at(SMALL), pytest.raises(ResourceError) as caught:
        write(tmp_path)
    assert caught.value.exit_code == 3
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot write {tmp_path}")
    assert first.endswith(": File too large")
    assert "the same command goes on" in second
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in left] in ([], ["journal.jsonl"])  # whose torn line is dropped


def test_what_was_not_parked_keeps_its_bytes(tmp_path: Path) -> None:
    lot, tensor = ParkingLot(tmp_path), torch.arange(LARGE)
    with files_end_at(SMALL), pytest.raises(ResourceError):
        lot.park(tensor.untyped_storage())
    assert torch.equal(tensor, torch.arange(LARGE))
    lot.fetch(lot.park(tensor.untyped_storage()))  # there is room again
    assert torch.equal(tensor, torch.arange(LARGE))


def test_a_torn_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("first")
    with files_end_at(SMALL), pytest.raises(ResourceError):
        journal.append("second", text="x" * LARGE)
    assert (tmp_path / "journal.jsonl").stat().st_size > 100
    assert [event["event"] for event in Journal(tmp_path / "journal.jsonl").events] == ["first"]


@pytest.mark.parametrize(
    ("number", "helps"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)]
)
def test_the_sentence_has_path_and_reason(number: int, helps: bool, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, writing(tmp_path / "file"):
        raise OSError(number, "as the system says it")
    assert caught.value.message.startswith(f"cannot write {tmp_path / 'file'}: ")
    assert bool(caught.value.hint) is helps


def test_other_faults_of_safetensors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="InvalidTensor"), writing(tmp_path):
        raise SafetensorError("Error while serializing: InvalidTensorView")


def test_a_file_gets_a_second_name_or_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x" * LARGE)
    (tmp_path / "symlink").symlink_to(tmp_path / "a")
    link_or_copy(tmp_path / "symlink", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").samefile(tmp_path / "a")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "no links here")

    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "new" / "b")
    assert not (tmp_path / "new" / "b").samefile(tmp_path / "a")
    assert (tmp_path / "new" / "b").read_bytes() == b"x" * LARGE
    with files_end_at(SMALL), pytest.raises(ResourceError, match=r"cannot write .*new/b"):
        link_or_copy(tmp_path / "a", tmp_path / "new" / "b")
