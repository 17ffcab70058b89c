"""Figures of the divergence from the base: how rare it is, and where in the text it sits."""

from __future__ import annotations

import math

from compressor.evaluation.results import Divergence
from compressor.report import numbers
from compressor.report.figures.base import Figure, compared, labels_of, series_of, shorten
from compressor.report.figures.svg import (
    Drawing,
    Point,
    Scale,
    log_padded,
    padded,
    spread,
    text_width,
    x_axis,
    y_axis,
)
from compressor.report.schema import Report

_NOISE_FLOOR = " The noise floor is the base against itself in another batch size."


def _divergence(report: Report, name: str) -> Divergence | None:
    return report.evaluations[name].overall.divergence


def ccdf(report: Report) -> Figure | None:
    """Share of tokens whose divergence exceeds a value, log-log."""
    curves = {n: d.ccdf for n in compared(report) if (d := _divergence(report, n)) and d.ccdf}
    if not any(_positive(points) for points in curves.values()):
        return None
    listed = [
        f"{labels_of(report)[n]}: mean {numbers.number(d.mean.value)}, 99.9 % "
        f"{numbers.number(d.p999)} nats"
        for n in curves
        if (d := _divergence(report, n))
    ]
    return Figure(
        "ccdf",
        "How much the rare tokens suffer",
        "Share of tokens whose KL divergence from the base exceeds the value below; both axes are "
        "logarithmic. Means hide the right end of a curve, and generations fail there."
        + (_NOISE_FLOOR if report.noise_floor else ""),
        "; ".join(listed),
        lambda width: _draw_ccdf(report, curves, width),
    )


def _positive(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if x > 0 and y > 0]


def _draw_ccdf(
    report: Report, curves: dict[str, list[tuple[float, float]]], width: float
) -> Drawing:
    drawing = Drawing(width, 360.0)
    kept = {name: _positive(points) for name, points in curves.items() if _positive(points)}
    flat = [point for points in kept.values() for point in points]
    low = 10 ** math.floor(math.log10(min(x for x, y in flat if y < 0.9 or x == flat[-1][0])))
    high = 10 ** math.ceil(math.log10(max(x for x, _ in flat)) + 1e-9)
    smallest = 10 ** math.floor(math.log10(max(1e-7, min(y for _, y in flat))))
    xs = Scale(low, high, 52.0, width - 12, log=True)
    ys = Scale(min(smallest, 5e-4), 1.0, 310.0, 30.0, log=True)
    y_axis(drawing, ys, 52, width - 12, _percent_tick)
    x_axis(drawing, xs, 30, 310, lambda v: numbers.power(round(math.log10(v))), 8)
    drawing.text(0, 14, "share of tokens above, log scale", "muted small")
    drawing.text(width - 12, 346, "KL(base ‖ variant), nats, log scale", "muted small", "end")
    drawing.text(58, ys(0.001) - 5, "99.9 % quantile", "muted small halo")
    _noise(drawing, report, xs, ys)
    for name, points in kept.items():
        inside = [(xs(x), ys(y)) for x, y in points if x >= low and y >= ys.low]
        drawing.path(inside, f"line{series_of(report)[name]}")
    _ccdf_labels(drawing, report, kept, xs, ys)
    return drawing


def _percent_tick(value: float) -> str:
    return f"{value * 100:g} %"


def _noise(drawing: Drawing, report: Report, xs: Scale, ys: Scale) -> None:
    floor = report.noise_floor
    if floor is None:
        return
    inside = [(x, y) for x, y in _positive(floor.ccdf) if x >= xs.low and y >= ys.low]
    if len(inside) > 1:
        drawing.path([(xs(x), ys(y)) for x, y in inside], "ghostline")
        drawing.text(xs(inside[-1][0]) + 6, ys.start - 8, "noise floor", "muted small halo")
        return
    note = f"← noise floor: 99.9 % below {numbers.number(max(floor.p999, 0.0), 2)}"
    drawing.text(xs.start + 6, ys.start - 8, note, "muted small halo")


