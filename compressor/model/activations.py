"""Hidden states between two blocks: in memory up to a budget, in files beyond it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.disk import flush, writing
from compressor.errors import ResumeError

_MANIFEST = "activations.json"
_KEY = "hidden"


class ActivationStore:
    """Numbered tensors, put in once and read many times, on the CPU.

    Threads may put in and read different ones at the same time.

    Args:
        folder: for the files; made when first needed.
        memory_budget_bytes: tensors that would take the memory in use beyond this go to files.
    """

    def __init__(self, folder: Path, memory_budget_bytes: int) -> None:
        self.folder = folder
        self.budget = memory_budget_bytes
        self._held: dict[int, Tensor | None] = {}
        self._counting = threading.Lock()
        self.bytes_in_memory = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """The tensor put in as number `index`; do not write into it."""
        held = self._held[index]
        # What is read lies in a view of the file, which nobody could give back: hence the copy.
        return load_file(self._path(index))[_KEY].clone() if held is None else held

    def held(self, index: int) -> tuple[Tensor, ...]:
        """The tensor put in as number `index`, if it is in memory: it is the store's own."""
        held = self._held[index]
        return () if held is None else (held,)

    def append(self, tensor: Tensor) -> None:
        """`put` as the next number."""
        self.put(len(self), tensor)

    def put(self, index: int, tensor: Tensor) -> None:
        """Add a tensor of any shape and dtype; its bytes are kept exactly.

        Args:
            index: its number; in the end there must be one for each from 0.
            tensor: what to keep.

        Raises:
            ResourceError: it goes to a file, and the disk refused it.
        """
        tensor = tensor.detach().cpu().contiguous()
        with self._counting:
            fits = self.bytes_in_memory + tensor.nbytes <= self.budget
            self.bytes_in_memory += tensor.nbytes if fits else 0
        if not fits:
            self._write(index, tensor)
        self._held[index] = tensor if fits else None

    def save(self, label: str = "") -> None:
        """Put everything on disk so that `load` finds it after a crash at any moment.

        From then on it is read from there: what is on disk need not be held as well.

        The manifest is renamed into place last: without it the folder counts as absent.

        Args:
            label: what the activations belong to; `load` asks for the same.

        Raises:
            ResourceError: the disk refused them.
        """
        sizes = []
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for index, held in sorted(self._held.items()):
                if held is not None:
                    self._write(index, held)
                flush(self._path(index))
                sizes.append(self._path(index).stat().st_size)
            manifest, temporary = self.folder / _MANIFEST, self.folder / f"{_MANIFEST}.tmp"
            temporary.write_text(json.dumps({"label": label, "sizes": sizes}))
            flush(temporary)
            temporary.replace(manifest)
            flush(self.folder)
        self._held = dict.fromkeys(self._held)
        self.bytes_in_memory = 0

    @classmethod
    def load(cls, folder: Path, memory_budget_bytes: int, label: str = "") -> ActivationStore:
        """What `save` left; tensors stay on disk and are read when asked for.

        Raises:
            ResumeError: nothing complete was saved there, or under another label.
        """
        store = cls(folder, memory_budget_bytes)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            sizes, found = manifest["sizes"], manifest["label"]
            whole = all(
                store._path(index).stat().st_size == size for index, size in enumerate(sizes)
            )
        except (OSError, ValueError, KeyError):
            raise ResumeError(
                f"{folder} holds no saved activations, so the stage cannot go on",
                "start again in another folder with -o",
            ) from None
        if found != label:
            raise ResumeError(f"the activations in {folder} belong to another text or precision")
        if not whole:
            raise ResumeError(f"the activations in {folder} are damaged: a file changed its size")
        store._held = dict.fromkeys(range(len(sizes)))
        return store

    def free(self) -> None:
        """Forget everything but what was saved, whose files stay for `load`."""
        self._held = {}
        self.bytes_in_memory = 0
        if not (self.folder / _MANIFEST).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def delete(self) -> None:
        """Forget everything, also what was saved."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        self.free()

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"

    def _write(self, index: int, tensor: Tensor) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Whatever an earlier run saved here stops being complete with the first new file.
            (self.folder / _MANIFEST).unlink(missing_ok=True)
            save_file({_KEY: tensor}, self._path(index))
