"""What the machine is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compressor.machine import prefer_huge_pages, sleep_soon

HUGE = "THP_MEM_ALLOC_ENABLE"
SPINS = "GOMP_SPINCOUNT"


def test_large_tensors_get_huge_pages_unless_the_user_says_no(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(HUGE, "0")
    prefer_huge_pages()
    assert os.environ[HUGE] == "0"
    monkeypatch.delenv(HUGE)
    prefer_huge_pages()
    assert os.environ[HUGE] == "1"


def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SPINS, "7")
    sleep_soon()
    assert os.environ[SPINS] == "7"
    monkeypatch.delenv(SPINS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    sleep_soon()
    assert SPINS not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    sleep_soon()
    assert os.environ[SPINS] == "1000"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")
def test_the_command_sets_it_before_openmp_looks() -> None:
    clean = {name: value for name, value in os.environ.items() if name != SPINS}
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "doctor"],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{SPINS} = '1000'" in done.stderr
