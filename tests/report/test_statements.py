from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from compressor.report.schema import Evidence, Report, Statement
from compressor.report.statements import pointer, problems, resolve, state
from tests.report import example


@pytest.fixture(scope="module")
def report() -> Report:
    return example.report()


@pytest.fixture(scope="module")
def document(report: Report) -> dict[str, Any]:
    return report.model_dump(mode="json")


def sentences(report: Report) -> tuple[Statement, ...]:
    return (*report.claims, *report.warnings)


def test_every_sentence_stands_on_its_evidence(report: Report, document: dict[str, Any]) -> None:
    assert len(report.claims) >= 9
    assert len(report.warnings) >= 3
    assert problems(document, sentences(report)) == []
    for statement in sentences(report):
        for item in statement.evidence:
            resolve(document, item.pointer)
            assert item.shown in statement.text


def assign(document: dict[str, Any], path: str, value: object) -> None:
    parent, _, key = path.rpartition("/")
    holder = resolve(document, parent)
    holder[int(key) if isinstance(holder, list) else key.replace("~1", "/")] = value


def mutated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: mutated(entry) for key, entry in value.items()}
    if isinstance(value, (int, float)):
        return value * 1.5 + 0.25
    return None


def test_every_mutated_number_is_noticed(report: Report, document: dict[str, Any]) -> None:
    tried = 0
    for statement in sentences(report):
        for item in statement.evidence:
            changed = mutated(resolve(document, item.pointer))
            if changed is None or item.style == "key":
                continue
            broken = copy.deepcopy(document)
            assign(broken, item.pointer, changed)
            assert problems(broken, [statement]), (statement.id, item.pointer)
            tried += 1
    assert tried >= 15


def test_every_mutated_digit_of_a_sentence_is_noticed(
    report: Report, document: dict[str, Any]
) -> None:
    for statement in sentences(report):
        for match in re.finditer(r"\d", statement.text):
            digit = str((int(match[0]) + 1) % 10)
            text = statement.text[: match.start()] + digit + statement.text[match.end() :]
            assert problems(document, [statement.model_copy(update={"text": text})])


def test_a_pointer_that_leads_nowhere_is_noticed(document: dict[str, Any]) -> None:
    for path in ("/run/nothing", "/variants/99/label", "/run/seed/0", "/run/~2"):
        lost = Evidence(pointer=path, style="text", shown="x")
        found = problems(document, [Statement(id="lost", text="x", evidence=(lost,))])
        assert found == [f"lost: nothing stands at {path}"]


def test_a_number_without_evidence_is_noticed(document: dict[str, Any]) -> None:
    bare = Statement(id="bare", text="It is 3 times smaller.", evidence=())
    assert "without evidence" in problems(document, [bare])[0]


def test_pointers_follow_rfc_6901() -> None:
    document = {"a/b": {"m~n": [{"x": 7}]}}
    path = pointer("a/b", "m~n", 0, "x")
    assert path == "/a~1b/m~0n/0/x"
    assert resolve(document, path) == 7
    made = state(document, "id", "{name} has {n}", name=(pointer("a/b"), "key"), n=(path, "count"))
    assert made.text == "a/b has 7"
    assert problems(document, [made]) == []
