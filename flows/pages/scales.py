"""Axes: from values to a place between 0 and 1, and where the ticks are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_DEEPEST = 1e-5
"""A log axis ends at so much of its largest value: what is below is rounding, and is drawn on the axis."""


@dataclass(frozen=True)
class Scale:
    """One axis."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Ticks are whole numbers."""

    def __call__(self, value: float) -> float:
        """Return where a value lies, 0 at the low end; what is beyond an end lies on it."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return about five round values."""
        return self._decades() if self.log else self._steps()

    def _steps(self) -> list[float]:
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
        step = max(step, 1.0) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        factors = (1,) if last - first >= 2 else (1, 2, 5)
        every = max(1, (last - first) // 5)
        powers = range(first - 1, last + 1) if len(factors) > 1 else range(first, last + 1, every)
        values = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def places(first: int, last: int) -> Scale:
    """Return an axis of whole numbers, such as channels, from the first to the last."""
    return Scale(first, max(last, first + 1), whole=True)


def scale_of(values: Iterable[float | None], *, log: bool = False, zero: bool = False) -> Scale:
    """Return an axis that holds some values, with a little room; a log axis leaves out what is not above 0.

    Args:
        values: what is to be shown; None is not.
        log: a step is a factor.
        zero: begin at 0.
    """
    known = [value for value in values if value is not None and (value > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    if log:
        low = max(low, high * _DEEPEST)
        return Scale(low / 1.15, high * 1.15, log=True)
    low = 0.0 if zero else low
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Scale(low if zero else low - room, high + room)


def tick_text(value: float) -> str:
    """Return a tick's number, with a true minus: 0.5, 12,000, a millionth as 1e-6."""
    return _plain(value).replace("-", "\u2212")


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
