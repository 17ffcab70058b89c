"""What the machine is asked for."""

from __future__ import annotations

import os

import pytest

from compressor.machine import prefer_huge_pages

HUGE = "THP_MEM_ALLOC_ENABLE"


def test_large_tensors_get_huge_pages_unless_the_user_says_no(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(HUGE, "0")
    prefer_huge_pages()
    assert os.environ[HUGE] == "0"
    monkeypatch.delenv(HUGE)
    prefer_huge_pages()
    assert os.environ[HUGE] == "1"
