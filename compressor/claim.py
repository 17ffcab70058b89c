"""A run's directory before work starts: who may write it, whether it fits, what it was made of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor.disk import writing
from compressor.errors import ResourceError, ResumeError, UsageError
from compressor.paths import real
from compressor.recipe import UNDECISIVE, Recipe
from compressor.report.numbers import size
from compressor.sections import Lock


def require_disk(out: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold; what a resumed run has written counts as free."""
    existing = next(parent for parent in (out, *real(out).parents) if parent.exists())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free + written
    if free < needed:
        raise ResourceError(
            f"the run needs {size(needed)} of disk and {existing} has {size(free)}",
            "choose another folder with -o",
        )


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Two processes must not write one run."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            try:
                yield
            finally:
                _remove_if_unused(folder)
    except Timeout:
        raise ResumeError(f"another process is writing {folder}", "wait for it") from None


def require_empty(folder: Path) -> None:
    """Refuse to begin a run among files of somebody else's.

    Raises:
        UsageError: the folder holds some.
    """
    found = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")
    if others := [name for name in found if name != ".lock"]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{folder} holds {others[0]}{more}, and no run that could go on",
            "name an empty or a new folder with -o",
        )


def _remove_if_unused(folder: Path) -> None:
    """A run that was refused before it wrote anything leaves no trace."""
    if (folder / "recipe.lock.yaml").exists():
        return
    (folder / ".lock").unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def differences(recorded: Recipe, recipe: Recipe, lock: Lock) -> list[str]:
    """What a run on disk was made of that differs from what is asked for now, one line each.

    Deliverables that were added later are none of it.
    """
    was, now = (_flat(r.model_dump(mode="json", exclude=UNDECISIVE)) for r in (recorded, recipe))
    assert recorded.lock is not None
    was |= _flat({"lock": recorded.lock.model_dump(mode="json", exclude={"added"})})
    now |= _flat({"lock": lock.model_dump(mode="json", exclude={"added"})})
    return [
        f"{key}: {was.get(key, 'absent')} then, {now.get(key, 'absent')} now"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def refuse_changes(what: str, recorded: Recipe, recipe: Recipe, lock: Lock) -> None:
    """Raise ResumeError naming every difference, if there is one."""
    found = differences(recorded, recipe, lock)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ResumeError(f"{what}:{lines}", "choose another folder with -o, or remove this one")
