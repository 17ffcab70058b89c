"""Figures of the inside: error by layer, bytes by role, time and memory by stage."""

from __future__ import annotations

import re
from collections import defaultdict

from compressor.report import numbers
from compressor.report.figures.base import SPLIT, Figure, series_of, shorten
from compressor.report.figures.svg import Drawing, Formatter, Scale, log_padded, y_axis
from compressor.report.schema import LayerMetric, Report, RoleBytes, StageFacts, Variant

ROLES = {
    "rest": "dense matrices, norms",
    "embeddings": "embeddings",
    "head": "output head",
    "codes": "codes",
    "scales": "scales",
    "zero_points": "zero-points",
}

_BLOCK = re.compile(r"\.(\d+)\.")

Panels = dict[str, list[tuple[int, LayerMetric]]]


# --- error by layer --------------------------------------------------------------------------


def layers(report: Report) -> list[Figure]:
    """One figure for every stage that reported the error of its matrices."""
    found = [_layers(report, variant) for variant in report.variants]
    figures = [figure for figure in found if figure is not None]
    return figures


def _layers(report: Report, variant: Variant) -> Figure | None:
    if variant.stage is None:
        return None
    metrics = [m for m in variant.stage.metrics_per_module if m.loss > 0]
    if not metrics:
        return None
    worst = max(metrics, key=lambda m: m.loss)
    lead = f"highest: {worst.module}, {numbers.number(worst.loss)}"
    return Figure(
        f"layers-{variant.id}",
        f"Error of every matrix after {variant.stage.method}",
        "Relative layer error tr(D H Dᵀ) / tr(W H Wᵀ) by block, log scale, one panel for each kind "
        f"of matrix. Grey ghosts are what {variant.stage.simple_method} would leave; points above "
        f"theirs are suspicious. The {lead}.",
        f"{len(metrics)} matrices; {lead}",
        lambda width: _draw_layers(report, variant, metrics, width),
    )


def panels_of(metrics: list[LayerMetric]) -> Panels:
    """Matrices by kind, each with its block; experts of a block share a panel."""
    panels: Panels = defaultdict(list)
    for metric in metrics:
        match = _BLOCK.search(f"{metric.module}.")
        kind = metric.module if match is None else metric.module[match.end() :]
        panels[_BLOCK.sub(".*.", kind)].append((int(match[1]) if match else 0, metric))
    return panels


