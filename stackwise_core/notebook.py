"""How things show themselves in a notebook: a small table, a bar while a stage trains, curves by matplotlib.

Nothing here is imported from a notebook's packages unless they are there. Tables have the colours of their page, light
or dark, and escape what they show.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from stackwise_core.errors import StackWiseError, shown

_HEAD = "border-bottom: 1px solid rgba(128, 128, 128, 0.35); font-weight: 600"
_SCROLLS = "overflow-x: auto; padding-right: 16px; mask-image: linear-gradient(to left, transparent, black 16px)"
"""A table that is wider than its page fades at the right edge, until it is scrolled there: no colour to know."""
_SECONDS_BETWEEN = 0.5


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML; columns of numbers, also of those with a unit, are set to the right, None is a dash."""
    rows = [tuple(row) for row in rows]
    sides = [_side(row[at] for row in rows) for at in range(len(columns))]
    head = "".join(map(_cell, ["th"] * len(columns), columns, (f"{side}; {_HEAD}" for side in sides)))
    body = "".join(f"<tr>{''.join(map(_cell, ['td'] * len(row), row, sides))}</tr>" for row in rows)
    caption = f'<caption style="text-align: left; font-weight: 600; color: inherit">{_text(title)}</caption>'
    style = "border-collapse: collapse; width: auto; white-space: nowrap; font-variant-numeric: tabular-nums"
    drawn = f'<table style="{style}">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div style="{_SCROLLS}">{drawn}</div>'


def _cell(tag: str, value: object, style: str) -> str:
    return f'<{tag} style="padding: 2px 10px; {style}">{_text(value)}</{tag}>'


def _side(values: Iterable[object]) -> str:
    """Return how a column and its header are aligned."""
    words = any(isinstance(value, str) and not value[:1].isdigit() for value in values)
    return f"text-align: {'left' if words else 'right'}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    how = ",d" if isinstance(value, int) else ".4f" if isinstance(value, float) else ""
    return escape(shown(format(value, how)))


def bar(title: str, total: int) -> Callable[[int, str], None] | None:
    """Return what shows a number of steps and a text as a bar that moves, in a notebook; None elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:  # a plain interpreter, or IPython in a terminal
        return None
    display = importlib.import_module("IPython.display")
    handle = display.display(display.HTML(_bar(title, 0, total)), display_id=True)
    first, began, last = 0, 0.0, 0.0

    def show(step: int, text: str) -> None:
        nonlocal first, began, last
        now = time.monotonic()
        first, began = (first, began) if first else (step, now)  # the first step of a process is slow
        if step == total or now - last >= _SECONDS_BETWEEN:
            seconds = (now - began) / max(step - first, 1)
            left = f", {seconds * (total - step):,.0f} s left" if first < step < total else ""
            handle.update(display.HTML(_bar(title, step, total, f", {text}{left}")))
            last = now

    return show


def _bar(title: str, step: int, total: int, text: str = "") -> str:
    said = f"{title}: step {step:,} of {total:,}{text}"
    return f'<div><progress value="{step}" max="{total}" style="width: 12em"></progress> {_text(said)}</div>'


def plot_losses(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], points: Sequence[tuple[int, float]], axes: Any = None
) -> Any:
    """Draw training losses by step, a line each, and validation losses as points; return the axes of matplotlib.

    Raises:
        StackWiseError: matplotlib is not installed.
    """
    try:
        axes = axes or importlib.import_module("matplotlib.pyplot").subplots(figsize=(7, 3.5))[1]
    except ImportError:
        raise StackWiseError("plot() needs matplotlib: pip install matplotlib") from None
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, linewidth=1, label=name)
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="0.5", label="validation")
    axes.set(xlabel="step", ylabel="loss [nats]")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes
