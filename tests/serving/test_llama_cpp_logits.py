"""The logits that llama-perplexity writes, from the definition of its file."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.programs import EngineFailed
from compressor.serving.ask import Question
from compressor.serving.llama_cpp import _LOAD, _SPEED, _timing, read_logits

VOCABULARY, LENGTH = 7, 6
WINDOWS = ((1, 2, 3, 4, 5, 6), (0, 6, 5, 4, 3, 2))


def question(windows: tuple[tuple[int, ...], ...] = WINDOWS) -> Question:
    return Question("", windows, (), ())


def write(path: Path, logprobs: np.ndarray, magic: bytes = b"_logits_") -> None:
    """As perplexity.cpp does: steps of 1/65535 of the range between the least and the largest."""
    content = magic + struct.pack("<3i", LENGTH, VOCABULARY, len(WINDOWS))
    content += struct.pack(f"<{2 * LENGTH}i", *(token for row in WINDOWS for token in row))
    for row in logprobs.reshape(-1, VOCABULARY):
        low = max(row.min(), row.max() - 16)
        step = np.float32((row.max() - low) / 65535)
        values = [round(float((p - low) / step)) if p > low else 0 for p in row]
        content += struct.pack("<2f", step, low) + struct.pack("<7H", *values) + b"\0\0"
    path.write_bytes(content)


@pytest.fixture
def logprobs() -> np.ndarray:
    logits = np.random.default_rng(0).normal(size=(2, 2, VOCABULARY)) * 3
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def test_log_probabilities_come_back(tmp_path: Path, logprobs: np.ndarray) -> None:
    write(tmp_path / "logits", logprobs)
    found = read_logits(tmp_path / "logits", question())
    for window in range(2):
        for place in range(2):  # of the second half: tokens 4 and 5 of six
            token = WINDOWS[window][4 + place]
            exact = logprobs[window, place, token]
            if exact > logprobs[window, place].min():
                assert found[window, place] == pytest.approx(exact, abs=3e-4)
            else:
                assert np.isnan(found[window, place])


def test_what_is_beyond_the_range_is_not_a_number(tmp_path: Path, logprobs: np.ndarray) -> None:
    logprobs[0, 0, WINDOWS[0][4]] = logprobs[0, 0].max() - 20
    write(tmp_path / "logits", logprobs)
    found = read_logits(tmp_path / "logits", question())
    assert np.isnan(found[0, 0])


def test_other_tokens_and_other_forms_are_refused(tmp_path: Path, logprobs: np.ndarray) -> None:
    write(tmp_path / "logits", logprobs)
    other = (WINDOWS[0], (*WINDOWS[1][:3], 0, *WINDOWS[1][4:]))
    with pytest.raises(EngineFailed, match="other tokens"):
        read_logits(tmp_path / "logits", question(other))
    begun = ((9, *WINDOWS[0][1:]), WINDOWS[1])  # the token that begins a text replaces the first
    assert read_logits(tmp_path / "logits", question(begun)).shape == (2, 2)
    write(tmp_path / "logits", logprobs, magic=b"_lagits_")
    with pytest.raises(EngineFailed, match="not known"):
        read_logits(tmp_path / "logits", question())


def test_times_are_read_from_what_it_prints() -> None:
    log = (
        "0.00.245.142 I common_perf_print:        load time =       6.01 ms\n"
        "0.00.245.150 I common_perf_print: prompt eval time =       5.86 ms /     4 tokens "
        "(    1.46 ms per token,   682.94 tokens per second)\n"
        "0.00.245.158 I common_perf_print:        eval time =      13.95 ms /    31 runs   "
        "(    0.45 ms per token,  2222.38 tokens per second)\n"
    )
    speed, load = _SPEED.search(log), _LOAD.search(log)
    assert speed is not None
    assert load is not None
    assert (speed[1], load[1]) == ("2222.38", "6.01")


PROGRAM = """#!/bin/sh
echo run >> {folder}/runs
echo "common_perf_print:        load time =       6.01 ms" >&2
[ "$(wc -l < {folder}/runs)" -lt {good} ] && exit 0
echo "common_perf_print:        eval time = 1 ms / 31 runs ( 0.45 ms, 22.5 tokens per second)" >&2
echo "common_perf_print:       total time =       2 ms" >&2
"""


@pytest.mark.parametrize(("good", "speed", "runs"), [(1, 22.5, 1), (3, 22.5, 3), (99, None, 8)])
def test_a_log_without_its_end_is_asked_for_again(
    tmp_path: Path, good: int, speed: float | None, runs: int
) -> None:
    program = tmp_path / "llama-completion"
    program.write_text(PROGRAM.format(folder=tmp_path, good=good))
    program.chmod(0o755)
    asked = replace(question(), prompts=("The",), timed=32)
    assert _timing(tmp_path, tmp_path / "file", asked) == (0.00601, speed)
    assert len((tmp_path / "runs").read_text().splitlines()) == runs
