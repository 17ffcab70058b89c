"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compressor.cli import main


@dataclass(frozen=True)
class Result:
    """Exit code and both streams of one command."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Compress = Callable[..., Result]


def leave(*args: str | Path) -> int:
    """Run a command and give its exit code."""
    hook = sys.excepthook
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
    finally:
        sys.excepthook = hook
    assert isinstance(caught.value.code, int)
    return caught.value.code


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with these variables beside the present ones."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
