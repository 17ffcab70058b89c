"""The table of `capabilities` as Markdown, for documents; nothing is added to it here."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.formats.capabilities import ANY_WIDTH, CONTAINERS, ENGINES, Engine, Limits

HEADER = ("engine", "container", "codes", "rounded inputs", "cache", "drafts", "known by")
OVERVIEW = ("engine", "loads, as a test shows", "loads by its documents", "drafts, as a test shows")
BEGIN, END = "<!-- engines: written by tools/engine_table.py -->", "<!-- /engines -->"
SHORT = "<!-- engines in short: written by tools/engine_table.py -->"
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


def overview() -> str:
    """One row for each engine: what it loads, and how that is known."""
    lines = [f"| {' | '.join(OVERVIEW)} |", "|---" * len(OVERVIEW) + "|"]
    for engine in ENGINES.values():
        cells = [f"{engine.title} {engine.version}"]
        for how in ("run", "documents"):
            named = [_named(n, li) for n, li in engine.containers.items() if li.evidence == how]
            cells.append(", ".join(named) or _NONE)
        drafts = [name for name, how in engine.drafts.items() if how == "run"]
        lines.append(f"| {' | '.join([*cells, ', '.join(drafts) or _NONE])} |")
    return "\n".join(lines)


def _named(name: str, limits: Limits) -> str:
    """A container, with its widths and groups where the engine is particular about them."""
    narrow = limits.bits != ANY_WIDTH and name != "awq"
    words = [f"{', '.join(map(str, sorted(limits.bits)))} bits"] if narrow else []
    words += [f"groups × {limits.group_multiple}"] if limits.group_multiple > 1 else []
    return f"`{name}`" + (f" ({', '.join(words)})" if words else "")


def within(document: str, begin: str = BEGIN) -> str | None:
    """What stands between the marks of a document; None where it has none."""
    _, found, rest = document.partition(f"{begin}\n")
    table, end, _ = rest.partition(f"\n{END}")
    return table if found and end else None


def replaced(document: str) -> str:
    """The document with its table as it is now; unchanged where it has no marks."""
    for begin, table in ((BEGIN, markdown), (SHORT, overview)):
        old = within(document, begin)
        if old is not None:
            new = f"{begin}\n{table()}\n{END}"
            document = document.replace(f"{begin}\n{old}\n{END}", new)
    return document
