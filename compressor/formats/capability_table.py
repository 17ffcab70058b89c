"""The table of `capabilities` as Markdown, for documents; nothing is added to it here."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.formats.capabilities import CONTAINERS, ENGINES, Engine, Limits

HEADER = ("engine", "container", "codes", "rounded inputs", "cache", "drafts", "known by")
BEGIN, END = "<!-- engines: written by tools/engine_table.py -->", "<!-- /engines -->"
_KNOWN = {"run": "a test runs it", "documents": "its documents"}
_NONE = "–"


def markdown() -> str:
    """One row for each engine and container, then what the containers are."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(row)} |" for engine in ENGINES.values() for row in _rows(engine)]
    lines += ["", *(f"- `{name}`: {what}." for name, what in CONTAINERS.items())]
    return "\n".join(lines)


def _rows(engine: Engine) -> Iterator[tuple[str, ...]]:
    caches = ", ".join(sorted(engine.caches)) or _NONE
    drafts = ", ".join(
        name if how == "run" else f"{name} (documents)" for name, how in engine.drafts.items()
    )
    for name, limits in engine.containers.items():
        yield (
            f"{engine.title} {engine.version}",
            f"`{name}`",
            _codes(name, limits),
            ", ".join(sorted(limits.inputs)) or _NONE,
            caches,
            drafts or _NONE,
            _KNOWN[limits.evidence],
        )


def _codes(name: str, limits: Limits) -> str:
    """Widths, grids, sizes and groups; of what has no codes of ours, nothing."""
    return _NONE if name in ("dense", "llama-quantize") else str(limits)


def within(document: str) -> str | None:
    """What stands between the marks of a document; None where it has none."""
    _, begin, rest = document.partition(f"{BEGIN}\n")
    table, end, _ = rest.partition(f"\n{END}")
    return table if begin and end else None


def replaced(document: str) -> str:
    """The document with the table as it is now; unchanged where it has no marks."""
    old = within(document)
    if old is None:
        return document
    return document.replace(f"{BEGIN}\n{old}\n{END}", f"{BEGIN}\n{markdown()}\n{END}")