def _ccdf_labels(
    drawing: Drawing,
    report: Report,
    curves: dict[str, list[tuple[float, float]]],
    xs: Scale,
    ys: Scale,
) -> None:
    """Left curves are labelled low on their left, right ones high on their right: both empty."""
    names = sorted(curves, key=lambda n: max(x for x, _ in curves[n]))
    names.sort(key=lambda n: d.mean.value if (d := _divergence(report, n)) else 0.0)
    for place, name in enumerate(names):
        share = ys.low ** (0.8 - 0.62 * (place + 1) / len(names))
        crossing = next((x for x, y in curves[name] if y <= share), curves[name][-1][0])
        on_left = place < len(names) // 2
        label = shorten(labels_of(report)[name], 210, 7.8)
        x = xs(crossing) + (-8 if on_left else 8)
        room = text_width(label)
        x = max(x, xs.start + room) if on_left else min(x, xs.end - room)
        cls = f"fill{series_of(report)[name]} strong halo"
        drawing.text(x, ys(share) + 4, label, cls, "end" if on_left else "start")


def position(report: Report) -> Figure | None:
    """Mean divergence by the position of the token in its window."""
    curves = {n: report.evaluations[n].kl_by_position for n in compared(report)}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    last = {name: points[-1][1] / max(points[0][1], 1e-12) for name, points in curves.items()}
    return Figure(
        "position",
        "Divergence along the context",
        "Mean KL by position in the window; each point is a bucket that starts there. A level "
        "curve is healthy. One that rises to the right says that errors pile up in the context.",
        "; ".join(
            f"{labels_of(report)[name]}: last bucket {numbers.ratio(value)} the first"
            for name, value in last.items()
        ),
        lambda width: _draw_position(report, curves, width),
    )


def _draw_position(
    report: Report, curves: dict[str, list[tuple[int, float]]], width: float
) -> Drawing:
    drawing = Drawing(width, 300.0)
    starts = sorted({at for points in curves.values() for at, _ in points})
    values = [kl for points in curves.values() for _, kl in points]
    xs = Scale(starts[0] + 1, starts[-1] + 1, 58.0, width - 16, log=True)
    ys = _level_scale(values)
    y_axis(drawing, ys, 52, width - 12, numbers.level_digits(ys.ticks()))
    drawing.line((52, 250), (width - 12, 250), "axis")
    shown = -math.inf
    for at in starts:
        if xs(at + 1) - shown > 30:
            shown = xs(at + 1)
            drawing.text(shown, 266, str(at), "muted small", "middle")
    unit = "mean KL, nats per token" + (", log scale" if ys.log else "")
    drawing.text(0, 14, unit, "muted small")
    drawing.text(width - 12, 286, "position in the window, tokens, log scale", "muted small", "end")
    for name, points in curves.items():
        places = [(xs(at + 1), ys(kl)) for at, kl in points]
        drawing.path(places, f"line{series_of(report)[name]}")
        for x, y in places:
            drawing.marker(x, y, series_of(report)[name], r=3.5)
    drawn = {n: [(xs(at + 1), ys(kl)) for at, kl in points] for n, points in curves.items()}
    _end_labels(drawing, report, drawn, ys)
    return drawing


def _level_scale(values: list[float]) -> Scale:
    """From zero up; logarithmic where the curves would otherwise lie on top of each other."""
    if min(values) > 0 and max(values) > 8 * min(values):
        return Scale(*log_padded(values), 250.0, 30.0, log=True)
    return Scale(min(0.0, *values), padded(values)[1], 250.0, 30.0)


def _end_labels(
    drawing: Drawing, report: Report, curves: dict[str, list[Point]], ys: Scale
) -> None:
    """Every label stands above the right end of its curve, clear of the points under it."""
    texts = {name: shorten(labels_of(report)[name], 210, 7.8) for name in curves}
    wanted = []
    for name, points in curves.items():
        start = drawing.width - 14 - text_width(texts[name])
        first = next((i for i, (x, _) in enumerate(points) if x >= start), len(points) - 1)
        wanted.append(min(y for _, y in points[max(0, first - 1) :]) - 9)
    for (name, text), y in zip(
        texts.items(), spread(wanted, 15, ys.end, ys.start - 6), strict=True
    ):
        cls = f"fill{series_of(report)[name]} strong halo"
        drawing.text(drawing.width - 14, y, text, cls, "end")
