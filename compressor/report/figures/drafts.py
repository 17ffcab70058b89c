"""Figures of drafts: acceptance by position, speed-up by drafted tokens, τ by training tokens."""

from __future__ import annotations

import math

from compressor.decoding.results import WORTHWHILE, CurvePoint, DraftSpeed, LearningCurve
from compressor.report import numbers
from compressor.report.figures.base import SPLIT, Figure, shorten
from compressor.report.figures.svg import (
    Drawing,
    Point,
    Scale,
    log_padded,
    padded,
    x_axis,
    y_axis,
)
from compressor.report.schema import Draft, Report

_GREEDY, _SAMPLED, _OTHER = 1, 2, 3  # series
_PANEL = 132.0  # px


def drafts(report: Report) -> list[Figure]:
    """Up to three figures for every draft."""
    found = []
    for draft in report.drafts:
        found += [_acceptance(draft), _speedup(draft)]
        if draft.curve is not None and len(draft.curve.points) > 1:
            found.append(_curve(draft, draft.curve))
    return found


# --- acceptance by position ------------------------------------------------------------------


def _acceptance(draft: Draft) -> Figure:
    domains = draft.measurement.domains
    listed = "; ".join(
        f"{name}: {', '.join(numbers.share(share) for share in domain.greedy.by_position)}"
        for name, domain in domains.items()
    )
    return Figure(
        f"acceptance-{draft.id}",
        f"{draft.label}: how far the target agrees, by kind of text",
        "Share of blocks in which the first tokens were all accepted, by their number. Circles: "
        "greedy; squares: sampled at temperature one; dashes: greedy over all text. A line that "
        "falls fast wants few drafted tokens.",
        f"greedy shares by position; {listed}",
        lambda width: _draw_acceptance(draft, width),
    )


