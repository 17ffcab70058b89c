"""The report for a terminal: plain text, aligned, no colour."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from compressor.evaluation.results import GateVerdict
from compressor.report import delivery_tables, draft_tables, numbers, tables
from compressor.report.schema import Report
from compressor.report.tables import Table

WIDTH = 100  # characters, of sentences
PROTOCOL = ("protocol", "suite", "window / stride", "predicted tokens", "documents", "dtype")
DROPPED = ("docs", "ratio to base", "same top")  # what does not fit a terminal


def to_text(report: Report) -> str:
    """Verdict, gates, variants, domains of the headline and warnings, about 110 wide."""
    seconds = numbers.duration(report.run.seconds)
    effort = "" if report.run.effort == "default" else f", effort: {report.run.effort}"
    parts = [f"{report.base.id}: {report.verdict}  ({report.run.status}, {seconds}{effort})"]
    parts += [_wrapped(_gate(gate), 13) for gate in report.gates]
    shown = [
        draft_tables.draft_speeds(report),
        delivery_tables.deliverable_table(report).without("format"),
        *_engines(report),
    ]
    parts += ["", f"{aligned(tables.size_table(report))}\n", *_measured(report)]
    parts += [f"{aligned(table)}\n" for table in shown if table.rows]
    if report.warnings:
        parts += ["Warnings", *(_wrapped(warning.text, 0) for warning in report.warnings)]
    return "\n".join(parts).rstrip() + "\n"


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * (2 + indent),
        break_on_hyphens=False,
    )


def _gate(gate: GateVerdict) -> str:
    return f"{gate.verdict:<12} {gate.gate}: {gate.sentence.removeprefix(f'{gate.verdict}: ')}"


def _measured(report: Report) -> list[str]:
    """Quality and domains with what their numbers mean, and how they were measured."""
    shown = [tables.quality_table(report)] if report.evaluations else []
    if report.headline in report.evaluations:
        shown.append(tables.domain_table(report, report.headline))
    captioned = (f"{aligned(t.without(*DROPPED))}\n{_wrapped(t.caption, 0)}\n" for t in shown)
    return [*captioned, *_protocol(report)]


def _protocol(report: Report) -> list[str]:
    named = [f"{name} {value}" for name, value in tables.protocol_of(report) if name in PROTOCOL]
    return [f"{_wrapped('Measured with ' + ', '.join(named), 0)}.\n"] if named else []


def _engines(report: Report) -> list[Table]:
    table = delivery_tables.engine_table(report)
    return [table.without("tokens", "computes in")] if table else []


def aligned(table: Table) -> str:
    """A table in columns: words flush left, numbers flush right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = [_line(row, widths, table.words) for row in rows]
    return "\n".join([lines[0], "─" * sum(widths, 2 * len(widths) - 2), *lines[1:]])


def _line(row: Sequence[str], widths: list[int], words: frozenset[int]) -> str:
    cells = (
        cell.ljust(width) if place in words else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()
