"""What every figure of the report has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compressor.report import palette as colours
from compressor.report.figures.svg import Drawing, standalone_style
from compressor.report.schema import Report

WIDE, NARROW = 820.0, 350.0  # px: the text column, and a small telephone
SPLIT = 560.0  # below this width panels stand on top of each other


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn at any width.

    Attributes:
        key: its name in files and anchors.
        title: what it shows, without a full stop.
        caption: how to read it and what to look for.
        description: the same for people who cannot see it, with the main numbers.
        draw: the drawing at a width in pixels.
    """

    key: str
    title: str
    caption: str
    description: str
    draw: Callable[[float], Drawing]

    def inline(self, width: float, suffix: str) -> str:
        """SVG for the page, coloured by the custom properties of the page."""
        return self.draw(width).render(f"fig-{self.key}-{suffix}", self.title, self.description)

    def standalone(self, palette: dict[str, str], width: float = WIDE) -> str:
        """SVG for a file of its own, in the colours of one palette."""
        drawing = self.draw(width)
        style = standalone_style(palette, drawing.width, drawing.height)
        return drawing.render(f"fig-{self.key}", self.title, self.description, style) + "\n"


def series_of(report: Report) -> dict[str, int]:
    """Colour and shape of every variant; 0 is the base."""
    ids = [variant.id for variant in report.variants]
    return {name: 1 + (i - 1) % (colours.SERIES - 1) if i else 0 for i, name in enumerate(ids)}


def labels_of(report: Report) -> dict[str, str]:
    """Label of every variant."""
    return {variant.id: variant.label for variant in report.variants}


def compared(report: Report) -> list[str]:
    """Variants that were measured against the base, in the order of the run."""
    return [
        variant.id
        for variant in report.variants
        if variant.id in report.evaluations
        and report.evaluations[variant.id].overall.delta_bits_per_byte is not None
    ]


def domains_of(report: Report) -> list[str]:
    """Every evaluated domain, in the order of the suite."""
    names = [name for evaluation in report.evaluations.values() for name in evaluation.domains]
    return list(dict.fromkeys(names))


def remarks_of(report: Report, domain: str) -> str:
    """What a reader must know about a domain before believing its numbers."""
    contaminated = {item.domain for item in report.contamination if item.contaminated}
    known = [
        e.domains[domain].in_calibration for e in report.evaluations.values() if domain in e.domains
    ]
    remarks = ["contaminated"] if domain in contaminated else []
    return ", ".join([*remarks, *(["not in calibration"] if False in known else [])])


def shorten(text: str, width: float, character: float = 6.6) -> str:
    """`text` cut to a width in pixels, with an ellipsis."""
    room = max(1, int(width / character))
    return text if len(text) <= room else text[: room - 1] + "…"


def wrap(text: str, width: float, lines: int = 3) -> list[str]:
    """`text` in lines of at most `width` pixels, the last one cut if need be."""
    rows: list[str] = []
    for word in text.split():
        if rows and len(rows[-1]) + 1 + len(word) <= width / 6.0:
            rows[-1] += f" {word}"
        else:
            rows.append(word)
    kept = [*rows[: lines - 1], " ".join(rows[lines - 1 :])] if len(rows) > lines else rows
    return [shorten(row, width, 6.0) for row in kept if row]