def _draw_acceptance(draft: Draft, width: float) -> Drawing:
    found = draft.measurement
    columns = 3 if width >= SPLIT else 2
    rows = -(-len(found.domains) // columns)
    drawing = Drawing(width, rows * _PANEL + 16)
    room, most = (width - 46) / columns, len(found.greedy.by_position)
    for place, (name, domain) in enumerate(found.domains.items()):
        x, y = 46 + room * (place % columns), _PANEL * (place // columns)
        xs = Scale(1, max(2, most), x + 8, x + room - 18)
        ys = Scale(0, 1, y + 104, y + 26)
        drawing.text(x, y + 14, shorten(name, room - 8, 7.2), "strong small")
        y_axis(drawing, ys, x, xs.end + 8, _percent if not place % columns else _nothing, 2)
        for position in range(1, most + 1):
            drawing.text(xs(position), y + 120, str(position), "muted small", "middle")
        drawing.path(_points(found.greedy.by_position, xs, ys), "ghostline")
        for shares, series in (
            (domain.sampled.by_position, _SAMPLED),
            (domain.greedy.by_position, _GREEDY),
        ):
            _line(drawing, _points(shares, xs, ys), series)
    drawing.text(width - 8, rows * _PANEL + 10, "drafted tokens", "muted small", "end")
    return drawing


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def _nothing(_: float) -> str:
    return ""


def _points(shares: tuple[float, ...], xs: Scale, ys: Scale) -> list[Point]:
    return [(xs(position), ys(share)) for position, share in enumerate(shares, 1)]


def _line(drawing: Drawing, points: list[Point], series: int, hollow: bool = False) -> None:
    if len(points) > 1:
        drawing.path(points, f"line{series}")
    for x, y in points:
        drawing.marker(x, y, series, hollow, 3.2)


# --- speed-up against γ ----------------------------------------------------------------------


def predictions(draft: Draft, speed: DraftSpeed) -> list[float]:
    """τ / (γ c + v) for γ = 1 … n, from the greedy acceptance over all text."""
    shares = draft.measurement.greedy.by_position
    return [
        (1 + sum(shares[:drafted])) / (drafted * speed.draft_cost + verify)
        for drafted, verify in enumerate(speed.verify_costs, 1)
    ]


def _speedup(draft: Draft) -> Figure:
    listed = "; ".join(
        f"batch {speed.batch}: "
        + ", ".join(numbers.ratio(value) for value in predictions(draft, speed))
        + f"; measured {numbers.ratio(speed.measured)} at {speed.drafted}"
        for speed in draft.measurement.speeds
    )
    return Figure(
        f"speedup-{draft.id}",
        f"{draft.label}: predicted speed-up against the number of drafted tokens",
        "Lines: tokens a pass over the time of a pass and its drafts, in plain steps, from what "
        "was measured on this machine, a line for each batch size. Hollow marks: measured "
        f"wall-clock. Below the dashes ({numbers.ratio(WORTHWHILE)}) a draft is not worth "
        "deploying.",
        listed,
        lambda width: _draw_speedup(draft, width),
    )


def _draw_speedup(draft: Draft, width: float) -> Drawing:
    drawing = Drawing(width, 270.0)
    speeds = draft.measurement.speeds
    lines = [predictions(draft, speed) for speed in speeds]
    values = [value for line in lines for value in line] + [speed.measured for speed in speeds]
    most = max(map(len, lines))
    xs = Scale(1, max(2, most), 60, width - 92)
    ys = Scale(*padded([*values, 1.0, WORTHWHILE]), 226, 26)
    y_axis(drawing, ys, 48, width - 80, numbers.level_digits(ys.ticks()))
    for drafted in range(1, most + 1):
        drawing.text(xs(drafted), 244, str(drafted), "muted small", "middle")
    drawing.path([(48, ys(WORTHWHILE)), (width - 80, ys(WORTHWHILE))], "ghostline")
    for place, (speed, line) in enumerate(zip(speeds, lines, strict=True)):
        series = (_GREEDY, _SAMPLED, _OTHER)[place % 3]
        points = [(xs(drafted), ys(value)) for drafted, value in enumerate(line, 1)]
        _line(drawing, points, series)
        drawing.marker(xs(speed.drafted), ys(speed.measured), series, True, 5.0)
        drawing.text(8 + 76 * place, 14, f"batch {speed.batch}", f"fill{series} strong")
    drawing.text(width - 8, 262, "drafted tokens", "muted small", "end")
    return drawing


# --- τ against training tokens ---------------------------------------------------------------


def _curve(draft: Draft, curve: LearningCurve) -> Figure:
    fitted = ""
    if curve.fit is not None:
        gain = math.log(2)
        fitted = f" Every doubling of training brought {numbers.number(curve.fit.slope * gain)}"
        if curve.fit.low is not None and curve.fit.high is not None:
            ends = (numbers.number(end * gain) for end in (curve.fit.low, curve.fit.high))
            fitted += f" (95 % interval {' to '.join(ends)})"
        fitted += " tokens a pass."
    listed = "; ".join(
        f"{numbers.count(point.tokens)}: {numbers.number(point.length)}" for point in curve.points
    )
    return Figure(
        f"training-{draft.id}",
        f"{draft.label}: tokens a pass against training tokens",
        "Greedy, on development text that neither training nor evaluation sees; the line is the "
        f"fit in the logarithm of the tokens.{fitted}",
        listed,
        lambda width: _draw_curve(curve, width),
    )


def _draw_curve(curve: LearningCurve, width: float) -> Drawing:
    drawing = Drawing(width, 260.0)
    tokens = [float(point.tokens) for point in curve.points]
    lines = [_fitted(curve, point) for point in curve.points]
    values = [point.length for point in curve.points] + [v for v in lines if v is not None]
    xs = Scale(*log_padded(tokens), 52, width - 26, log=True)
    ys = Scale(*padded(values), 210, 26)
    y_axis(drawing, ys, 52, width - 26, numbers.level_digits(ys.ticks()))
    x_axis(drawing, xs, 26, 210, numbers.count, 4)
    fitted = [(xs(x), ys(y)) for x, y in zip(tokens, lines, strict=True) if y is not None]
    if fitted:
        drawing.path([fitted[0], fitted[-1]], "ghostline")
    for point in curve.points:
        drawing.marker(xs(point.tokens), ys(point.length), _GREEDY)
    drawing.text(0, 14, "tokens a pass", "muted small")
    drawing.text(width - 26, 250, "training tokens, log scale", "muted small", "end")
    return drawing


def _fitted(curve: LearningCurve, point: CurvePoint) -> float | None:
    if curve.fit is None:
        return None
    return curve.fit.intercept + curve.fit.slope * math.log(point.tokens)
