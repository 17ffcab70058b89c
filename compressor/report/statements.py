"""Sentences that cannot say more than the report knows.

A statement is built from a template and pointers into the report; each pointer is printed with
a named style. `problems` repeats that from the finished report: it fails on a number that was
changed on either side, on a pointer that leads nowhere, and on a digit that no pointer covers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from compressor.report import numbers
from compressor.report.schema import Evidence, StageFacts, Statement, Style

Document = dict[str, Any]

# Names of things that hold a digit without being a measurement.
TERMS = ("95 % interval", "99.9 % quantile")


def pointer(*parts: str | int) -> str:
    """JSON pointer (RFC 6901) from its parts."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def resolve(document: Document, path: str) -> Any:
    """What a JSON pointer points to.

    Raises:
        LookupError: nothing stands there.
    """
    value: Any = document
    for part in path.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and key.isdigit():
            value = value[int(key)]
        elif isinstance(value, dict):
            value = value[key]
        else:
            raise KeyError(f"{path}: {key!r} has no parent that holds it")
    return value


def _printed(document: Document, path: str, style: Style) -> str:
    value = resolve(document, path)
    if style == "key":
        return path.rsplit("/", 1)[1].replace("~1", "/").replace("~0", "~")
    return str(len(value)) if style == "length" else numbers.shown(value, style)


def state(
    document: Document, identifier: str, template: str, **places: tuple[str, Style]
) -> Statement:
    """A statement from `template`, whose fields are named like `places` (pointer, style)."""
    evidence = {
        name: Evidence(pointer=path, style=style, shown=_printed(document, path, style))
        for name, (path, style) in places.items()
    }
    text = template.format(**{name: item.shown for name, item in evidence.items()})
    return Statement(id=identifier, text=text, evidence=tuple(evidence.values()))


def problems(document: Document, statements: Iterable[Statement]) -> list[str]:
    """Everything the sentences say that the report does not support; empty when all is well."""
    return [problem for statement in statements for problem in _problems(document, statement)]


def _problems(document: Document, statement: Statement) -> Iterator[str]:
    rest = statement.text
    for item in sorted(statement.evidence, key=lambda item: -len(item.shown)):
        try:
            expected = _printed(document, item.pointer, item.style)
        except LookupError:
            yield f"{statement.id}: nothing stands at {item.pointer}"
            continue
        if expected != item.shown:
            yield f"{statement.id}: {item.pointer} is {expected}, printed as {item.shown}"
        if item.shown not in statement.text:
            yield f"{statement.id}: {item.shown!r} is missing from the sentence"
        rest = rest.replace(item.shown, " ")
    for term in TERMS:
        rest = rest.replace(term, " ")
    if re.search(r"\d", rest):
        yield f"{statement.id}: a number without evidence in {rest!r}"


def engine_statement(
    place: int, document: Document, template: str, **more: tuple[str, Style]
) -> Statement:
    """A statement about the check by an engine at this place of the report.

    Args:
        place: of the check.
        document: the report.
        template: may name the engine's `title`, its `version` and the `format`.
        more: other fields of the template, each with the field of the check and its style.
    """
    fields: dict[str, tuple[str, Style]] = {
        **{name: (name, "text") for name in ("title", "version", "format")},
        **more,
    }
    return state(
        document,
        f"engine-{document['engine_checks'][place]['engine']}-{place}",
        template,
        **{
            name: (pointer("engine_checks", place, field), style)
            for name, (field, style) in fields.items()
            if f"{{{name}}}" in template
        },
    )


def named_fallbacks(
    stage: StageFacts, *place: str | int
) -> tuple[str, dict[str, tuple[str, Style]]]:
    """How many fallbacks a stage has, and which: the first of each reason, three at most.

    Args:
        stage: has fallbacks.
        place: of the stage in the report.

    Returns:
        The end of a template, and its places.
    """
    reasons = [item.reason for item in stage.fallbacks]
    firsts = [number for number, reason in enumerate(reasons) if reason not in reasons[:number]][:3]
    places: dict[str, tuple[str, Style]] = {"count": (pointer(*place, "fallbacks"), "length")}
    for number in firsts:
        for field in ("module", "reason", "action"):
            places[f"{field}_{number}"] = (pointer(*place, "fallbacks", number, field), "text")
    named = "; ".join(f"{{module_{n}}} ({{reason_{n}}}: {{action_{n}}})" for n in firsts)
    word = "namely" if len(firsts) == len(reasons) else "among them"
    return f"recorded fallbacks: {{count}}, {word} {named}.", places
