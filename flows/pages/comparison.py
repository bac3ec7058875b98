"""A comparison as tables for the terminal, Markdown and Prefect's pages, and as files beside the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flows.pages.page import in_column, render
from flows.pages.plots import End, Mark, Plot, scale_of
from flows.pages.report import escaped, table_row
from flows.run.numbers import clock, loss, parameters, percent, signed, size
from flows.run.terminal import TableOf, without_empty_columns
from flows.run.verdict import AXES, failures_of, rows_of
from storage.artifacts import Artifacts
from storage.files import write_text
from storage.place import COMPARISONS

Document = dict[str, Any]


def tables(document: Document) -> list[TableOf]:
    """Return the tables of a comparison: the losses, what they cost, and what end-to-end training does for as much.

    Rows, columns and tables in which nothing is known are left out.
    """
    rows = sorted(rows_of(document), key=lambda row: (row["budget"], row["loss"]["mean"] if row["loss"] else math.inf))
    arms = {arm["arm"]: arm for arm in document["arms"]}
    compared = [row for row in rows if row["against"]]
    found = [_losses(document, rows, arms), _costs(rows, arms), _needs(rows), _shares(compared), _gaps(compared)]
    many = len({row["budget"] for row in rows}) > 1
    named = [_named(*each, many=many) for each in found]
    return [without_empty_columns(table) for table in named if table.rows]


_Rows = list[tuple[Document, list[str]]]
"""The cells of a row of the document, without its name."""


def _named(title: str, columns: Sequence[str], rows: _Rows, note: str, *, many: bool) -> TableOf:
    """Return a table with the name of each row and, if there are several, its budget."""
    names = ["arm", *(["|budget"] if many else [])]
    cells = [
        [row["arm"], *([f"{row['budget']:g}"] if many else []), *of_row] for row, of_row in rows if {*of_row} != {"-"}
    ]
    return TableOf(title, [*names, *columns], cells, note)


_Found = tuple[str, Sequence[str], _Rows, str]
_ARMS = (
    "An arm is a way to spend the same FLOPs. configured: the configuration as it is; end-to-end: all of its blocks "
    "trained together, from scratch; flat-1/3: a third of them, from scratch. \u00b1 is half of a 95\u00a0% t-interval "
    "over the seeds; differences are taken seed by seed. \u2191 or \u2193 at a rate: the best of those tried is the "
    "highest or the lowest, so that a better one may lie beyond."
)
_CHARGED = (
    "TFLOP are as executed; recomputed: if every step passed through the frozen stacks again. Tuning: the other "
    "rates that were tried. A stage that two arms share is charged to both. Time: of this machine."
)
_PLANNED = "Memory: the planner's forecast for the largest stage; trained at once: the most parameters."
_INTERPOLATED = (
    "Interpolated between the budgets of end-to-end training, seed by seed, never extrapolated. A share behind < or > "
    "is a bound: its largest budget does not reach that loss, or its smallest already does better. A gap outside its "
    "budgets is left out. --curve gives it more budgets."
)


def explained(found: Sequence[TableOf]) -> list[str]:
    """Return what the columns of some tables mean, each note once."""
    return list(dict.fromkeys(table.note for table in found))


def _losses(document: Document, rows: Sequence[Document], arms: dict[str, Document]) -> _Found:
    bits = ["|bits/byte"] if any("bits_per_byte" in row for row in rows) else []
    cells = [
        (
            row,
            [
                _rate(arms[row["arm"]]),
                _mean(row["loss"]),
                *([loss(row["bits_per_byte"])] if bits else []),
                _mean(row["above_end_to_end"], "+"),
                _seeds(row),
            ],
        )
        for row in rows
    ]
    title = f"Validation loss [{document['unit']}] on {document['judged_on']}"
    return title, ["|rate", "|loss", *bits, "|above end-to-end", "|seeds"], cells, _ARMS


def _costs(rows: Sequence[Document], arms: dict[str, Document]) -> _Found:
    both = in_column([row[key] for key in ("tflop", "tflop_recomputed") for row in rows])  # equal ones look equal
    spent = both[: len(rows)], both[len(rows) :]
    tuning = in_column([arms[row["arm"]]["tuning_tflop"] for row in rows])
    cells = [
        (
            row,
            [
                *tflop,
                parameters(row["tokens"]),
                "-" if row["seconds"] is None else clock(row["seconds"]),
            ],
        )
        for row, *tflop in zip(rows, *spent, tuning, strict=True)
    ]
    return (
        "What it costs, without validation",
        ["|TFLOP", "|recomputed", "|tuning", "|tokens", "|time"],
        cells,
        _CHARGED,
    )


def _needs(rows: Sequence[Document]) -> _Found:
    cells = [
        (
            row,
            [
                _steps(row["steps"]),
                str(row["blocks"]),
                size(row["memory_bytes_forecast"]),
                parameters(row["trained_parameters"]),
            ],
        )
        for row in rows
    ]
    return "What it needs", ["|steps", "|blocks", "|memory", "|trained at once"], cells, _PLANNED


def _shares(rows: Sequence[Document]) -> _Found:
    cells = [(row, [_share(row["against"][axis]) for axis in AXES]) for row in rows]
    title = "What it spends, as a share of what end-to-end training spends for the same loss"
    return title, [f"|{axis}" for axis in AXES.values()], cells, _INTERPOLATED


def _gaps(rows: Sequence[Document]) -> _Found:
    cells = [(row, [_mean(row["against"][axis]["gap"], "+") for axis in _GAPS]) for row in rows]
    title = "How far its loss is above that of end-to-end training for equal ..."
    return title, [f"|{AXES[axis]}" for axis in _GAPS], cells, _INTERPOLATED


_GAPS = ("tflop_recomputed", "tokens", "seconds")
"""Axes of the gaps; that at equal FLOPs is measured, not interpolated."""
_EDGES = {"lowest": " \u2193", "highest": " \u2191"}
"""Marks of rates at the edge of their grid: where a better one may be."""


def _rate(arm: Document) -> str:
    return "-" if arm["rate"] is None else f"{arm['rate']:g}" + (_EDGES.get(arm["edge"] or "", ""))


def _mean(found: Document | None, sign: str = "") -> str:
    """Return a mean and half of its interval."""
    if found is None:
        return "-"
    half = "" if found["low"] is None else f" \u00b1\u00a0{found['high'] - found['mean']:.4f}"
    return signed(found["mean"], f"{sign}.4f") + half


def _steps(steps: Sequence[int]) -> str:
    """Return the steps of the stages: 3 x 20, or 20, 20, 5."""
    same = len(steps) > 1 and len(set(steps)) == 1
    return f"{len(steps)} \u00d7 {steps[0]:,}" if same else ", ".join(f"{each:,}" for each in steps)


def _seeds(row: Document) -> str:
    """Return how many seeds have a loss, and what became of the others."""
    states = [run["state"] for run in row["runs"]]
    others = [f"{states.count(state)} {state}" for state in ("diverged", "failed", "to run") if state in states]
    return ", ".join([str(states.count("done")), *others])


def _share(against: Document) -> str:
    found = against["share"]
    if found is None:
        return against["bound"] or "-"
    half = "" if found["low"] is None else f" \u00b1\u00a0{percent(found['high'] - found['mean'])}"
    return percent(found["mean"]) + half


def markdown(document: Document) -> str:
    """Return the comparison as Markdown."""
    said = [text for text in (document["verdict"], document["loses"]) if text]
    lines, found = [line for text in said for line in (text, "")], tables(document)
    for table in found:
        names = [name.removeprefix("|") for name in table.columns]
        marks = ["--:" if name.startswith("|") else "---" for name in table.columns]
        lines += [f"**{escaped(table.title)}**", "", table_row(names), table_row(marks)]
        lines += [*(table_row([escaped(cell) for cell in row]) for row in table.rows), ""]
    lines += [line for note in (*explained(found), *document["notes"]) for line in (escaped(note), "")]
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------- the page

_CHARTS = {
    "tflop": (
        "FLOPs as executed [TFLOP]",
        "Blue: grows; orange: from scratch. Bars: 95\u00a0% intervals. A line joins the budgets of an arm; a dotted "
        "one leads from the largest to its name.",
    ),
    "tokens": ("tokens read", "Shallow stages and smaller models read more for the same FLOPs."),
    "seconds": ("seconds", "Of this machine, without validation."),
    "memory_bytes_forecast": ("memory [MiB]", "The planner's forecast for the largest stage of a run."),
}
_WIDE = 8
"""Ratio of an axis' ends from which on it is logarithmic."""
_ROOM = 1.15
"""Factor by which an axis goes beyond its first and last value."""


