"""The two kinds of plots that the page has, as SVG: stacked bars and a line. Pure text: the same figures give the same bytes.

Written by hand, since they are a few rectangles: a plotting library would be more to install than the service itself. Text is
text, and the colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 720
#: Left of the bars, where their names stand; right of them, where their values do.
NAMES, VALUES = 250, 90
ROW = 26
TOP = 44
#: Told apart also without colour: in the order of the legend, and by their lightness.
COLOURS = ["#3b82d6", "#e0873a", "#4fa37a", "#a76fc9"]
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .t { font-weight: 600 } .s { fill: #57606a; font-size: 12px }
line { stroke: #8c959f; stroke-opacity: .4 } .l { fill: none; stroke: #3b82d6; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .s { fill: #9da7b1 } }
"""


def bars(title: str, unit: str, rows: Mapping[str, Sequence[float]], series: Sequence[str] = ("",)) -> str:
    """A bar for each row, of one piece for each of `series`; its sum stands behind it."""
    largest = max(map(sum, rows.values()))
    top, step = _scale(largest)
    inner = WIDTH - NAMES - VALUES
    bottom = TOP + ROW * len(rows)
    parts = []
    for i in range(round(top / step) + 1):
        x = NAMES + inner * i * step / top
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 18, _number(i * step), "s", "middle"))
    for row, (name, values) in enumerate(rows.items()):
        y, x = TOP + ROW * row, float(NAMES)
        parts.append(_text(NAMES - 8, y + 18, name, anchor="end"))
        for value, colour in zip(values, COLOURS, strict=False):
            wide = inner * max(0.0, value) / top
            parts.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="{ROW - 8}" fill="{colour}"/>')
            x += wide
        parts.append(_text(x + 6, y + 18, _number(sum(values)), "s"))
    parts.append(_text(NAMES + inner / 2, bottom + 38, unit, "s", "middle"))
    return _page(title, bottom + 50, parts, series)


def line(title: str, x_name: str, y_name: str, points: Sequence[tuple[float, float]], *, logarithmic: bool = False) -> str:
    """A line through these points, each with its value. `logarithmic`: its x axis."""

    def along(value: float) -> float:
        return math.log(value) if logarithmic else value

    left, right, inset, height = 70, 40, 30, 260
    first, last = along(points[0][0]), along(points[-1][0])
    top, step = _scale(max(y for _, y in points))
    bottom, inner = TOP + height, WIDTH - left - right
    scale = (inner - inset) / ((last - first) or 1)
    places = [(left + inset + scale * (along(x) - first), bottom - height * max(0.0, y) / top) for x, y in points]
    parts = []
    for i in range(round(top / step) + 1):
        y = bottom - height * i * step / top
        parts.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, _number(i * step), "s", "end"))
    parts.append(f'<polyline class="l" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), (value, result) in zip(places, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
        parts.append(_text(x, y - 10, _number(result), "s", "middle"))
        parts.append(_text(x, bottom + 18, _number(value), "s", "middle"))
    parts.append(_text(left + inner / 2, bottom + 38, x_name, "s", "middle"))
    parts.append(f'<g transform="rotate(-90 16 {TOP + height / 2:.0f})">{_text(16, TOP + height / 2, y_name, "s", "middle")}</g>')
    return _page(title, bottom + 50, parts, ("",))


def _page(title: str, height: float, parts: Sequence[str], series: Sequence[str]) -> str:
    legend, x = [], WIDTH - 10
    for name, colour in reversed(list(zip(series, COLOURS, strict=False))):
        if name:
            x -= 7 * len(name) + 8
            legend.append(_text(x, 22, name, "s"))
            x -= 18
            legend.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    body = [f"<style>{_STYLE}</style>", _text(10, 22, title, "t"), *legend, *parts]
    return "\n".join([head, *body, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}>{escape(text)}</text>'


def _scale(largest: float) -> tuple[float, float]:
    """The end of an axis and the distance of its marks: four to eight of 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return 1.0, 0.25
    step = 10.0 ** math.floor(math.log10(largest / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if largest / (step * factor) <= 8)
    return step * math.ceil(largest / step), step


def _number(value: float) -> str:
    digits = 0 if abs(value) >= 100 or value == round(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
