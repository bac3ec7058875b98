"""A comparison as tables for the terminal, Markdown and Prefect's pages, and as files beside the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.pages.report import escaped
from flows.run.numbers import clock, loss, parameters, size
from flows.run.verdict import AXES, rows_of
from storage.artifacts import Artifacts
from storage.files import write_text
from storage.place import COMPARISONS

Document = dict[str, Any]


class TableOf(NamedTuple):
    """A table in text."""

    title: str
    columns: Sequence[str]
    """| before a name aligns the column right."""
    rows: Sequence[Sequence[str]]


def tables(document: Document) -> list[TableOf]:
    """Return the tables of a comparison: the losses, what they cost, and what end-to-end training does for as much."""
    arms = {arm["arm"]: arm for arm in document["arms"]}
    many = len({row["budget"] for row in rows_of(document)}) > 1
    rows = sorted(rows_of(document), key=lambda row: (row["budget"], row["loss"]["mean"] if row["loss"] else math.inf))

    def table(
        title: str, columns: Sequence[str], cells_of: Callable[[Document], list[str]], of: list[Document]
    ) -> TableOf:
        named = [[row["arm"], *([f"{row['budget']:g}"] if many else []), *cells_of(row)] for row in of]
        return TableOf(title, ["arm", *(["|budget"] if many else []), *columns], named)

    bits = ["|bits/byte"] if any("bits_per_byte" in row for row in rows) else []
    compared = [row for row in rows if row["against"]]
    return [
        table(
            f"Validation loss [{document['unit']}] on {document['judged_on']}",
            ["|rate", "|loss", *bits, "|above end-to-end", "|seeds"],
            lambda row: [
                _rate(arms[row["arm"]]),
                _mean(row["loss"]),
                *([loss(row["bits_per_byte"])] if bits else []),
                _mean(row["above_end_to_end"], "+"),
                _seeds(row),
            ],
            rows,
        ),
        table(
            "What it costs, without validation",
            ["|TFLOP", "|recomputed", "|tuning", "|tokens", "|time"],
            lambda row: [
                *(
                    f"{value:.3g}"
                    for value in (row["tflop"], row["tflop_recomputed"], arms[row["arm"]]["tuning_tflop"])
                ),
                parameters(row["tokens"]),
                "-" if row["seconds"] is None else clock(row["seconds"]),
            ],
            rows,
        ),
        table(
            "What it needs",
            ["|steps", "|blocks", "|memory", "|trained at once"],
            lambda row: [
                _steps(row["steps"]),
                str(row["blocks"]),
                size(row["memory_bytes_forecast"]),
                parameters(row["trained_parameters"]),
            ],
            rows,
        ),
        table(
            "What it spends, as a share of what end-to-end training spends for the same loss",
            [f"|{axis}" for axis in AXES.values()],
            lambda row: [_share(row["against"][axis]) for axis in AXES],
            compared,
        ),
        table(
            "How far its loss is above that of end-to-end training for equal ...",
            [f"|{AXES[axis]}" for axis in _GAPS],
            lambda row: [_mean(row["against"][axis]["gap"], "+") for axis in _GAPS],
            compared,
        ),
    ]


_GAPS = ("tflop_recomputed", "tokens", "seconds")
"""Axes of the gaps; that at equal FLOPs is measured, not interpolated."""
EXPLAINED = (
    "\u00b1 is half of a 95 % t-interval over the seeds; differences are taken seed by seed. An arrow at a rate: the "
    "best is at that edge of the grid.",
    "TFLOP are as executed; recomputed: if every step passed the frozen stacks again. Tuning: the other rates that "
    "were tried. A stage that two arms share is charged to both.",
    "Time is of this machine, memory the planner's forecast for the largest stage, trained at once the most "
    "parameters.",
    "What end-to-end training has for as much is interpolated between its budgets, seed by seed; nothing is "
    "extrapolated: --curve gives it more budgets.",
)


_EDGES = {"lowest": " \u2193", "highest": " \u2191"}
"""Marks of rates at the edge of their grid: where a better one may be."""


def _rate(arm: Document) -> str:
    return "-" if arm["rate"] is None else f"{arm['rate']:g}" + (_EDGES.get(arm["edge"] or "", ""))


def _mean(found: Document | None, sign: str = "") -> str:
    """Return a mean and half of its interval."""
    if found is None:
        return "-"
    half = "" if found["low"] is None else f" \u00b1 {found['high'] - found['mean']:.4f}"
    return f"{found['mean']:{sign}.4f}{half}"


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
    half = "" if found["low"] is None else f" \u00b1 {found['high'] - found['mean']:.0%}"
    return f"{found['mean']:.0%}{half}"


def markdown(document: Document) -> str:
    """Return the comparison as Markdown."""
    lines = [document["verdict"], "", document["loses"], ""]
    for table in tables(document):
        names = [name.removeprefix("|") for name in table.columns]
        marks = ["--:" if name.startswith("|") else "---" for name in table.columns]
        lines += [f"**{escaped(table.title)}**", "", _row(names), _row(marks)]
        lines += [*(_row([escaped(cell) for cell in row]) for row in table.rows), ""]
    lines += [line for note in (*EXPLAINED, *document["notes"]) for line in (escaped(note), "")]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_comparison(document: Document, artifacts: Artifacts) -> Path:
    """Write the comparison into the artifacts folder, and return its folder."""
    folder = artifacts.root / COMPARISONS / document["name"]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"comparison.json": json.dumps(document, indent=1), "comparison.md": markdown(document)}
    for name, text in files.items():
        write_text(folder / name, text)
        artifacts.place.share(folder / name)
    return folder
