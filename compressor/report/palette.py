"""Colours of the report, for light and for dark surroundings.

The series colours differ in lightness as well as hue (after Okabe and Ito's palette for
colour-blind readers), carry a marker shape of their own, and reach a contrast of 4.5 : 1
against the page in both palettes, since labels are set in them.
"""

from __future__ import annotations

import re

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#16191d",
    "muted": "#59606a",
    "rule": "#cfd4da",
    "grid": "#e7eaed",
    "s0": "#4a515b",
    "s1": "#00609c",
    "s2": "#ad4300",
    "s3": "#00694f",
    "s4": "#8a3a80",
    "s5": "#765900",
    "good": "#17703f",
    "bad": "#b3261e",
    "unsure": "#855500",
    "warm": "#d2531a",
    "cool": "#0072b2",
}

DARK = {
    "paper": "#131519",
    "panel": "#1b1e24",
    "ink": "#e7e9ec",
    "muted": "#a3aab4",
    "rule": "#3a4049",
    "grid": "#262a31",
    "s0": "#b0b7c1",
    "s1": "#6fb9f2",
    "s2": "#ff9e66",
    "s3": "#52d0a6",
    "s4": "#e09fd6",
    "s5": "#e2c15c",
    "good": "#6fd39a",
    "bad": "#ff8f86",
    "unsure": "#f0bf60",
    "warm": "#ff7f45",
    "cool": "#56b4e9",
}

SERIES = 6
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'


def variables(palette: dict[str, str]) -> str:
    """The palette as CSS custom properties."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


def figure_css() -> str:
    """Style of every figure, in terms of the custom properties."""
    rules = [
        f"svg text {{ font-family: {FONT}; font-size: 12px; fill: var(--ink);"
        " font-variant-numeric: tabular-nums; }",
        "svg .muted { fill: var(--muted); } svg .strong { font-weight: 600; }",
        "svg .small { font-size: 11px; }",
        "svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px;"
        " stroke-linejoin: round; }",
        "svg .grid { stroke: var(--grid); stroke-width: 1; }",
        "svg .axis { stroke: var(--rule); stroke-width: 1; }",
        "svg .zero { stroke: var(--muted); stroke-width: 1; }",
        "svg .ghost { fill: var(--muted); fill-opacity: .4; stroke: none; }",
        "svg .ghostline { fill: none; stroke: var(--muted); stroke-width: 1.25;"
        " stroke-dasharray: 4 3; }",
        "svg .warm { fill: var(--warm); } svg .cool { fill: var(--cool); }",
        "svg .outline { fill: none; stroke: var(--ink); stroke-width: 1.5; }",
        "svg .leader { stroke: var(--muted); stroke-width: .75; fill: none; }",
        "svg .paper { fill: var(--paper); }",
    ]
    return "\n".join([*rules, *(_series_css(place) for place in range(SERIES))])


def _series_css(place: int) -> str:
    colour = f"var(--s{place})"
    return (
        f"svg .fill{place} {{ fill: {colour}; }} "
        f"svg .line{place} {{ stroke: {colour}; stroke-width: 1.75; fill: none; }} "
        f"svg .hollow{place} {{ stroke: {colour}; stroke-width: 1.75; fill: var(--paper); }}"
    )


def baked(css: str, palette: dict[str, str]) -> str:
    """`css` with every custom property replaced, for files that stand alone."""
    return re.sub(r"var\(--(\w+)\)", lambda match: palette[match[1]], css)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two `#rrggbb` colours (WCAG 2.2, 1.4.3)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
