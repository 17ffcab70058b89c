"""The little of SVG that the figures need: a drawing, scales and axes. No dependency."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from compressor.report import palette as colours

Point = tuple[float, float]
Formatter = Callable[[float], str]

_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
CHARACTER = 6.6  # px, mean advance of a character at 12 px in the widest of the system fonts
BOLD = 7.8  # px, the same for bold text


def safe(text: str) -> str:
    """`text` as XML content; characters that XML forbids become �."""
    return escape(_ILLEGAL.sub("�", text))


def text_width(text: str) -> float:
    """Room to leave for bold `text` at 12 px, in pixels; on the generous side."""
    return len(text) * BOLD


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass
class Drawing:
    """An SVG under construction; coordinates in CSS pixels."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, content: str | None = None, **attributes: object) -> None:
        """Append an element; `cls` stands for `class`, `_` in a name for `-`."""
        pairs = (
            ("class" if name == "cls" else name.replace("_", "-"), _number(value))
            for name, value in attributes.items()
        )
        joined = "".join(f' {name}="{safe(value)}"' for name, value in pairs)
        end = "/>" if content is None else f">{safe(content)}</{tag}>"
        self.parts.append(f"<{tag}{joined}{end}")

    def line(self, start: Point, end: Point, cls: str) -> None:
        """A straight line."""
        self.add("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], cls=cls)

    def path(self, points: Sequence[Point], cls: str) -> None:
        """A polyline."""
        self.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), cls=cls)

    def bar(
        self, x: float, y: float, width: float, height: float, cls: str, **more: object
    ) -> None:
        """A rectangle; a negative width extends to the left."""
        left = min(x, x + width)
        box: dict[str, object] = {"x": left, "y": y, "width": abs(width), "height": height}
        self.add("rect", None, **{**box, "cls": cls, **more})

    def text(self, x: float, y: float, content: str, cls: str = "", anchor: str = "start") -> None:
        """A line of text with its baseline at `y`."""
        self.add("text", content, x=x, y=y, cls=cls, text_anchor=anchor)

    def marker(self, x: float, y: float, series: int, hollow: bool = False, r: float = 4.5) -> None:
        """The mark of a series: colour and shape say the same."""
        cls = f"hollow{series}" if hollow else f"fill{series}"
        if series == 1:
            self.add("circle", cx=float(x), cy=float(y), r=r, cls=cls)
            return
        corners = _SHAPES[series % len(_SHAPES)]
        points = " ".join(f"{x + dx * r:.1f},{y + dy * r:.1f}" for dx, dy in corners)
        self.add("polygon", points=points, cls=cls)

    def render(self, identifier: str, title: str, description: str, style: str = "") -> str:
        """The SVG element with its accessible name and description."""
        box = f"0 0 {_number(float(self.width))} {_number(float(self.height))}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" id="{identifier}" viewBox="{box}"'
            f' width="{_number(float(self.width))}" height="{_number(float(self.height))}"'
            f' role="img" aria-labelledby="{identifier}-title {identifier}-description">'
        )
        names = (
            f'<title id="{identifier}-title">{safe(title)}</title>'
            f'<desc id="{identifier}-description">{safe(description)}</desc>'
        )
        return "\n".join([head, names, *([style] if style else []), *self.parts, "</svg>"])


_SHAPES: tuple[tuple[Point, ...], ...] = (
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),  # diamond: the base
    (),  # circle
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),  # square
    ((0, -1.2), (1.2, 0.9), (-1.2, 0.9)),  # triangle up
    ((0, 1.2), (1.2, -0.9), (-1.2, -0.9)),  # triangle down
    ((-0.5, -1.2), (0.5, -1.2), (1.2, 0), (0.5, 1.2), (-0.5, 1.2), (-1.2, 0)),  # hexagon
)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end], linearly or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of `value`."""
        low, high, value = (self._axis(v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def _axis(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values within the domain, about as many as wanted."""
        decades = math.log10(self.high / self.low) if self.log else 0.0
        if self.log and decades >= 2:
            step = max(1, math.ceil(decades / wanted))
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            return [10.0**exponent for exponent in range(first, last + 1, step)]
        if decades > 0.6:
            factors = (1, 2, 5) if decades < 1.3 else (1, 3)
            return [v for v in _multiples(self.low, factors) if self.low <= v <= self.high]
        return _linear_ticks(self.low, self.high, wanted)


def _multiples(low: float, factors: tuple[int, ...]) -> list[float]:
    start = math.floor(math.log10(low))
    return [factor * 10.0**e for e in range(start, start + 4) for factor in factors]


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Range of the values with a margin on both sides; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) * share or abs(high) * share or 1.0
    return low - margin, high + margin


def log_padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Range of positive values with a margin in the logarithm."""
    low, high = padded([math.log10(v) for v in values], share)
    if high - low < 0.2:
        low, high = low - 0.1, high + 0.1
    return 10.0**low, 10.0**high


def x_axis(
    drawing: Drawing, scale: Scale, top: float, bottom: float, show: Formatter, ticks: int = 5
) -> None:
    """Vertical grid lines and the tick labels below them."""
    for value in scale.ticks(ticks):
        drawing.line((scale(value), top), (scale(value), bottom), "grid")
        drawing.text(scale(value), bottom + 16, show(value), "muted small", "middle")
    drawing.line((scale.start, bottom), (scale.end, bottom), "axis")


def y_axis(
    drawing: Drawing, scale: Scale, left: float, right: float, show: Formatter, ticks: int = 5
) -> None:
    """Horizontal grid lines and the tick labels left of them."""
    for value in scale.ticks(ticks):
        drawing.line((left, scale(value)), (right, scale(value)), "grid")
        drawing.text(left - 6, scale(value) + 4, show(value), "muted small", "end")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and, if they fit, in [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: dict[int, float] = {}
    previous = low - gap
    for index in order:
        previous = placed[index] = max(wanted[index], previous + gap)
    following = high + gap
    for index in reversed(order):
        following = placed[index] = min(placed[index], following - gap)
    return [placed[index] for index in range(len(wanted))]


def standalone_style(palette: dict[str, str], width: float, height: float) -> str:
    """Style and background of a figure that lives in a file of its own."""
    css = colours.baked(colours.figure_css(), palette)
    background = f'<rect width="{width:g}" height="{height:g}" fill="{palette["paper"]}"/>'
    return f"<style>\n{css}\n</style>\n{background}"
