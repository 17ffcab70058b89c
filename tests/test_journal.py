from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import ResumeError
from compressor.journal import Journal


def test_events_survive_reopening(tmp_path):
    first = Journal(tmp_path / "journal.jsonl")
    first.append("one", stage=1, text="naïve")
    first.append("two", stage=2, block=0)
    again = Journal(tmp_path / "journal.jsonl")
    assert again.events == first.events
    assert again.find("one", stage=1)["text"] == "naïve"
    assert again.find("one", stage=2) is None


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    journal = Journal(path)
    journal.append("one", note="é" * 10)
    whole = path.read_bytes()
    journal.append("two", note="a longer line, so that any cut falls inside of it, é")
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = Journal(path)
    assert [event["event"] for event in again.events] == ["one"]
    again.append("three")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["one", "three"]


def test_find_returns_the_latest(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append("run_started", resumed=False)
    journal.append("run_started", resumed=True)
    assert journal.find("run_started")["resumed"] is True
    assert len(journal.all("run_started")) == 2


LACKING = b'{"event": "stage_done", "time": 1.0, "stage": "01-quantize.rtn"}'
LINES = [b"not json", b"\xff\x00", b"5", b"[]", b"{}", b'{"event": "a"}', LACKING]


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_line_is_named(tmp_path, line):
    journal = Journal(tmp_path / "j")
    journal.append("one")
    journal.path.write_bytes(line + b"\n" + journal.path.read_bytes())
    with pytest.raises(ResumeError, match="j:1 is damaged"):
        Journal(journal.path)
