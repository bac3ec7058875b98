"""The report of a run as markdown: a plot of validation loss by stage, a table, and what each stage made."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from flows.pages.plots import Plot
from flows.pages.scales import places, scale_of
from flows.run.numbers import clock, parameters, size, stage_line
from flows.run.summary import StageSummary

_STYLE = """
text { font: 12.5px system-ui, sans-serif; fill: #555b64; } .label, .note { fill: #1d1f23; }
.grid { stroke: #e4e3df; } .axis { stroke: #646a73; } .line { fill: none; stroke: #2458c5; stroke-width: 2; }
.point { fill: #2458c5; }
"""
"""Of its own, on white: an image knows nothing of the page, light or dark, that it is shown on."""

_MARGIN = 10
"""Of the paper around the plot [px]."""


def report(
    name: str,
    root: str,
    stages: Sequence[StageSummary],
    flow_runs: Mapping[int, str],
    notes: Sequence[str],
) -> str:
    """Return the run as markdown.

    Args:
        name: of the run.
        root: where its artifacts are.
        stages: what is done.
        flow_runs: id of the flow run that added a stage, where there is one.
        notes: on the configuration.
    """
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    lines = [f"# {name}", "", f"{count} so far. Artifacts are in `{root}`.", ""]
    lines += [line for note in notes for line in (note[0].upper() + note[1:] + ".", "")]
    lines += [loss_plot(stages), "", *_table(stages, flow_runs), ""]
    for stage in stages:
        lines += [f"## Stage {stage.stage}: {stage.name}", "", stage_line(stage) + ".", ""]
        lines += [f"- {kind}: `{artifact}` ({stage.states[kind]})" for kind, artifact in stage.artifacts.items()]
        if "activations" not in stage.artifacts:
            lines.append(f"- activations: none, {stage.cache_note}")
        lines.append("")
    return "\n".join(lines)


def loss_plot(stages: Sequence[StageSummary]) -> str:
    """Return a plot of validation loss by stage as a markdown image that needs no other file.

    Where stages differ in their mask ratio their own losses do not compare: then a line is drawn for each ratio
    that all of them were judged at.
    """
    lines = _lines(stages)
    numbers = [stage.stage for stage in stages]
    everything = [loss for losses in lines.values() for loss in losses]
    plot = Plot(places(0, numbers[-1]), scale_of(everything), "stage", "validation loss [nats]")
    for what, losses in lines.items():
        plot.line(numbers, losses)
        plot.dots(numbers, losses, "point", "stage")
        if what and losses[-1] is not None:
            plot.name(numbers[-1], losses[-1], what)
    drawn = plot.image(_STYLE, _MARGIN).encode()
    return f"![Validation loss by stage](data:image/svg+xml;base64,{base64.b64encode(drawn).decode()})"


def _lines(stages: Sequence[StageSummary]) -> dict[str, list[float | None]]:
    """Return the losses to draw, by the name that is written beside their line."""
    ratios = stages[-1].by_mask_ratio
    if not ratios:
        return {"": [stage.validation_loss for stage in stages]}
    return {f"{float(ratio):.0%} masked": [stage.by_mask_ratio.get(ratio) for stage in stages] for ratio in ratios}


def _table(stages: Sequence[StageSummary], flow_runs: Mapping[int, str]) -> list[str]:
    """Return a table that fits the page beside Prefect's menus; a stage links to the flow run that added it.

    From an artifact's page: so a link stays in the version of the pages that is read, under the name that the reader's
    machine knows the server by.
    """
    lines = ["| stage | how | parameters | loss | val. loss | time | cache |", "|--:|---|--:|--:|--:|--:|--:|"]
    for stage in stages:
        run = flow_runs.get(stage.stage)
        number = f"[{stage.stage}](../../runs/flow-run/{run})" if run else str(stage.stage)
        cells = [
            number,
            stage.name,
            parameters(stage.rack_parameters),
            *("-" if loss is None else f"{loss:.4f}" for loss in (stage.train_loss, stage.validation_loss)),
            clock(stage.seconds or 0.0),
            size(stage.cache_bytes) if stage.cache_bytes is not None else "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
