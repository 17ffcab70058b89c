"""The text that a target writes for its draft: requests, answers, interruptions, time boxes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import resources
from compressor.decoding import writing
from compressor.decoding.cached import CachedModel
from compressor.decoding.prompts import as_prompt, asking
from compressor.decoding.writing import OWN, TextOptions, draft_text
from compressor.model.load import load_model, load_tokenizer
from compressor.progress import SilentObserver
from compressor.team import ALONE, Team
from compressor.types import TokenBatch

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = TextOptions(
    rows=12, length=24, generated=0.5, prompt=6, temperatures=(0.0, 1.0), batch=4, seed=1
)


@cache
def target() -> CachedModel:
    return CachedModel(load_model(resources.builtin_model("tiny"), "cpu", torch.float32))


def tokenizer(template: str | None = TEMPLATE) -> Any:
    found = load_tokenizer(resources.builtin_model("tiny"))
    found.chat_template = template
    return found


def text() -> list[TokenBatch]:
    ids = torch.randint(5, 4000, (10, 24), generator=torch.Generator().manual_seed(2))
    return [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("prose",) * 10)]


def written(
    folder: Path, options: TextOptions, template: str | None = TEMPLATE, team: Team = ALONE
) -> list[Any]:
    model = target() if team.alone else CachedModel(target().model)  # each has a cache of its own
    batches = draft_text(
        model, text(), tokenizer(template), options, folder, SilentObserver(), team
    )
    return [
        (ids[mask].tolist(), domain)
        for batch in batches
        for ids, mask, domain in zip(batch.input_ids, batch.mask, batch.domains, strict=True)
    ]


def test_a_template_in_two_parts() -> None:
    own = tokenizer()
    parts = asking(own)
    assert parts is not None
    before, after = map(own.decode, parts)
    whole = own.decode(as_prompt(own, own("a b")["input_ids"]))
    assert whole.startswith(before)
    assert whole.endswith(after)
    assert before.strip() == "<user>"
    assert asking(tokenizer(None)) is None
    assert asking(tokenizer("{{ messages | length }}")) is None


def test_a_target_writes_its_own_requests(tmp_path: Path) -> None:
    rows = written(tmp_path, replace(OPTIONS, own_requests=True))
    parts = asking(tokenizer())
    assert parts is not None
    before, after = parts
    own = [row for row, domain in rows if domain == OWN]
    assert len(rows) == 12
    assert len(own) == 6
    for row in own:
        assert row[: len(before)] == before
        places = range(len(before), len(row) - len(after))
        assert any(row[place : place + len(after)] == after for place in places)
        assert len(row) <= 24
    assert len({tuple(row) for row in own}) == 6


def test_without_a_template_there_are_no_requests(tmp_path: Path) -> None:
    asked = written(tmp_path / "asked", replace(OPTIONS, own_requests=True), None)
    assert asked == written(tmp_path / "plain", OPTIONS, None)
    assert {domain for _, domain in asked} == {"prose"}


def test_writing_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_TOGETHER", 2)
    whole = written(tmp_path, OPTIONS)
    kept = sorted((tmp_path / "written").glob("*.safetensors"))
    assert len(kept) == 3
    kept[1].unlink()
    times = [path.stat().st_mtime_ns for path in (kept[0], kept[2])]
    assert written(tmp_path, OPTIONS) == whole
    assert [path.stat().st_mtime_ns for path in (kept[0], kept[2])] == times


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((folder / "written").glob("*.safetensors"))]


def test_more_text_takes_over_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_TOGETHER", 4)
    written(tmp_path, OPTIONS)  # batches of 4 and 2 rows
    before = times(tmp_path)
    more = replace(OPTIONS, rows=20)  # 4, 4 and 2
    found = written(tmp_path, more)
    after = times(tmp_path)
    assert (len(before), len(after)) == (2, 3)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert found == written(tmp_path / "new", more)
    assert times(tmp_path) == after
    assert written(tmp_path, OPTIONS) == written(tmp_path / "old", OPTIONS)  # and less again


OTHERS = {
    "seed": {"seed": 2},
    "length": {"length": 20},
    "prompt": {"prompt": 5},
    "temperatures": {"temperatures": (0.5, 1.0)},
    "requests": {"own_requests": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_text_of_other_options_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(writing, "_TOGETHER", 3)
    options = replace(OPTIONS, **OTHERS[other])
    written(tmp_path, OPTIONS)
    assert written(tmp_path, options) == written(tmp_path / "new", options)


def test_text_of_another_target_or_template_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(tmp_path, OPTIONS)
    plain = written(tmp_path, OPTIONS, None)
    assert plain == written(tmp_path / "plain", OPTIONS, None) != first
    other = CachedModel(load_model(resources.builtin_model("tiny"), "cpu", torch.float32))
    other.model.model.norm.weight.data.neg_()
    monkeypatch.setattr(sys.modules[__name__], "target", lambda: other)
    found = written(tmp_path, OPTIONS, None)
    assert found == written(tmp_path / "other", OPTIONS, None) != plain


def test_a_time_box_keeps_the_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_TOGETHER", 2)
    rows = written(tmp_path, replace(OPTIONS, seconds=1e-9))
    assert len(rows) == 4
    given = {tuple(ids.tolist()) for ids in text()[0].input_ids}
    assert sum(tuple(row) in given for row, _ in rows) == 2


@dataclass(frozen=True)
class Threads(Team):
    """A process of a team, as a thread."""

    said: list[Any] = ...  # type: ignore[assignment]
    meeting: threading.Barrier = ...  # type: ignore[assignment]

    def gather(self, said: Any) -> list[Any]:
        self.said[self.rank] = said
        self.meeting.wait()
        heard = list(self.said)
        self.meeting.wait()
        return heard

    def hear(self, said: Any) -> Any:
        return self.gather(said)[0]


def by_threads(size: int, folder: Path, options: TextOptions) -> Sequence[list[Any]]:
    said, meeting = [None] * size, threading.Barrier(size, timeout=60)
    team = [Threads(rank, size, said, meeting) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda one: written(folder, options, None, one), team))


def test_what_is_written_does_not_depend_on_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_TOGETHER", 2)
    options = replace(OPTIONS, rows=20)  # five batches
    alone = written(tmp_path / "alone", options, None)
    assert by_threads(3, tmp_path / "three", options) == [alone] * 3
    for number in (0, 3):
        (tmp_path / "three" / "written" / f"{number:06d}.safetensors").unlink()
    before = times(tmp_path / "three")
    assert by_threads(2, tmp_path / "three", options) == [alone] * 2
    assert [time for time in times(tmp_path / "three") if time in before] == before


def test_a_time_box_ends_all_processes_after_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they wrote at once is used, and one process that goes on takes no more and no less."""
    monkeypatch.setattr(writing, "_TOGETHER", 2)
    options = replace(OPTIONS, rows=20, seconds=1e-9)
    one, two = by_threads(2, tmp_path, options)
    assert len(one) == 8  # two batches of two rows, and as much of the corpus
    assert one == two == written(tmp_path, options, None)
