"""The checkpoint as it is: ordinary weights, for any program."""

from __future__ import annotations

from pathlib import Path

from compressor.disk import link_or_copy
from compressor.formats.exporters import Source
from compressor.formats.files import checkpoint_files


def write(source: Source, out: Path) -> None:
    """The same files under a second name; copies where the file system has no links.

    Raises:
        ModelError: the checkpoint is damaged.
        ResourceError: the file system refused.
    """
    for path in checkpoint_files(source.checkpoint):
        link_or_copy(path, out / path.relative_to(source.checkpoint))
