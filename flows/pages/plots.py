"""Plots as inline SVG, for half the width of a page or the width of a phone. Colours are those of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from flows.pages.page import render

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44
MARGIN = 10
"""Around an image [px]."""
Numbers = Sequence[float | None]
_FEWEST_TICKS = 3
"""On a log axis; a shorter one has ticks in even steps."""
_LABEL_HEIGHT, _LABEL_WIDTH = 17, 8.5
"""Of a name and of a letter of it, on the smallest screen [px]."""
_LABEL_GAP = 22
"""At least between two labels on an axis [px]."""
_MOST_STEPS = 6
"""Between the ticks of an axis."""
_LEADER = 18
"""From the end of an axis to the names right of it [px]."""
_LONGEST_LABEL = 20
SMOOTHED_FROM = 50
"""Points of a curve from which on it is drawn smoothed."""
SMOOTHED = "Line: mean over a twentieth of the points around each; faint, the points."
_SMALLEST_SHOWN = 1e-5
"""A log axis begins at this fraction of its largest value; smaller values are rounding errors, drawn on the axis."""


@dataclass(frozen=True)
class Scale:
    """Maps the values of an axis to [0, 1], and places its ticks."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Ticks are whole numbers."""

    def __call__(self, value: float) -> float:
        """Return the place of a value, 0 at the low end; values outside the axis are clipped."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return some round values, seven at most on a linear axis."""
        if self.log:
            return self._decades()
        least = (self.high - self.low) / _MOST_STEPS
        power = 10.0 ** math.floor(math.log10(least))
        step = power * next((factor for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10)
        step = max(step, 1.0) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        factors = (1,) if last - first >= 2 else (1, 2, 5)
        every = max(1, (last - first) // 5)
        powers = range(first - 1, last + 1) if len(factors) > 1 else range(first, last + 1, every)
        values = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
        return found if len(found) >= _FEWEST_TICKS else Scale(self.low, self.high).ticks()


def places(first: int, last: int) -> Scale:
    """Return an axis of whole numbers, such as channels."""
    return Scale(first, max(last, first + 1), whole=True)


def scale_of(values: Iterable[float | None], *, log: bool = False, zero: bool = False) -> Scale:
    """Return an axis with a little room around some values; a log axis ignores values that are not above 0.

    With `zero`, a linear axis begins at 0.
    """
    known = [value for value in values if value is not None and (value > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    if log:
        low = max(low, high * _SMALLEST_SHOWN)
        return Scale(low / 1.15, high * 1.15, log=True)
    low = 0.0 if zero else low
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Scale(low if zero else low - room, high + room)


def running_mean(values: Numbers, share: float = 0.05) -> list[float | None]:
    """Return at each point the mean of the known ones around it.

    They are as many on each side, so that a steep beginning is not flattened; at the end those of one side are missing,
    or the last value, a noisy one, would stand for the mean.
    """
    half = max(1, round(len(values) * share / 2))
    smoothed: list[float | None] = []
    for at, value in enumerate(values):
        reach = min(half, at)
        near = [each for each in values[at - reach : at + reach + 1] if each is not None]
        smoothed.append(None if value is None else math.fsum(near) / len(near))
    return smoothed


def tick_text(value: float) -> str:
    """Return the number at a tick, with a true minus sign: 0.5, 12,000, 1e-6."""
    text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\u2212")


class Mark(NamedTuple):
    """One SVG element."""

    tag: str
    attributes: Mapping[str, object]
    text: str = ""
    tip: str = ""
    """Shown when the pointer is over it."""


End = tuple[float, float, str, Mapping[str, object]]
"""A point, its name, and the attributes of the line that leads from one to the other."""


class Plot:
    """A pair of axes and the marks on them."""

    def __init__(self, x: Scale, y: Scale, x_label: str, y_label: str, names: Sequence[str] = ()) -> None:
        """Draw the axes; the labels give the units. At the right is room for `names`, which `ends` writes there."""
        x_label, y_label = _named(x_label, x), _named(y_label, y)
        self._x, self._y, self.label = x, y, f"{y_label} by {x_label}"
        self.marks: list[Mark] = []
        self._right = WIDTH - RIGHT - (round(max(map(_width, names))) + _LEADER if names else 0)
        right, bottom = self._right, HEIGHT - BOTTOM
        for value in _apart(y.ticks(), self.y, _LABEL_GAP):
            at = self.y(value)
            self._line("grid", LEFT, right, at, at)
            self._write(LEFT - 8, at + 4, tick_text(value), "tick", "end")
        widest = _LABEL_WIDTH * max((len(tick_text(value)) for value in x.ticks()), default=0)
        for value in _apart(x.ticks(), self.x, widest + _LABEL_GAP):
            self._write(self.x(value), bottom + 18, tick_text(value), "tick", "middle")
        self._line("axis", LEFT, right, bottom, bottom)
        self._write(0, 14, y_label, "label", "start")
        self._write(right, HEIGHT - 6, x_label, "label", "end")

    @property
    def top(self) -> float:
        """The largest value that a line shows."""
        return self._y.high

    def x(self, value: float) -> float:
        """Return the distance of a value from the left [px]."""
        return round(LEFT + self._x(value) * (self._right - LEFT), 1)

    def y(self, value: float) -> float:
        """Return the distance of a value from the top [px]."""
        return round(HEIGHT - BOTTOM - self._y(value) * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, xs: Numbers, ys: Numbers, class_: str = "line") -> None:
        """Draw a line through the known points."""
        self.marks.append(Mark("polyline", {"class": class_, "points": self._points(xs, ys)}))

    def curve(self, xs: Numbers, ys: Numbers, class_: str = "line") -> None:
        """Draw a line; where it has many points, the running mean of about a twentieth of them, itself faint behind."""
        if len(ys) >= SMOOTHED_FROM:
            self.line(xs, ys, "line thin")
            ys = running_mean(ys)
        self.line(xs, ys, class_)

    def band(self, xs: Numbers, lows: Numbers, highs: Numbers) -> None:
        """Fill between two lines."""
        around = self._points([*xs, *reversed(xs)], [*highs, *reversed(lows)])
        self.marks.append(Mark("polygon", {"class": "band", "points": around}))

    def lines(self, lines: Sequence[tuple[str, Numbers, Numbers]], point: str = "") -> None:
        """Draw named lines in the colours of a ramp, from its first to its last, and their names where they end.

        With a name for a `point`, each has a dot in the colour of its line.
        """
        ends = list[End]()
        for at, (name, xs, ys) in enumerate(lines):
            ramp = {"class": "ramp", "style": f"--along: {at / max(1, len(lines) - 1):.0%}"}
            look = ramp if len(lines) > 1 else {"class": "line"}
            self.marks.append(Mark("polyline", {**look, "points": self._points(xs, ys)}))
            known = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
            for x, y in known if point else ():
                circle = {**look, "class": "point", "cx": self.x(x), "cy": self.y(y), "r": 4}
                self.marks.append(Mark("circle", circle, tip=f"{name}, {point} {x:g}: {_told(y)}".removeprefix(", ")))
            ends += [(*known[-1], name, look)] if name and known else []
        self.ends(ends)

    def dots(self, xs: Sequence[int], ys: Numbers, class_: str, what: str) -> None:
        """Draw a dot per point; its tooltip names it."""
        for x, y in zip(xs, ys, strict=True):
            if y is not None:
                self.dot(x, y, class_, f"{what} {x}")

    def dot(self, x: float, y: float, class_: str, what: str) -> None:
        """Draw one dot; its tooltip says what it is, and its value."""
        circle = {"class": class_, "cx": self.x(x), "cy": self.y(y), "r": 2 if class_ == "dot" else 4}
        self.marks.append(Mark("circle", circle, tip=f"{what}: {_told(y)}"))

    def marker(self, x: float, y: float, which: int, what: str) -> None:
        """Draw the marker of one of several runs, open: those of others at the same place are seen through it."""
        self.marks.append(_marker(self.x(x), self.y(y), which, f"{what}: {_told(y)}"))

    def ends(self, points: Iterable[End]) -> None:
        """Write names right of the axes, so that they stand apart, and lead a line to each from its point."""

        def order(end: End) -> tuple[int, float, float]:
            height = self.y(end[1])  # of about the same, the rightmost first: the line of another would cross it
            return round(height / _LABEL_HEIGHT), -self.x(end[0]), height

        placed = sorted(points, key=order)
        height, lowest = -math.inf, HEIGHT - BOTTOM
        for at, (x, y, name, look) in enumerate(placed):
            own = min(self.y(y), lowest - (len(placed) - 1 - at) * _LABEL_HEIGHT)
            height = max(own, height + _LABEL_HEIGHT)
            leader = {"x1": self.x(x), "x2": self._right + _LEADER - 4, "y1": self.y(y), "y2": height}
            self.marks.append(Mark("line", {**look, "class": f"{look['class']} leader", **leader}))
            self._name(self._right + _LEADER, height + 4, name, "start")

    def key(self, entries: Sequence[tuple[str, str]], *, marked: bool = False) -> None:
        """Write names and a piece of their lines, given by class, at the top right: falling curves leave room there.

        With `marked`, they are those of runs, which have markers.
        """
        right = WIDTH - RIGHT
        for which, (name, class_) in enumerate(entries):
            y = TOP + 12 + which * _LABEL_HEIGHT
            self._line(class_, right - 34, right, y - 4, y - 4)
            self.marks += [_marker(right - 17, y - 4, which)] if marked else []
            self._name(right - 40, y, name, "end")

    def bars(self, edges: Sequence[float], heights: Sequence[float], floor: float) -> None:
        """Draw a histogram whose bars stand on a floor; empty bins have none."""
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if height > 0:
                top, width = self.y(height), max(self.x(high) - self.x(low) - 0.5, 0.5)
                tip = f"{low:.4g} to {high:.4g}: {height:,.0f}"
                size = {"width": round(width, 1), "height": round(self.y(floor) - top, 1)}
                self.marks.append(Mark("rect", {"class": "bar", "x": self.x(low), "y": top, **size}, tip=tip))

    def level(self, y: float) -> None:
        """Draw a dashed horizontal line at a value."""
        self._line("bound", LEFT, self._right, self.y(y), self.y(y))

    def place(self, x: float, text: str) -> None:
        """Draw a labelled vertical line at a value."""
        at = self.x(x)
        self._line("bound", at, at, TOP, HEIGHT - BOTTOM)
        right = at > (WIDTH + LEFT) / 2
        self._write(at + (-6 if right else 6), TOP + 12, text, "note", "end" if right else "start")

    def svg(self) -> Markup:
        """Return the plot as an element of a page, in the style of that page."""
        return _svg(WIDTH, HEIGHT, self.label, self.marks)

    def image(self, style: str, remarks: Sequence[str] = ()) -> Markup:
        """Return the plot as an image with a style and a white margin, and remarks on lines below its axis."""
        height = HEIGHT + len(remarks) * _LABEL_HEIGHT + 2 * MARGIN
        size = {"left": -MARGIN, "top": -MARGIN, "width": WIDTH + 2 * MARGIN, "height": height}
        below = [
            _text(0, HEIGHT + 12 + at * _LABEL_HEIGHT, remark, "tick", "start") for at, remark in enumerate(remarks)
        ]
        return render("plot.svg.j2", **size, label=self.label, marks=[*self.marks, *below], image_style=style)

    def _points(self, xs: Numbers, ys: Numbers) -> str:
        """Return the known points; those above the axis are left out, not drawn as if they lay at its end."""
        most = self._y.high + 1e-9 * abs(self._y.high)
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None and y <= most]
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in known)

    def _line(self, class_: str, x1: float, x2: float, y1: float, y2: float) -> None:
        self.marks.append(Mark("line", {"class": class_, "x1": x1, "x2": x2, "y1": y1, "y2": y2}))

    def _name(self, x: float, y: float, name: str, anchor: str) -> None:
        """Write a name over what is drawn; of a long one the beginning, and all of it in its tooltip."""
        short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}\u2026"
        self.marks.append(_text(x, y, short, "note", anchor)._replace(tip="" if short == name else name))

    def _write(self, x: float, y: float, text: str, class_: str, anchor: str) -> None:
        self.marks.append(_text(x, y, text, class_, anchor))


_MARKERS = (
    "m-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
    "m-4,-4h8v8h-8z",
    "m0,-7l6.5,11h-13z",
    "m0,-8l8,8l-8,8l-8,-8z",
)
"""Of runs side by side, around their places: circle, square, triangle and diamond, each larger than the last."""


def _told(value: float) -> str:
    """Return a value in a tooltip: with the decimals of a loss, unless it is far larger or smaller than one."""
    return (f"{value:.4f}" if 0.01 <= abs(value) < 100 else f"{value:.4g}").replace("-", "\u2212")


def _marker(x: float, y: float, which: int, tip: str = "") -> Mark:
    return Mark("path", {"class": f"marker run-{which}", "d": f"M{x},{y}{_MARKERS[which]}"}, tip=tip)


def _named(label: str, axis: Scale) -> str:
    return f"{label}, log scale" if axis.log else label


def _apart(ticks: list[float], place: Callable[[float], float], room: float) -> list[float]:
    """Return ticks, or every second or fourth of them, so that their texts stand apart."""
    while len(ticks) > 2 and min(abs(place(b) - place(a)) for a, b in itertools.pairwise(ticks)) < room:
        ticks = ticks[::2]
    return ticks


def _width(name: str) -> float:
    """Return how wide a name is at most [px]."""
    return _LABEL_WIDTH * min(len(name), _LONGEST_LABEL)


def _text(x: float, y: float, text: str, class_: str, anchor: str) -> Mark:
    return Mark("text", {"class": class_, "x": x, "y": y, "text-anchor": anchor}, text)


def matrix(values: Sequence[Numbers], names: Sequence[str], here: int, label: str, axis: str) -> Markup:
    """Draw a square matrix of values between 0 and 1, darker where larger; the name of row `here` is bold.

    Both its axes are named `axis`.
    """
    n, left, top = len(names), 52, 50
    cell = min(60, (WIDTH - left - 10) / n)
    size = n * cell
    upwards = {"class": "label", "text-anchor": "middle", "transform": f"translate(14 {top + size / 2}) rotate(-90)"}
    marks = [_text(left + size / 2, 14, axis, "label", "middle"), Mark("text", upwards, axis)]
    for i, row in enumerate(values):
        middle = top + (i + 0.5) * cell
        class_ = "label here" if i == here else "label"
        marks.append(_text(left - 12, middle + 4, names[i], class_, "end"))
        marks.append(_text(left + (i + 0.5) * cell, top - 10, names[i], class_, "middle"))
        for j, value in enumerate(row):
            x, y = left + j * cell, top + i * cell
            box = {"x": x + 1, "y": y + 1, "width": cell - 2, "height": cell - 2, "rx": 2}
            shade = 0.0 if value is None else min(max(value, 0.0), 1.0)
            tip = f"{names[i]} and {names[j]}: {'unknown' if value is None else f'{value:.4f}'}"
            opacity = f"{0.06 + 0.84 * shade**2:.3f}"
            marks.append(Mark("rect", {"class": "cell", "fill-opacity": opacity, **box}, tip=tip))
            if cell > 26:
                text = "-" if value is None else f"{value:.{2 if cell < 40 else 3}f}"
                ink = "on" if shade > 0.75 else "off"
                marks.append(_text(x + cell / 2, middle + 4, text, f"number {ink}", "middle"))
    return _svg(WIDTH, round(top + n * cell + 6), label, marks)


def _svg(width: float, height: float, label: str, marks: list[Mark]) -> Markup:
    return render("plot.svg.j2", left=0, top=0, width=width, height=height, label=label, marks=marks)
