"""The report of a run, or of several side by side: as tables for the terminal, and as one self-contained page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from flows.pages.page import number, render
from flows.pages.plots import Plot, places, scale_of
from flows.pages.report import STYLE
from flows.pages.run import Document, differences
from flows.run.numbers import clock, loss, parameters, size
from flows.run.terminal import TableOf

MOST_RUNS = 4
"""Side by side: there are as many colours."""
_NEIGHBOURS = 8
"""Points of a training curve that become one where several runs are drawn."""
_UNTIL_LOG = 4
"""Ratio of the largest to the smallest norm from which on their axis is logarithmic."""


def tables(document: Document) -> list[TableOf]:
    """Return the tables of a report; those that would be empty are left out."""
    stages = document["stages"]
    ratios = list(dict.fromkeys(ratio for stage in stages for ratio in stage["by_mask_ratio"]))
    found = [
        TableOf(
            "Stages",
            ("|stage", "how", "|blocks", "|parameters", "|trained", "|train loss", "|validation", "|gain"),
            [
                [
                    str(stage["stage"]),
                    stage["name"] + ("" if stage["state"] == "done" else " (unfinished)"),
                    str(stage["blocks"]),
                    parameters(stage["rack_parameters"]),
                    parameters(stage["trainable_parameters"]),
                    loss(stage["train_loss"]),
                    loss(stage["validation_loss"]),
                    "-" if stage["gain"] is None else f"{stage['gain']:+.4f}",
                ]
                for stage in stages
            ],
        ),
        TableOf(
            "What it cost",
            ("|stage", "|steps", "|tokens", "|TFLOP", "|without cache", "|time", "|tokens/s"),
            [
                [
                    str(stage["stage"]),
                    f"{stage['steps']:,}" + (f" of {stage['steps_planned']:,}" if stage.get("steps_planned") else ""),
                    parameters(stage["tokens"]),
                    number(stage["tflop"]),
                    number(stage["tflop_recomputed"]),
                    "-" if stage["seconds"] is None else clock(stage["seconds"]),
                    "-" if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,}",
                ]
                for stage in stages
            ],
        ),
        TableOf(
            "What it held",
            ("|stage", "|memory, planned", "|measured", "|cache", "|its error", "of what"),
            [
                [
                    str(stage["stage"]),
                    size(stage["memory_bytes_forecast"]) if stage["memory_bytes_forecast"] else "-",
                    "-" if stage["memory_bytes_measured"] is None else size(stage["memory_bytes_measured"]),
                    "-" if stage["cache_bytes"] is None else size(stage["cache_bytes"]),
                    "-" if stage["cache_error"] is None else f"{stage['cache_error']:+.1e}".replace("-", "\u2212"),
                    stage["cache_note"] or "from tokens",
                ]
                for stage in stages
            ],
        ),
        TableOf(
            "Validation loss by share of masked tokens",
            ("|stage", *(f"|{float(ratio):.0%}" for ratio in ratios)),
            [
                [str(stage["stage"]), *(loss(stage["by_mask_ratio"].get(ratio)) for ratio in ratios)]
                for stage in stages
                if stage["by_mask_ratio"]
            ],
        ),
        TableOf(
            "What trained in which stage",
            ("part", *(f"stage {stage['stage']}" for stage in stages), "stored as"),
            [
                [row["part"], *(_TRAINED[what] for what in row["trained"]), _stored(document, row)]
                for row in document["parts"]
            ],
        ),
        TableOf(
            "What the configuration changes",
            ("key", "value", "default"),
            [[key["name"], _value(key["value"]), _value(key["default"])] for key in document["changes"]],
        ),
    ]
    return [table for table in found if table.rows]


_TRAINED = {None: "", "nothing": "frozen", "adapters": "adapters", "everything": "trained"}


def _stored(document: Document, row: Document) -> str:
    """Return the precision of a stack, and the ranks of its adapters."""
    if not row["part"].startswith("stack "):
        return ""
    stack, last = row["part"].removeprefix("stack "), document["stages"][-1]
    ranks = {f"rank {rank}" for rank in last["adapters"].get(stack, {}).values()}
    return ", ".join([last["precision"][stack], *(["LoRA of " + ", ".join(sorted(ranks))] if ranks else [])])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- the page


class _Axis(NamedTuple):
    label: str
    key: str
    """What of a stage is added up along it."""


_STEP, _COMPUTE = _Axis("step of all stages", "steps"), _Axis("FLOPs as executed [TFLOP]", "tflop")


def run_page(document: Document) -> str:
    """Return the report of a run as one HTML page."""
    curves = [
        (
            _drawn(_losses([document], _STEP)),
            "Line: training, mean of a few steps. Dots: validation, after each stage.",
        ),
        (_drawn(_losses([document], _COMPUTE)), "The same against what was computed, the cache's filling included."),
        *_by_ratio(document),
        *_gains(document),
        (_recorded(document, "learning_rate", "learning rate", zero=True), "The schedule, over all stages."),
        (_recorded(document, "gradient_norm", "norm of the gradient"), "Before clipping; mean of a few steps."),
    ]
    return str(
        render("run.html.j2", document=document, curves=[each for each in curves if each[0]], tables=tables(document))
    )


def runs_page(documents: Sequence[Document]) -> str:
    """Return several runs side by side as one HTML page."""
    curves = [
        (_drawn(_losses(documents, _STEP)), "Thin lines: training, smoothed. Dots: validation, after each stage."),
        (_drawn(_losses(documents, _COMPUTE)), "The same against what was computed."),
    ]
    values = {"curves": [each for each in curves if each[0]], "tables": side_by_side(documents)}
    return str(render("runs.html.j2", documents=documents, **values))


def side_by_side(documents: Sequence[Document]) -> list[TableOf]:
    """Return the tables of several runs: what came of each, and the keys in which they differ."""
    columns = ("run", "|stages", "|parameters", "|validation", "|TFLOP", "|tokens", "|time", "|cache")
    rows = [
        [
            document["run"],
            str(len(document["stages"])),
            parameters(document["parameters"]),
            loss(document["validation_loss"]),
            number(document["tflop"]),
            parameters(document["tokens"]),
            clock(document["seconds"]),
            size(document["cache_bytes"]),
        ]
        for document in documents
    ]
    differing = [[each["name"], *map(_value, each["values"])] for each in differences(documents)]
    names = tuple(document["run"] for document in documents)
    found = [TableOf("Runs", columns, rows), TableOf("Where their configurations differ", ("key", *names), differing)]
    return [table for table in found if table.rows]


def _spans(document: Document, axis: _Axis) -> Iterator[tuple[Document, float, float]]:
    """Yield every stage with where it begins and ends along an axis."""
    at = 0.0
    for stage in document["stages"]:
        length = (stage[axis.key] or 0.0) if stage["digest"] else 0.0
        yield stage, at, at + length
        at += length


def _drawn(plot: Plot | None) -> Markup | None:
    return plot and plot.svg()


def loss_image(documents: Sequence[Document]) -> str | None:
    """Return training and validation loss against compute as an SVG file, black on white; None if none is known."""
    plot = _losses(documents, _COMPUTE)
    return plot and plot.image(STYLE + _RUN_STYLE, _MARGIN)


_RUN_STYLE = """
.line.thin { stroke: #9aa1ab; stroke-width: 1; } .dot { fill: #2458c5; }
.run-1 { --own: #b8460b; } .run-2 { --own: #2a8a57; } .run-3 { --own: #8f5bc2; } .run-0 { --own: #2458c5; }
.line[class*="run-"] { stroke: var(--own); } .dot[class*="run-"] { fill: var(--own); }
"""
_MARGIN = 10  # px


def _losses(documents: Sequence[Document], axis: _Axis) -> Plot | None:
    """Return training and validation loss along an axis; None if nothing is known."""
    lines = [list(_spans(document, axis)) for document in documents]
    ends = [end for line in lines for _, _, end in line]
    validated = [value for line in lines for span in line for _, value, _ in _validated(*span)]
    trained = [value for line in lines for stage, _, _ in line for value in _settled(stage)]
    if not max(ends, default=0.0) or not any(value is not None for value in [*validated, *trained]):
        return None
    x = places(0, round(max(ends))) if axis is _STEP else scale_of([0.0, max(ends)], zero=True)
    plot = Plot(x, scale_of([*validated, *trained]), axis.label, "loss [nats per loss position]")
    for which, (document, line) in enumerate(zip(documents, lines, strict=True)):
        style = f"run-{which}" if len(documents) > 1 else ""
        for stage, start, end in line:
            if (curve := stage["curve"]) and len(documents) == 1:  # several would hide each other
                plot.line(_along(curve, start, end), curve["loss"], "line thin")
            elif curve:
                xs, ys = _smoothed(_along(curve, start, end), curve["loss"])
                plot.line(xs, ys, f"line thin {style}")
        judged = [point for span in line for point in _validated(*span)]
        plot.line([at for at, _, _ in judged], [value for _, value, _ in judged], f"line {style}".strip())
        for at, value, where in judged:
            plot.dot(at, value, f"dot judged {style}".strip(), f"{document['run']}, {where}")
    return plot


def _validated(stage: Document, start: float, end: float) -> Iterator[tuple[float, float, str]]:
    """Yield the validation losses of a stage: their places along an axis, the losses, and after which step."""
    where, curve = f"stage {stage['stage']}", stage["curve"]
    if inside := curve.get("validation"):
        places = _along({**curve, **inside}, start, end)
        for at, value, step in zip(places, inside["loss"], inside["steps"], strict=True):
            yield at, value, f"{where}, step {step}"
    if stage["validation_loss"] is not None:
        yield end, stage["validation_loss"], where


def _smoothed(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Return the means of a few neighbouring points each."""
    groups = [[y for y in ys[at : at + _NEIGHBOURS] if y is not None] for at in range(0, len(ys), _NEIGHBOURS)]
    return [*xs[_NEIGHBOURS - 1 :: _NEIGHBOURS], *xs[-1:]][: len(groups)], [
        sum(group) / len(group) if group else None for group in groups
    ]


def _settled(stage: Document) -> list[float | None]:
    """Return the training losses of a stage without its first tenth, which would stretch the axis."""
    losses = stage["curve"].get("loss", [])
    return losses[len(losses) // 10 :]


def _along(curve: Document, start: float, end: float) -> list[float]:
    return [start + (end - start) * step / curve["of"] for step in curve["steps"]]


def _recorded(document: Document, name: str, label: str, *, zero: bool = False) -> Markup | None:
    """Return what was recorded at each step, over all stages; None if nothing was."""
    spans = [span for span in _spans(document, _STEP) if span[0]["curve"]]
    values = [value for stage, _, _ in spans for value in stage["curve"][name] if value is not None]
    if not values:
        return None
    log = not zero and max(values) > _UNTIL_LOG * max(min(values), 1e-12)
    plot = Plot(places(0, round(spans[-1][2])), scale_of(values, log=log, zero=zero), _STEP.label, label)
    for stage, start, end in spans:
        known = [value if value is not None and (value > 0 or not log) else None for value in stage["curve"][name]]
        plot.line(_along(stage["curve"], start, end), known)
    return plot.svg()


def _gains(document: Document) -> Iterator[tuple[Markup, str]]:
    """Yield what each stage took off the validation loss, if that is known of more than one."""
    gains = [(stage["stage"], stage["gain"]) for stage in document["stages"] if stage["gain"] is not None]
    if len(gains) > 1:
        numbers, values = [each[0] for each in gains], [each[1] for each in gains]
        plot = Plot(places(0, numbers[-1]), scale_of([0.0, *values]), "stage", "gain [nats]")
        plot.level(0.0, "")
        plot.line(numbers, values)
        plot.dots(numbers, values, "dot judged", "stage")
        yield plot.svg(), "What each stage took off the validation loss of the one before it."


def _by_ratio(document: Document) -> Iterator[tuple[Markup, str]]:
    """Yield validation loss against the share of masked tokens, a line for each stage, if it was measured."""
    stages = [stage for stage in document["stages"] if stage["by_mask_ratio"]]
    if not stages:
        return
    shares = [100 * float(ratio) for ratio in stages[-1]["by_mask_ratio"]]
    losses = [list(stage["by_mask_ratio"].values()) for stage in stages]
    around = scale_of(itertools.chain.from_iterable(losses))
    plot = Plot(scale_of(shares), around, "masked tokens [%]", "validation loss [nats]")
    for stage, values in zip(stages, losses, strict=True):
        plot.line(shares, values)
        plot.name(shares[-1], values[-1], f"stage {stage['stage']}")
    yield plot.svg(), "Each line is the rack after a stage."


def page_of(documents: Sequence[Document]) -> str:
    """Return the page of one run or of several."""
    return run_page(documents[0]) if len(documents) == 1 else runs_page(documents)
