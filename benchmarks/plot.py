"""Line charts as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 860, 440
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 20, 270, 50
"""Margins [pixels]; the names of the lines stand in the right one."""
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c564b",
    "#7f7f7f",
    "#000000",
    "#bcbd22",
)


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str, y_from: float | None = None) -> str:
    """Return an SVG of lines with a marker at every point.

    Args:
        series: points (x, y) sorted by x, by name of the line.
        x_label: with the unit.
        y_label: with the unit.
        y_from: start of the y axis; None starts below the lowest point.
    """
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys) if y_from is None else y_from, max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = _share(x, x_ticks), 1.0 - _share(y, y_ticks)
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _TOP + down * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{middle_x}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 16 {middle_y})"'
    parts.append(f'<text x="16" y="{middle_y}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    for n, (name, points) in enumerate(series.items()):
        parts += _line(name, [place(x, y) for x, y in points], _COLOURS[n % len(_COLOURS)], _TOP + 10 + 20 * n)
    return "\n".join([*parts, "</svg>", ""])


def _line(name: str, places: Points, colour: str, legend_y: float) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    legend_x = _WIDTH - _RIGHT + 20
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places),
        f'<circle cx="{legend_x}" cy="{legend_y}" r="5" fill="{colour}"/>',
        f'<text x="{legend_x + 12}" y="{legend_y + 4}">{escape(name)}</text>',
    ]


def ticks(low: float, high: float) -> list[float]:
    """Return four to eleven evenly spaced round numbers that cover `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (step * part) <= 8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def _share(value: float, of: Sequence[float]) -> float:
    return (value - of[0]) / (of[-1] - of[0])
