"""Shares of the domains over time, in the stages that weigh them, and the losses behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.report import numbers
from compressor.report import palette as colours
from compressor.report.figures.base import SPLIT, Figure, shorten
from compressor.report.figures.svg import Drawing, Scale, padded, spread, x_axis, y_axis
from compressor.report.schema import Mixture, MixturePoint, Report, Variant

_POINTS = 60  # drawn of a longer history
_HEIGHT, _LABELS = 250.0, 112.0

Curves = Mapping[str, list[tuple[int, float]]]


def mixtures(report: Report) -> list[Figure]:
    """One figure for every stage whose mixture was measured more than once."""
    found = [
        (variant, variant.stage.mixture)
        for variant in report.variants
        if variant.stage is not None and variant.stage.mixture is not None
    ]
    return [_mixture(variant, mixture) for variant, mixture in found if len(mixture.points) > 1]


def _mixture(variant: Variant, mixture: Mixture) -> Figure:
    first, last = mixture.points[0], mixture.points[-1]
    changes = "; ".join(
        f"{name}: {numbers.share(share)} to {numbers.share(last.shares[name])}"
        for name, share in first.shares.items()
    )
    return Figure(
        f"mixture-{variant.id}",
        f"Mixture of domains: {variant.label}",
        f"Left: the share of every domain, by {mixture.unit}. Level lines mean that no domain "
        "stood out from noise, or that shares were fixed. Right: what it lost on held-out text. "
        "Domains that gain a share should come down.",
        f"Shares from {mixture.unit} {first.at} to {last.at}: {changes}",
        lambda width: _draw(mixture, width),
    )


def _draw(mixture: Mixture, width: float) -> Drawing:
    points = _thinned(mixture.points)
    shares: Curves = _curves(points, "shares")
    losses: Curves = {n: c for n, c in _curves(points, "losses").items() if len(c) > 1}
    panels = [("share of the text", shares), ("nats per token, held out", losses)]
    panels = [panel for panel in panels if panel[1]]
    beside = width >= SPLIT
    drawing = Drawing(width, _HEIGHT if beside else _HEIGHT * len(panels))
    room = width / len(panels) if beside else width
    names = list(shares)
    for place, (title, curves) in enumerate(panels):
        corner = (room * place, 0.0) if beside else (0.0, _HEIGHT * place)
        _panel(drawing, corner, room - 8, title, curves, names)
        drawing.text(corner[0] + 46, corner[1] + _HEIGHT - 6, f"{mixture.unit}s", "muted small")
    return drawing


def _thinned(points: Sequence[MixturePoint]) -> list[MixturePoint]:
    """Evenly, the first and the last among them."""
    if len(points) <= _POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _curves(points: Sequence[MixturePoint], what: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        for name, value in getattr(point, what).items():
            curves.setdefault(name, []).append((point.at, value))
    return curves


def _panel(
    drawing: Drawing,
    corner: tuple[float, float],
    room: float,
    title: str,
    curves: Curves,
    names: Sequence[str],
) -> None:
    x0, y0 = corner
    values = [value for curve in curves.values() for _, value in curve]
    places = [at for curve in curves.values() for at, _ in curve]
    xs = Scale(min(places), max(places), x0 + 46, x0 + room - _LABELS)
    ys = Scale(min(0.0, *values), padded(values)[1], y0 + _HEIGHT - 44, y0 + 26)
    drawing.text(x0, y0 + 14, title, "muted small")
    y_axis(drawing, ys, xs.start, xs.end, numbers.level_digits(ys.ticks()))
    x_axis(drawing, xs, ys.end, ys.start, lambda at: f"{at:.0f}", 3)
    ends = []
    for name, curve in curves.items():
        series = names.index(name) % colours.SERIES
        path = [(xs(at), ys(value)) for at, value in curve]
        drawing.path(path, f"line{series}")
        drawing.marker(*path[-1], series, r=3.5)
        ends.append(path[-1][1] + 4)
    for name, y in zip(curves, spread(ends, 14, ys.end + 4, ys.start + 4), strict=True):
        series = names.index(name) % colours.SERIES
        label = shorten(name, _LABELS - 12)
        drawing.text(xs.end + 9, y, label, f"fill{series} small")
