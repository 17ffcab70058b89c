"""Recipes run where there are two memories; see tests/second_device.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_recipes_run_on_a_device_that_is_not_the_processor() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/second_device_cases.py"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stdout[-5000:]
