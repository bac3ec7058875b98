"""Plots as inline SVG. Colours are the page's; a plot is drawn for half a page and is as wide as a phone."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from flows.pages.markup import Child, element
from flows.pages.scales import Scale, tick_text

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44
Numbers = Sequence[float | None]


class Plot:
    """A pair of axes that marks are put on."""

    def __init__(self, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
        """Draw the axes; labels say the unit."""
        self._x, self._y, self.label = x, y, f"{y_label} by {x_label}"
        self.marks: list[Element] = []
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in y.ticks():
            at = self.y(value)
            self.marks.append(element("line", class_="grid", x1=LEFT, x2=right, y1=at, y2=at))
            self._text(LEFT - 8, at + 4, tick_text(value), "tick", "end")
        for value in x.ticks():
            self._text(self.x(value), bottom + 18, tick_text(value), "tick", "middle")
        self.marks.append(element("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom))
        self._text(0, 14, y_label, "label", "start")
        self._text(right, HEIGHT - 6, x_label, "label", "end")

    def x(self, value: float) -> float:
        """Return where a value is from the left [px]."""
        return round(LEFT + self._x(value) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return where a value is from the top [px]."""
        return round(HEIGHT - BOTTOM - self._y(value) * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, xs: Numbers, ys: Numbers, class_: str = "line") -> None:
        """Draw a line through the points that are known."""
        self.marks.append(element("polyline", class_=class_, points=self._points(xs, ys)))

    def band(self, xs: Numbers, lows: Numbers, highs: Numbers) -> None:
        """Fill between two lines."""
        around = self._points([*xs, *reversed(xs)], [*highs, *reversed(lows)])
        self.marks.append(element("polygon", class_="band", points=around))

    def dots(self, xs: Sequence[int], ys: Numbers, class_: str, what: str) -> None:
        """Draw a dot per point; its tooltip names it."""
        for x, y in zip(xs, ys, strict=True):
            if y is not None:
                tip = element("title", f"{what} {x}: {y:.4g}")
                radius = 2 if class_ == "dot" else 4
                self.marks.append(element("circle", tip, class_=class_, cx=self.x(x), cy=self.y(y), r=radius))

    def name(self, x: float, y: float, text: str) -> None:
        """Write beside a point, on the side where there is room."""
        left = self.x(x) > WIDTH - 80
        self._text(self.x(x) + (-8 if left else 8), self.y(y) + 4, text, "note", "end" if left else "start")

    def bars(self, edges: Sequence[float], heights: Sequence[float], floor: float) -> None:
        """Draw a histogram from a floor up; a bar without height is left out."""
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if height > 0:
                top, width = self.y(height), max(self.x(high) - self.x(low) - 0.5, 0.5)
                tip = element("title", f"{low:.4g} to {high:.4g}: {height:,.0f}")
                box = {"x": self.x(low), "y": top, "width": round(width, 1), "height": round(self.y(floor) - top, 1)}
                self.marks.append(element("rect", tip, class_="bar", **box))

    def level(self, y: float, text: str) -> None:
        """Draw a horizontal line at a value and say what it is."""
        at = self.y(y)
        self.marks.append(element("line", class_="bound", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        self._text(WIDTH - RIGHT, at - 5, text, "note", "end")

    def place(self, x: float, text: str) -> None:
        """Draw a vertical line at a value and say what it is."""
        at = self.x(x)
        self.marks.append(element("line", class_="bound", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM))
        right = at > (WIDTH + LEFT) / 2
        self._text(at + (-6 if right else 6), TOP + 12, text, "note", "end" if right else "start")

    def svg(self) -> Element:
        """Return the plot."""
        return _svg(WIDTH, HEIGHT, self.label, *self.marks)

    def _points(self, xs: Numbers, ys: Numbers) -> str:
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in known)

    def _text(self, x: float, y: float, text: str, class_: str, anchor: str) -> None:
        self.marks.append(element("text", text, class_=class_, x=x, y=y, text_anchor=anchor))


def matrix(values: Sequence[Numbers], names: Sequence[str], here: int, label: str) -> Element:
    """Draw a square matrix of values between 0 and 1, darker where larger; the row of `here` is framed."""
    n, left, top = len(names), 36, 30
    cell = min(60, (WIDTH - left - 10) / n)
    marks: list[Element] = []
    for i, row in enumerate(values):
        middle = top + (i + 0.5) * cell
        ends = {"class_": "label here" if i == here else "label", "text_anchor": "middle"}
        marks.append(element("text", names[i], x=left / 2, y=middle + 4, **ends))
        marks.append(element("text", names[i], x=left + (i + 0.5) * cell, y=top - 10, **ends))
        for j, value in enumerate(row):
            box = {"x": left + j * cell + 1, "y": top + i * cell + 1, "width": cell - 2, "height": cell - 2, "rx": 2}
            shade = 0.0 if value is None else min(max(value, 0.0), 1.0)
            tip = element("title", f"{names[i]} and {names[j]}: {'unknown' if value is None else f'{value:.4f}'}")
            marks.append(element("rect", tip, class_="cell", fill_opacity=f"{0.06 + 0.84 * shade**2:.3f}", **box))
            ink = "on" if shade > 0.75 else "off"
            text = "-" if value is None else f"{value:.{2 if cell < 40 else 3}f}"
            at = {"x": left + (j + 0.5) * cell, "y": middle + 4, "text_anchor": "middle"}
            marks.append(element("text", text, class_=f"number {ink}", **at) if cell > 26 else element("g"))
    return _svg(WIDTH, round(top + n * cell + 6), label, *marks)


def _svg(width: float, height: float, label: str, *marks: Child) -> Element:
    return element("svg", *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
