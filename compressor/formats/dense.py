"""The checkpoint as it is: ordinary weights, for any program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from compressor.formats.exporters import Source
from compressor.formats.files import checkpoint_files


def write(source: Source, out: Path) -> None:
    """The same files under a second name; copies where the file system has no links.

    Raises:
        ModelError: the checkpoint is damaged.
    """
    for path in checkpoint_files(source.checkpoint):
        target = out / path.relative_to(source.checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)