def _draw_layers(
    report: Report, variant: Variant, metrics: list[LayerMetric], width: float
) -> Drawing:
    panels = panels_of(metrics)
    columns = 4 if width >= SPLIT else 2
    rows = -(-len(panels) // columns)
    drawing = Drawing(width, rows * 148.0)
    values = [v for m in metrics for v in (m.loss, m.baseline_loss) if v > 0]
    low, high = log_padded(values, 0.06)
    last = max(block for panel in panels.values() for block, _ in panel)
    room = (width - 46) / columns
    for place, (kind, panel) in enumerate(panels.items()):
        x, y = 46 + room * (place % columns), 148.0 * (place // columns)
        xs = Scale(0, max(1, last), x + 6, x + room - 16)
        ys = Scale(low, high, y + 120, y + 28, log=True)
        drawing.text(x, y + 16, shorten(kind, room - 8, 7.2), "strong small")
        _frame(drawing, xs, ys, place % columns == 0, last)
        if place % columns == 0:
            drawing.text(x - 6, y + 134, "block", "muted small", "end")
        _layer_points(drawing, panel, xs, ys, series_of(report)[variant.id])
    return drawing


def _frame(drawing: Drawing, xs: Scale, ys: Scale, labelled: bool, last: int) -> None:
    y_axis(drawing, ys, xs.start - 6, xs.end + 6, _log_tick if labelled else _no_label, 4)
    drawing.line((xs.start - 6, ys.start), (xs.end + 6, ys.start), "axis")
    for block in {0, last}:
        drawing.text(xs(block), ys.start + 14, str(block), "muted small", "middle")


def _log_tick(value: float) -> str:
    return f"{value:.2g}"


def _no_label(_: float) -> str:
    return ""


def _layer_points(
    drawing: Drawing, panel: list[tuple[int, LayerMetric]], xs: Scale, ys: Scale, series: int
) -> None:
    for block, metric in panel:
        if metric.baseline_loss > 0:
            y = ys(metric.baseline_loss)
            drawing.add("circle", cx=xs(block), cy=y, r=2.6, cls="ghost")
    if len({block for block, _ in panel}) == len(panel) > 1:
        drawing.path([(xs(block), ys(metric.loss)) for block, metric in panel], f"line{series}")
    for block, metric in panel:
        drawing.add("circle", cx=xs(block), cy=ys(metric.loss), r=2.2, cls=f"fill{series}")


# --- bytes by role ---------------------------------------------------------------------------


def waterfall(report: Report) -> Figure | None:
    """From the bytes of the base to those of the headline variant, role by role."""
    base = report.variants[0]
    final = next(v for v in report.variants if v.id == report.headline)
    if final is base:
        return None
    steps = _steps(base, final)
    return Figure(
        "bytes",
        f"Where the bytes went: from {base.label} to {final.label}",
        "Bytes on disk by what they hold. Blue bars leave, orange bars come; the grey bars are "
        "the totals. What stands still, such as embeddings, bounds what compression can reach.",
        "; ".join(f"{name}: {numbers.size_change(change)}" for name, change in steps),
        lambda width: _draw_waterfall(base, final, steps, width),
    )


def _steps(base: Variant, final: Variant) -> list[tuple[str, int]]:
    def other(variant: Variant) -> int:
        return variant.size.bytes_on_disk - variant.size.tensor_bytes

    roles: tuple[RoleBytes, RoleBytes] = base.size.by_role, final.size.by_role
    changes = [(label, getattr(roles[1], r) - getattr(roles[0], r)) for r, label in ROLES.items()]
    changes.append(("tokenizer, config", other(final) - other(base)))
    return [(label, change) for label, change in changes if change]


def _draw_waterfall(
    base: Variant, final: Variant, steps: list[tuple[str, int]], width: float
) -> Drawing:
    row, left = 28.0, 190.0 if width >= SPLIT else 140.0
    drawing = Drawing(width, row * (len(steps) + 2) + 6)
    start, end = base.size.bytes_on_disk, final.size.bytes_on_disk
    level, peak = start, start
    for _, change in steps:
        level += change
        peak = max(peak, level)
    scale = Scale(0, peak, left, width - 78)
    _total(drawing, base.label, start, scale, 0)
    level, y = start, row
    for label, change in steps:
        drawing.text(0, y + 17, shorten(label, left - 6, 6.2))
        drawing.line((scale(level), y - 6), (scale(level), y + 4), "leader")
        tone = "warm" if change > 0 else "cool"
        span = scale(level + change) - scale(level)
        drawing.bar(scale(level), y + 4, span, row - 10, tone, fill_opacity=0.85)
        drawing.text(width, y + 17, numbers.size_change(change), "small", "end")
        level, y = level + change, y + row
    drawing.line((scale(level), y - 6), (scale(level), y + 4), "leader")
    _total(drawing, final.label, end, scale, y)
    return drawing


def _total(drawing: Drawing, label: str, total: int, scale: Scale, y: float) -> None:
    drawing.text(0, y + 17, shorten(label, scale.start - 6, 7.6), "strong")
    drawing.bar(scale.start, y + 4, scale(total) - scale.start, 18, "fill0")
    drawing.text(drawing.width, y + 17, numbers.size(total), "small strong", "end")


# --- time and memory -------------------------------------------------------------------------


def cost(report: Report) -> Figure | None:
    """Seconds and peak memory of every stage."""
    stages = [(v, v.stage) for v in report.variants if v.stage is not None]
    if not stages:
        return None
    return Figure(
        "cost",
        "Time and peak memory of every stage",
        "Wall-clock time and the largest resident memory while the stage ran, on the machine "
        "named under “Reproduce”; evaluation is not included.",
        "; ".join(
            f"{s.method}: {numbers.duration(s.seconds)}, {numbers.size(s.peak_bytes)}"
            for _, s in stages
        ),
        lambda width: _draw_cost(report, stages, width),
    )


def _draw_cost(report: Report, stages: list[tuple[Variant, StageFacts]], width: float) -> Drawing:
    side_by_side, panel = width >= SPLIT, 30.0 * len(stages) + 26
    drawing = Drawing(width, panel if side_by_side else 2 * panel + 10)
    left = 150.0 if side_by_side else 112.0
    room = (width - left - 24) / 2 if side_by_side else width - left
    second = (left + room + 24, 0.0) if side_by_side else (left, panel + 10)
    series = [series_of(report)[variant.id] for variant, _ in stages]
    names = [stage.method for _, stage in stages]
    times, peaks = [s.seconds for _, s in stages], [float(s.peak_bytes) for _, s in stages]
    _bars(drawing, "time", times, series, numbers.duration, (left, 0.0), room)
    _bars(drawing, "peak memory", peaks, series, numbers.size, second, room)
    for top in (0.0,) if side_by_side else (0.0, second[1]):
        for place, name in enumerate(names):
            drawing.text(0, top + 43 + 30 * place, shorten(name, left - 6, 6.4))
    return drawing


def _bars(
    drawing: Drawing,
    title: str,
    values: list[float],
    series: list[int],
    show: Formatter,
    corner: tuple[float, float],
    room: float,
) -> None:
    x, y = corner
    drawing.text(x, y + 14, title, "strong")
    scale = Scale(0, max(values) or 1.0, x, x + room - 92)
    for place, (value, colour) in enumerate(zip(values, series, strict=True)):
        top = y + 28 + 30 * place
        drawing.bar(x, top, max(1.0, scale(value) - x), 20, f"fill{colour}")
        drawing.text(scale(value) + 6, top + 15, show(value), "small")
