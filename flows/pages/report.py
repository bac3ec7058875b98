"""The report of a run as markdown: a plot of validation losses, the stage table, and the artifacts of each stage."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence

from flows.pages.plots import Plot, places, scale_of
from flows.run.numbers import percent
from flows.run.summary import STAGE_COLUMNS, StageSummary, rise
from stackwise_core.errors import shown

STYLE = """
text { font: 12.5px system-ui, sans-serif; fill: #555b64; } .label, .note { fill: #1d1f23; }
.grid { stroke: #e4e3df; } .axis { stroke: #646a73; } .line { fill: none; stroke: #2458c5; stroke-width: 2; }
.point { fill: #2458c5; } .point[style] { fill: color-mix(in oklch, #2b1a86 var(--along), #e08a1a); }
.ramp { fill: none; stroke: color-mix(in oklch, #2b1a86 var(--along), #e08a1a); }
.ramp { stroke-width: 2; } .ramp.leader { stroke-width: 1; }
"""
"""Fixed colours on white, because an image cannot follow the light or dark theme of its page."""


def report(
    name: str,
    root: str,
    stages: Sequence[StageSummary],
    flow_runs: Mapping[int, str],
    notes: Sequence[str],
    n_stages: int,
) -> str:
    """Return the finished ones of `n_stages` stages as markdown; `flow_runs` holds the id of a stage's flow run."""
    count = f"{len(stages)} of {n_stages} stages {'are done' if len(stages) == n_stages else 'so far'}"
    lines = [f"# {escaped(name)}", "", f"{count}. Artifacts are in {_code(root)}.", ""]
    lines += [line for note in notes for line in (escaped(note[0].upper() + note[1:]) + ".", "")]
    lines += [loss_plot(stages), "", *_table(stages, flow_runs), ""]
    for n, stage in enumerate(stages, 1):
        lines += [f"## Stage {stage.stage}: {escaped(stage.name)}", "", stage.line + ".", ""]
        if worse := rise(stages[:n]):
            lines += [worse[0].upper() + worse[1:] + ".", ""]
        lines += [f"- {kind}: {_code(artifact)} ({stage.states[kind]})" for kind, artifact in stage.artifacts.items()]
        if "activations" not in stage.artifacts:
            lines.append(f"- activations: none, {escaped(stage.cache_note)}")
        lines.append("")
    return "\n".join(lines)


def loss_plot(stages: Sequence[StageSummary]) -> str:
    """Return a plot of validation loss by stage as a markdown image with embedded data.

    If the stages have different mask ratios, their own losses are not comparable: then it has a line for each ratio
    at which all were measured.
    """
    lines = {"": [stage.validation_loss for stage in stages]}
    if ratios := stages[-1].by_mask_ratio:
        lines = {f"{percent(float(at))} masked": [stage.by_mask_ratio.get(at) for stage in stages] for at in ratios}
    numbers = [stage.stage for stage in stages]
    everything = [loss for losses in lines.values() for loss in losses]
    named = list(filter(None, lines))
    plot = Plot(places(0, numbers[-1]), scale_of(everything), "stage", "validation loss [nats]", named)
    plot.lines([(what, numbers, losses) for what, losses in lines.items()], "stage")
    return as_image("Validation loss by stage", plot.image(STYLE))


def as_image(what: str, drawn: str) -> str:
    """Return an SVG as a markdown image with embedded data."""
    return f"![{what}](data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()})"


def _table(stages: Sequence[StageSummary], flow_runs: Mapping[int, str]) -> list[str]:
    """Return the stage table; a stage links to the flow run that added it.

    Relative to the page of an artifact, the links work under any host name and in both versions of Prefect's pages.
    """
    marks = ["--:" if name.startswith("|") else "---" for name in STAGE_COLUMNS]
    lines = [table_row([name.removeprefix("|") for name in STAGE_COLUMNS]), table_row(marks)]
    for stage in stages:
        run = flow_runs.get(stage.stage)
        number, *others = stage.cells
        linked = f"[{number}](../../runs/flow-run/{run})" if run else number
        lines.append(table_row([linked, *map(escaped, others)]))
    return lines


def escaped(text: str) -> str:
    """Return a text as one line of markdown that shows it: no link, no tag, no cell begins in it."""
    return re.sub(r"([\\`*<>&|\[\]])", r"\\\1", shown(text))


def _code(text: str) -> str:
    """Return a text in the type of code; a backtick would end it."""
    return f"`{shown(text).replace('`', chr(39))}`"


def table_row(cells: Iterable[str]) -> str:
    """Return cells as a row of a markdown table."""
    return f"| {' | '.join(cells)} |"
