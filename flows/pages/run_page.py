"""The report of a run, or of several side by side, as one self-contained page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup

from flows.pages.page import render
from flows.pages.plots import Plot, places, running_mean, scale_of
from flows.pages.report import STYLE
from flows.pages.run import CURVES, Document, judged_at, mean
from flows.pages.run_tables import side_by_side, tables
from flows.run.numbers import loss

MOST_RUNS = 4
"""Side by side: there are as many colours."""
_POINTS = 400
"""Most points of a curve over all stages; more would be a band without a shape."""
_MOST_DEPTHS = 4
"""Lines of losses by position: there is no room for the names of more."""
_EACH_LINE = "Each line is the rack after a stage."
_UNTIL_LOG = 4
"""Ratio of the largest to the smallest norm from which on their axis is logarithmic."""


Figure = tuple[Markup, str]
"""A plot and its caption."""


class _Axis(NamedTuple):
    label: str
    key: str
    """What of a stage is added up along it."""


_STEP, _COMPUTE = _Axis("step of all stages", "steps"), _Axis("FLOPs as executed [TFLOP]", "tflop")


def page_of(documents: Sequence[Document]) -> str:
    """Return the page of one run, or of several side by side."""
    return _run_page(documents[0]) if len(documents) == 1 else _runs_page(documents)


def _run_page(document: Document) -> str:
    document = _thinned(document)
    found = [stage["curve"] for stage in document["stages"] if stage["curve"]]
    averaged = any(len(curve["steps"]) < curve["of"] for curve in found)
    each = "the mean of a few steps" if averaged else "each step"
    curves = [
        *_losses([document], f"Grey: training, {each}. Blue: validation."),
        *_gains(document),
        *_by_ratio(document),
        *_by_position(document),
        *_recorded(document, "learning_rate", "learning rate", "The schedule, over all stages.", zero=True),
        *_recorded(document, "gradient_norm", "norm of the gradient", f"Before clipping; {each}."),
        *_stream_norms(document),
    ]
    return str(
        render("run.html.j2", document=document, ratio=judged_at(document), curves=curves, tables=tables(document))
    )


def _thinned(document: Document) -> Document:
    """Return a run whose training curves have fewer points, each the mean of those around it."""
    most = max(1, _POINTS // max(1, len(document["stages"])))
    return {**document, "stages": [{**stage, "curve": _fewer(stage["curve"], most)} for stage in document["stages"]]}


def _fewer(curve: Document, most: int) -> Document:
    n = len(curve.get("steps", []))
    if n <= most:
        return curve
    spans = list(itertools.pairwise(round(at * n / most) for at in range(most + 1)))
    lines = {name: [mean(curve[name][start:end]) for start, end in spans] for name in CURVES}
    return {**curve, "steps": [curve["steps"][end - 1] for _, end in spans], **lines}


def _runs_page(documents: Sequence[Document]) -> str:
    curves = _losses(documents, _KEY_OF_RUNS)
    return str(render("runs.html.j2", documents=documents, curves=curves, tables=side_by_side(documents)))


_KEY_OF_RUNS = "Thin: training, the mean of some steps. Thick, with markers: validation."


def loss_image(documents: Sequence[Document]) -> str | None:
    """Return training and validation loss against compute as an SVG, light or dark like its page; None without any.

    What a page says in the caption is written below the axis.
    """
    thinned = [_thinned(document) for document in documents]
    plot = _loss_plot(thinned, _COMPUTE)
    if plot is None:
        return None
    if len(documents) == 1:  # those of several name the runs
        plot.key([("training", "line thin"), ("validation", "line")])
    return plot.image(STYLE + _RUN_STYLE, [*([_KEY_OF_RUNS] if len(documents) > 1 else []), *_remarks(thinned, plot)])


_RUN_STYLE = """
.line.thin { stroke: #9aa1ab; stroke-width: 1; } .dot { fill: #2458c5; }
.run-1 { --own: #b8460b; } .run-2 { --own: #23774b; } .run-3 { --own: #8451b8; } .run-0 { --own: #2458c5; }
.line[class*="run-"] { stroke: var(--own); } .marker { fill: none; stroke: var(--own); stroke-width: 1.8; }
.line.thin[class*="run-"] { opacity: 0.5; }
@media (prefers-color-scheme: dark) { rect { fill: #14161a; } text { fill: #9aa1ab; } .label, .note { fill: #e5e6e8; }
.grid { stroke: #2c3037; } .axis { stroke: #9aa1ab; } .line { stroke: #82aaff; } .dot { fill: #82aaff; }
.line.thin:not([class*="run-"]) { stroke: #828891; } .run-0 { --own: #82aaff; } .run-1 { --own: #ffa066; }
.run-2 { --own: #5cc98f; } .run-3 { --own: #bd93f0; } }
"""


# ---------------------------------------------------------------- losses


def _losses(documents: Sequence[Document], caption: str) -> list[Figure]:
    """Return the curves of losses by step and by compute."""
    by_step, by_compute = (_loss_plot(documents, axis) for axis in (_STEP, _COMPUTE))
    if by_step is None:
        return []
    costs = [] if by_compute is None else [(by_compute.svg(), "The same against what was computed, caches included.")]
    return [(by_step.svg(), " ".join([caption, *_remarks(documents, by_step)])), *costs]


def _remarks(documents: Sequence[Document], plot: Plot) -> list[str]:
    """Return what has to be known of losses in a plot: which are left out, and which do not compare."""
    most = max(value for document in documents for value in _known(document))
    judged = [stage for document in documents for stage in document["stages"] if stage["validation_loss"] is not None]
    found = [f"Losses above {loss(plot.top)}, up to {loss(most)}, are left out."] if most > plot.top else []
    if len({stage["mask_ratio"] for stage in judged}) > 1:
        found.append("Losses at different shares of masked tokens do not compare.")
    return found


def _spans(document: Document, axis: _Axis) -> Iterator[tuple[Document, float, float]]:
    """Yield every stage with where it begins and ends along an axis."""
    at = 0.0
    for stage in document["stages"]:
        length = (stage[axis.key] or 0.0) if stage["digest"] else 0.0
        yield stage, at, at + length
        at += length


def _loss_plot(documents: Sequence[Document], axis: _Axis) -> Plot | None:
    """Return training and validation loss along an axis; None if nothing is known."""
    lines = [list(_spans(document, axis)) for document in documents]
    ends = [end for line in lines for _, _, end in line]
    known = [value for document in documents for value in _known(document)]
    if not max(ends, default=0.0) or not known:
        return None
    x = places(0, round(max(ends))) if axis is _STEP else scale_of([0.0, max(ends)], zero=True)
    results = [stage["validation_loss"] for document in documents for stage in document["stages"]]
    plot = Plot(x, scale_of([*_most(known), *results]), axis.label, "loss [nats per loss position]")
    for which, (document, line) in enumerate(zip(documents, lines, strict=True)):
        style = f"run-{which}" if len(documents) > 1 else ""
        for stage, start, end in line:
            if (curve := stage["curve"]) and len(documents) == 1:  # several would hide each other
                plot.line(_along(curve, start, end), curve["loss"], "line thin")
            elif curve:
                plot.line(_along(curve, start, end), running_mean(curve["loss"]), f"line thin {style}")
        for judged in _comparable(line):
            plot.line([at for at, _, _ in judged], [value for _, value, _ in judged], f"line {style}".strip())
            for at, value, where in (point for point in judged if point[1] <= plot.top):
                what = f"{document['run']}, {where}"
                if len(documents) > 1:
                    plot.marker(at, value, which, what)
                else:
                    plot.dot(at, value, "dot judged", what)
    if len(documents) > 1:
        plot.key([(document["run"], f"line run-{which}") for which, document in enumerate(documents)], marked=True)
    return plot


def _comparable(line: Sequence[tuple[Document, float, float]]) -> Iterator[list[tuple[float, float, str]]]:
    """Yield the validation losses of stages in a row that were judged at one mask ratio, or at none."""
    judged = [(span[0]["mask_ratio"], list(_validated(*span))) for span in line]
    for _, stages in itertools.groupby((each for each in judged if each[1]), key=lambda each: each[0]):
        yield [point for _, points in stages for point in points]


def _validated(stage: Document, start: float, end: float) -> Iterator[tuple[float, float, str]]:
    """Yield the validation losses of a stage: their places along an axis, the losses, and after which step."""
    where, curve = f"stage {stage['stage']}", stage["curve"]
    if inside := curve.get("validation"):
        places = _along({**curve, **inside}, start, end)
        for at, value, step in zip(places, inside["loss"], inside["steps"], strict=True):
            yield at, value, f"{where}, step {step}"
    if stage["validation_loss"] is not None:
        yield end, stage["validation_loss"], where


def _known(document: Document) -> list[float]:
    """Return all losses of a run that its plot could show."""
    trained = [value for stage in document["stages"] for value in stage["curve"].get("loss", [])]
    judged = [value for span in _spans(document, _STEP) for _, value, _ in _validated(*span)]
    return [value for value in [*trained, *judged] if value is not None]


def _most(losses: Sequence[float]) -> list[float]:
    """Return losses without the few that lie far above nine tenths of them, if those stretch an axis by a half."""
    low, common = min(losses), sorted(losses)[int(len(losses) * 0.9)]
    most = [value for value in losses if value <= low + 1.5 * (common - low)]
    return most if max(losses) - low > 1.5 * (max(most) - low) else list(losses)


def _along(curve: Document, start: float, end: float) -> list[float]:
    return [start + (end - start) * step / curve["of"] for step in curve["steps"]]


def _recorded(document: Document, name: str, label: str, caption: str, *, zero: bool = False) -> list[Figure]:
    """Return what was recorded at each step, over all stages, if anything was."""
    spans = [span for span in _spans(document, _STEP) if span[0]["curve"]]
    values = [value for stage, _, _ in spans for value in stage["curve"][name] if value is not None]
    if not values:
        return []
    log = not zero and max(values) > _UNTIL_LOG * max(min(values), 1e-12)
    plot = Plot(places(0, round(spans[-1][2])), scale_of(values, log=log, zero=zero), _STEP.label, label)
    steps = [step for stage, start, end in spans for step in _along(stage["curve"], start, end)]
    found = [value for stage, _, _ in spans for value in stage["curve"][name]]
    plot.line(steps, [value if value is not None and (value > 0 or not log) else None for value in found])
    return [(plot.svg(), caption)]


# ---------------------------------------------------------------- depths


def _gains(document: Document) -> list[Figure]:
    """Return what each stage took off the validation loss, if that is known of more than one."""
    gains = [(stage["stage"], stage["gain"]) for stage in document["stages"] if stage["gain"] is not None]
    if len(gains) < 2:
        return []
    numbers, values = [each[0] for each in gains], [each[1] for each in gains]
    plot = Plot(places(numbers[0], numbers[-1]), scale_of([0.0, *values]), "stage", "gain [nats]")
    plot.level(0.0)
    plot.line(numbers, values)
    plot.dots(numbers, values, "dot judged", "stage")
    return [(plot.svg(), "What each stage took off the validation loss of the one before it; below 0 it added to it.")]


def _by_ratio(document: Document) -> list[Figure]:
    """Return validation loss against the share of masked tokens, a line for each stage, if it was measured."""
    stages = [stage for stage in document["stages"] if stage["by_mask_ratio"]]
    lines = [(f"stage {stage['stage']}", _as_numbers(stage["by_mask_ratio"])) for stage in stages] or [
        (f"stage {each['stage']}", _as_numbers(each["loss_by_ratio"]))
        for each in document["depths"]
        if each["loss_by_ratio"]
    ]
    return _lines(lines, "masked tokens [%]", "Validation. " + _EACH_LINE, scale=100.0)


def _by_position(document: Document) -> list[Figure]:
    """Return loss against the position in a sequence, a line for each stage, if it was measured."""
    lines = [
        (f"stage {each['stage']}", _as_numbers(each["loss_by_position"]))
        for each in document["depths"]
        if each["loss_by_position"]
    ]
    caption = "Means over positions 1, 2, 3 to 4, 5 to 8 and so on of some withheld sequences. " + _EACH_LINE
    return _lines(lines, "position in the sequence", caption, log=True)


def _as_numbers(found: dict[str, float]) -> list[tuple[float, float]]:
    return [(float(at), value) for at, value in found.items()]


def _lines(
    lines: Sequence[tuple[str, list[tuple[float, float]]]],
    label: str,
    caption: str,
    *,
    scale: float = 1.0,
    log: bool = False,
) -> list[Figure]:
    """Return losses by something, a named line for each of some racks: the first, the last, and some between."""
    if not lines:
        return []
    n = min(len(lines), _MOST_DEPTHS)
    shown = [lines[round(at * (len(lines) - 1) / max(1, n - 1))] for at in range(n)]
    names = [name for name, _ in shown]
    if n < len(lines):
        caption += f" Of {len(lines)} stages, {n} are shown: {', '.join(names).replace('stage ', '')}."
    lines = shown
    points = list(itertools.chain.from_iterable(found for _, found in lines))
    x = replace(scale_of((at * scale for at, _ in points), log=log), high=max(at for at, _ in points) * scale)
    plot = Plot(x, scale_of(value for _, value in points), label, "loss [nats per loss position]", names)
    plot.lines([(name, [at * scale for at, _ in found], [value for _, value in found]) for name, found in lines])
    return [(plot.svg(), caption)]


def _stream_norms(document: Document) -> list[Figure]:
    """Return the norm of the stream below and above every stack of the deepest rack, if it was measured."""
    norms = document["depths"][-1]["stream_norms"] if document["depths"] else []
    if not norms:
        return []
    log = max(norms) > _UNTIL_LOG * max(min(norms), 1e-12)
    plot = Plot(places(0, len(norms) - 1), scale_of(norms, log=log), "stacks below", "norm of the stream")
    plot.line(range(len(norms)), norms)
    plot.dots(range(len(norms)), norms, "dot judged", "stacks below")
    caption = "Hidden states between stacks: the median over the tokens of some withheld sequences; 0 is the embedding."
    return [(plot.svg(), caption)]
