"""Figures of quality: Pareto, and differences by domain."""

from __future__ import annotations

from itertools import pairwise, zip_longest

from compressor.evaluation.results import Estimate, Score
from compressor.report import numbers
from compressor.report.figures.base import (
    SPLIT,
    Figure,
    compared,
    domains_of,
    labels_of,
    remarks_of,
    series_of,
    shorten,
    wrap,
)
from compressor.report.figures.svg import (
    Drawing,
    Scale,
    log_padded,
    padded,
    spread,
    text_width,
    x_axis,
    y_axis,
)
from compressor.report.schema import Report, Variant

ROW = 18.0  # px


def _ends(estimate: Estimate) -> tuple[float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    return low, estimate.value if estimate.high is None else estimate.high


# --- bytes against quality -------------------------------------------------------------------


def pareto(report: Report) -> Figure | None:
    """Bytes on disk against bits per byte, with intervals."""
    variants = [v for v in report.variants if v.id in report.evaluations]
    if len(variants) < 2:
        return None
    listed = "; ".join(
        f"{v.label}: {numbers.size(v.size.bytes_on_disk)}, "
        f"{numbers.plus_minus(report.evaluations[v.id].overall.bits_per_byte)} bits per byte"
        for v in variants
    )
    return Figure(
        "pareto",
        "Bytes on disk against bits per byte",
        "Left is smaller, down is better; hollow marks are dominated by another variant and the "
        "diamond is the base. Bars are the 95 % interval of each level taken alone. Most of it is "
        "the choice of documents, which all variants share: judge differences in the next figure.",
        listed,
        lambda width: _draw_pareto(report, variants, width),
    )


def _draw_pareto(report: Report, variants: list[Variant], width: float) -> Drawing:
    drawing = Drawing(width, 360.0)
    top, bottom, left, right = 30.0, 310.0, 52.0, width - 26
    levels = {v.id: report.evaluations[v.id].overall.bits_per_byte for v in variants}
    ends = [end for level in levels.values() for end in _ends(level)]
    xs = Scale(*log_padded([v.size.bytes_on_disk for v in variants], 0.15), left, right, log=True)
    ys = Scale(*padded(ends), bottom, top)
    y_axis(drawing, ys, left, right, numbers.level_digits(ys.ticks()))
    x_axis(drawing, xs, top, bottom, numbers.round_size, 4)
    drawing.text(0, 14, "bits per byte (lower is better)", "muted small")
    drawing.text(right, 346, "bytes on disk, log scale", "muted small", "end")
    _frontier(drawing, report, xs, ys, levels)
    for variant in variants:
        _pareto_point(drawing, report, variant, (xs, ys))
    _pareto_labels(drawing, report, variants, (xs, ys))
    return drawing


def _frontier(
    drawing: Drawing, report: Report, xs: Scale, ys: Scale, levels: dict[str, Estimate]
) -> None:
    on_it = [v for v in report.variants if v.id in report.pareto]
    points = sorted((xs(v.size.bytes_on_disk), ys(levels[v.id].value)) for v in on_it)
    steps = [(right[0], left[1]) for left, right in pairwise(points)]
    path = [point for pair in zip_longest(points, steps) for point in pair if point]
    if len(points) > 1:
        drawing.path(path, "ghostline")


def _pareto_point(
    drawing: Drawing, report: Report, variant: Variant, scales: tuple[Scale, Scale]
) -> None:
    series = series_of(report)[variant.id]
    level = report.evaluations[variant.id].overall.bits_per_byte
    x, (low, high) = scales[0](variant.size.bytes_on_disk), _ends(level)
    drawing.line((x, scales[1](low)), (x, scales[1](high)), f"line{series}")
    for end in (low, high):
        drawing.line((x - 4, scales[1](end)), (x + 4, scales[1](end)), f"line{series}")
    hollow = variant.id not in report.pareto
    drawing.marker(x, scales[1](level.value), series, hollow, 5.5)


def _pareto_labels(
    drawing: Drawing, report: Report, variants: list[Variant], scales: tuple[Scale, Scale]
) -> None:
    """Labels stand beside their mark, on the side where no other error bar is in the way."""
    series = series_of(report)
    xs = [scales[0](v.size.bytes_on_disk) for v in variants]
    ys = [scales[1](_level(report, v).value) - 8 for v in variants]
    texts = [shorten(v.label, 210, 7.8) for v in variants]
    sides = [
        _side(x, text_width(text), [other for other in xs if other != x], scales[0].end)
        for x, text in zip(xs, texts, strict=True)
    ]
    for side in (-1, 1):
        group = [i for i, chosen in enumerate(sides) if chosen == side]
        places = spread([ys[i] for i in group], 15, scales[1].end + 8, scales[1].start - 4)
        for i, y in zip(group, places, strict=True):
            cls = f"fill{series[variants[i].id]} strong halo"
            drawing.text(xs[i] + 10 * side, y, texts[i], cls, "start" if side > 0 else "end")


def _side(x: float, width: float, others: list[float], end: float) -> int:
    """1 for a label on the right of `x`, -1 for one on the left."""
    if x + 10 + width > end:
        return -1
    blocked = any(x < other < x + 10 + width for other in others)
    free_left = x - 10 - width > 52 and not any(x - 10 - width < other < x for other in others)
    return -1 if blocked and free_left else 1


def _level(report: Report, variant: Variant) -> Estimate:
    return report.evaluations[variant.id].overall.bits_per_byte


# --- paired differences by domain ------------------------------------------------------------


def forest(report: Report) -> Figure | None:
    """Paired differences in bits per byte, domain by domain."""
    if not compared(report):
        return None
    rows = [
        f"{labels_of(report)[name]}, {domain or 'all domains'}: {numbers.with_limits(d, True)}"
        for domain in ("", *domains_of(report))
        for name, d in _deltas(report, domain)
    ]
    return Figure(
        "forest",
        "What each variant costs, domain by domain",
        "Paired difference in bits per byte to the base on the same documents, with its 95 % "
        "interval over documents. Right of the line is worse. An interval that "
        "touches the line is no evidence of a loss, nor of its absence.",
        "; ".join(rows),
        lambda width: _draw_forest(report, width),
    )


def _score(report: Report, variant: str, domain: str) -> Score | None:
    evaluation = report.evaluations[variant]
    return evaluation.domains.get(domain) if domain else evaluation.overall


def _deltas(report: Report, domain: str) -> list[tuple[str, Estimate]]:
    found = ((name, _score(report, name, domain)) for name in compared(report))
    return [(n, s.delta_bits_per_byte) for n, s in found if s and s.delta_bits_per_byte]


def _draw_forest(report: Report, width: float) -> Drawing:
    groups = [(domain, _deltas(report, domain)) for domain in ("", *domains_of(report))]
    key = 0.0 if width >= SPLIT else 18.0 * len(compared(report)) + 6
    height = key + sum(26 + ROW * len(rows) for _, rows in groups) + 58
    drawing = Drawing(width, height)
    ends = [0.0, *(end for _, rows in groups for _, delta in rows for end in _ends(delta))]
    left = 176.0 if width >= SPLIT else 10.0
    scale = Scale(*padded(ends, 0.05), left, width - 118)
    show = numbers.level_digits(scale.ticks(4))
    x_axis(drawing, scale, key + 18, height - 36, show, 4)
    drawing.line((scale(0), key + 14), (scale(0), height - 36), "zero")
    drawing.text(scale.end, height - 4, "Δ bits per byte", "muted small", "end")
    if key:
        _key(drawing, report)
    y = key + 18
    for domain, rows in groups:
        y = _forest_group(drawing, report, domain, rows, scale, y)
    return drawing


def _key(drawing: Drawing, report: Report) -> None:
    for place, name in enumerate(compared(report)):
        series, y = series_of(report)[name], 12 + 18.0 * place
        drawing.marker(8, y - 4, series)
        drawing.text(20, y, shorten(labels_of(report)[name], 320, 7.8), f"fill{series} strong")


def _forest_group(
    drawing: Drawing,
    report: Report,
    domain: str,
    rows: list[tuple[str, Estimate]],
    scale: Scale,
    y: float,
) -> float:
    y += 16
    title = domain or "mean over domains"
    drawing.text(0, y, title, "strong halo")
    if domain:
        drawing.text(text_width(title) + 14, y, remarks_of(report, domain), "muted small halo")
    for name, delta in rows:
        y += ROW
        series = series_of(report)[name]
        if scale.start > 100:
            label = shorten(labels_of(report)[name], scale.start - 14)
            drawing.text(8, y, label, f"fill{series} small")
        low, high = _ends(delta)
        drawing.line((scale(low), y - 4), (scale(high), y - 4), f"line{series}")
        drawing.marker(scale(delta.value), y - 4, series)
        drawing.text(drawing.width, y, numbers.plus_minus(delta, True), "small", "end")
    return y + 10


# --- heatmap ---------------------------------------------------------------------------------


def heatmap(report: Report) -> Figure | None:
    """Domain by variant: the difference in bits per byte and the divergence."""
    if not compared(report) or not domains_of(report):
        return None
    return Figure(
        "heatmap",
        "Where the loss sits",
        "Each cell is one variant on one domain; the stronger the colour, the worse, up to the "
        "worst cell of the panel (blue: better than the base). The outlined cell is the worst "
        "domain of its variant.",
        "Worst domains: " + "; ".join(_worst_in_words(report)),
        lambda width: _draw_heatmap(report, width),
    )


def _worst_in_words(report: Report) -> list[str]:
    worst = ((name, report.evaluations[name].worst) for name in compared(report))
    return [f"{labels_of(report)[name]}: {w.domain}" for name, w in worst if w is not None]


def _draw_heatmap(report: Report, width: float) -> Drawing:
    domains, gutter = domains_of(report), 120.0 if width >= SPLIT else 104.0
    side_by_side = width >= SPLIT
    room = (width - gutter - 24) / 2 if side_by_side else width - gutter
    head = _head_height(report, room)
    panel = 34.0 * len(domains) + head + 4
    drawing = Drawing(width, panel if side_by_side else 2 * panel + 14)
    second = (gutter + room + 24, 0.0) if side_by_side else (gutter, panel + 14)
    _heat_panel(drawing, report, (gutter, 0.0), room, "Δ bits per byte")
    _heat_panel(drawing, report, second, room, "mean KL, nats per token")
    for y in (0.0,) if side_by_side else (0.0, panel + 14):
        _heat_rows(drawing, report, y + head)
    return drawing


def _cell_width(report: Report, room: float) -> float:
    return min(190.0, room / len(compared(report)))


def _head_height(report: Report, room: float) -> float:
    """Room for the title of a panel and the labels of its columns."""
    labels = (labels_of(report)[name] for name in compared(report))
    return 26 + 14.0 * max(len(wrap(label, _cell_width(report, room) - 8)) for label in labels)


def _heat_rows(drawing: Drawing, report: Report, top: float) -> None:
    for row, domain in enumerate(domains_of(report)):
        y, remarks = top + 34 * row, remarks_of(report, domain)
        drawing.text(0, y + (15 if remarks else 21), shorten(domain, 112))
        if remarks:
            drawing.text(0, y + 28, shorten(remarks, 108, 5.2), "muted small")


def _heat_value(report: Report, name: str, domain: str, title: str) -> float | None:
    score = report.evaluations[name].domains.get(domain)
    if score is None:
        return None
    if title.startswith("Δ"):
        return score.delta_bits_per_byte.value if score.delta_bits_per_byte else None
    return score.divergence.mean.value if score.divergence else None


def _heat_panel(
    drawing: Drawing, report: Report, corner: tuple[float, float], room: float, title: str
) -> None:
    x0, y0 = corner
    names, domains = compared(report), domains_of(report)
    cell, head = _cell_width(report, room), _head_height(report, room)
    drawing.text(x0, y0 + 14, title, "strong")
    values = {(n, d): _heat_value(report, n, d, title) for n in names for d in domains}
    largest = max((abs(v) for v in values.values() if v is not None), default=1.0) or 1.0
    for column, name in enumerate(names):
        x = x0 + column * cell
        _column_head(drawing, labels_of(report)[name], series_of(report)[name], x, y0 + 32, cell)
        worst = report.evaluations[name].worst
        marked = None if worst is None else worst.domain if title[0] == "Δ" else worst.kl_domain
        for row, domain in enumerate(domains):
            box = (x, y0 + head + 34 * row, cell)
            _cell(drawing, box, values[name, domain], largest, domain == marked)


def _column_head(
    drawing: Drawing, label: str, series: int, x: float, y: float, cell: float
) -> None:
    for place, line in enumerate(wrap(label, cell - 8)):
        drawing.text(x + 2, y + 14 * place, line, f"fill{series} small")


def _cell(
    drawing: Drawing,
    box: tuple[float, float, float],
    value: float | None,
    largest: float,
    worst: bool,
) -> None:
    x, y, cell = box
    if value is None:
        drawing.text(x + cell / 2, y + 21, "–", "muted", "middle")
        return
    strength = 0.06 + 0.5 * abs(value) / largest
    tone = "warm" if value > 0 else "cool"
    drawing.bar(x + 1, y + 1, cell - 3, 32, tone, fill_opacity=strength, rx=2)
    if worst:
        drawing.bar(x + 1.5, y + 1.5, cell - 4, 31, "outline", rx=2)
    decimals = numbers.decimals_for(largest, 2)
    shown = numbers.fixed(value, max(2 if cell < 44 else 3, decimals))
    cls = f"{'small' if cell < 56 else ''} {'strong' if worst else ''}".strip()
    drawing.text(x + cell / 2 - 1, y + 21, shown, cls, "middle")


# --- divergence ------------------------------------------------------------------------------