def comparison_page(document: Document) -> str:
    """Return the comparison as one self-contained HTML page."""
    charts = [(_chart(document, axis, *words), caption) for axis, (*words, caption) in _CHARTS.items()]
    values = {"charts": charts, "tables": tables(document), "failures": failures_of(document)}
    return str(render("comparison.html.j2", document=document, **values))


def _chart(document: Document, axis: str, x_label: str) -> Markup:
    """Return the losses of all arms against an axis: a dot for every budget, joined and named once for each arm."""
    rows = [row for row in rows_of(document) if row["loss"] and row[axis]]
    unit = 2.0**20 if axis.startswith("memory") else 1.0
    xs = {id(row): row[axis] / unit for row in rows}
    bounds = [value for row in rows for value in (row["loss"]["low"], row["loss"]["high"], row["loss"]["mean"])]
    least, most = min(xs.values(), default=1.0), max(xs.values(), default=1.0)
    around = [least / _ROOM, most * _ROOM]  # so that what is nearly the same stands together
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    y_label = f"loss [{document['unit']}]"
    plot = Plot(scale_of(around, log=most > _WIDE * least), scale_of(bounds), x_label, y_label, arms)
    kinds = {arm["arm"]: "run-0" if arm["grows"] else "run-1" for arm in document["arms"]}
    named = list[End]()
    for arm in arms:
        of_arm = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["budget"])
        curve = [(xs[id(row)], row["loss"]["mean"]) for row in of_arm]
        plot.line([x for x, _ in curve], [y for _, y in curve], f"line joined {kinds[arm]}")
        named.append((*curve[-1], arm, {"class": f"line thin {kinds[arm]}"}))
    plot.ends(named)  # before the dots, which its lines must not cover
    for row in rows:
        x, found = plot.x(xs[id(row)]), row["loss"]
        if found["low"] is not None:
            ends = {"y1": plot.y(found["high"]), "y2": plot.y(found["low"])}
            plot.marks.append(Mark("line", {"class": f"line thin {kinds[row['arm']]}", "x1": x, "x2": x, **ends}))
        dot = {"class": f"dot {kinds[row['arm']]}", "cx": x, "cy": plot.y(found["mean"]), "r": 4}
        plot.marks.append(Mark("circle", dot, tip=f"{row['arm']}, budget {row['budget']:g}: {_mean(found)}"))
    return plot.svg()


def write_comparison(document: Document, artifacts: Artifacts) -> Path:
    """Write the comparison into the artifacts folder, and return its folder."""
    folder = artifacts.root / COMPARISONS / document["name"]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"comparison.json": json.dumps(document, indent=1), "comparison.md": markdown(document)}
    files["index.html"] = comparison_page(document)
    for name, text in files.items():
        write_text(folder / name, text)
        artifacts.place.share(folder / name)
    return folder
