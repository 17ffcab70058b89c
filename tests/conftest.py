from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from compressor.formats import llama_quantize
from compressor.recipe import Recipe
from tests import runs
from tests.command import Compress, Result, leave

settings.register_profile("ours", deadline=None)  # a busy machine fails no example
settings.load_profile("ours")

SMALL_RECIPE = """\
calibration: {samples: 4, length: 64, batch_size: 2}
stages:
  - method: quantize.gptq
    bits: 4
    group_size: 64
evaluate: {documents: 2, length: 128, resamples: 200}
gates: {max_kl: 5.0}
"""


# Files that take minutes go first: a long one at the end leaves all cores but one without work.
LONG = frozenset(
    f"test_{name}"
    for name in (
        "shipped_recipes", "resume", "readme", "requantize", "memory", "engine", "publish",
        "publish_text", "second_device", "team", "prune", "wheel", "recover", "allocate_runs",
        "drafts",
    )
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program in the place of llama-quantize, the same on every machine; also for children."""
    script = Path(__file__).parent / "stand_in" / "llama_quantize.py"
    program: Path = tmp_path_factory.mktemp("bin") / "llama-quantize"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(0o755)
    os.environ[llama_quantize.VARIABLE] = str(program)
    return program


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe and load it: `recipe_file(text, "stages.0.bits=3")`."""

    def load(text: str = SMALL_RECIPE, *overrides: str) -> Recipe:
        return runs.load(tmp_path, text, *overrides)

    return load


@pytest.fixture
def compress(capfd: pytest.CaptureFixture[str]) -> Compress:
    """Run the command line in this process; no command may end in a traceback."""

    def call(*args: str | Path) -> Result:
        code, streams = leave(*args), capfd.readouterr()
        assert "Traceback" not in streams.err
        return Result(code, streams.out, streams.err)

    return call
