"""Time and memory of a piece of work; a GPU is played by the two functions that are asked."""

from __future__ import annotations

import pytest
import torch

from compressor.meter import Meter


def test_memory_that_is_held_for_a_while_is_seen() -> None:
    with Meter() as before:
        pass
    with Meter() as meter:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        while meter.peaks()["peak_bytes"] < before.peaks()["peak_bytes"] + held.numel() // 2:
            pass
    assert meter.seconds > 0
    if not torch.cuda.is_available():
        assert meter.peaks()["device_peak_bytes"] == 0


def test_the_peak_of_a_gpu_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [7 << 30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    with Meter() as meter:
        assert meter.peaks()["device_peak_bytes"] == 0
        peak[0] = 3 << 30
        assert meter.peaks()["device_peak_bytes"] == 3 << 30
