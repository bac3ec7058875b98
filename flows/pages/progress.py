"""How far a live run is, as markdown for its page: numbers of now, and the curve of its losses so far."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from flows.pages.plots import Plot, places, scale_of
from flows.pages.report import STYLE, as_image
from flows.run.events import Event, Judged, RowsCached, RunStarted, StageDone, StepTaken, TaskStarted
from flows.run.live import Meter, Pace
from flows.run.numbers import clock, loss, size

_MOST_POINTS = 300
_FORGOTTEN = 0.1
"""Share of the points at the beginning that do not stretch the axis of losses: they are far above the others."""
_LONG_AGO = 15
"""Since the last step [s], which is then said: what is known of the time left is as old."""


class Curve:
    """The means of spans of steps, of which there are never more than a few hundred: full spans grow twice as long."""

    def __init__(self) -> None:
        """Begin without a step."""
        self.points: list[tuple[int, float]] = []
        """The last step of each span, and its mean."""
        self._span, self._sum, self._count = 1, 0.0, 0

    def add(self, step: int, value: float) -> None:
        """Add the value of a step; steps rise."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._span:
            return
        self.points.append((step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self.points) >= _MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self.points = [(after[0], (before[1] + after[1]) / 2) for before, after in pairs]
            self._span *= 2


class RunProgress:
    """Collects the events of a run, and writes them up."""

    def __init__(self) -> None:
        """Begin before the first event."""
        self._meter, self._began = Meter(), time.monotonic()
        self._n_stages = 0
        self._before, self._of_stage = 0, (-1, 0)
        """Steps of earlier stages, and the stage that trains with its steps."""
        self._step: StepTaken | None = None
        self._stepped = self._began
        self._pace: Pace | None = None
        self._doing, self._task = "preparing data", ""
        self._trained, self._validated = Curve(), list[tuple[int, float]]()

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        pace = self._meter(event)
        match event:
            case RunStarted():
                self._n_stages = event.n_stages
            case TaskStarted():
                self._task = event.task
                self._doing = f"{self._stage(event.stage)}: {_DOING.get(event.task, event.task)}"
                self._step = self._pace = None
            case StepTaken():
                self._doing = f"{self._stage(event.stage)}: step {event.step:,} of {event.steps:,}"
                self._step, self._pace, self._stepped = event, pace, time.monotonic()
                if event.stage != self._of_stage[0]:
                    self._before += self._of_stage[1]
                    self._of_stage = event.stage, event.steps
                self._trained.add(self._before + event.step, event.loss)
                if event.validation_loss is not None:
                    self._validated.append((self._before + event.step, event.validation_loss))
            case RowsCached():
                done = f"{size(event.n_bytes)} of {size(event.of_bytes)}"
                self._doing, self._step = f"{self._stage(event.stage)}: caching activations, {done}", None
            case Judged() if self._task == "validate":  # not inside a stage, whose steps are shown
                done = f"{event.done} of {event.of} {event.what}"
                self._doing = f"{self._stage(event.stage)}: {_DOING['validate']}, {done}"
            case StageDone() if event.summary.validation_loss is not None:
                self._validated.append((self._before + self._of_stage[1], event.summary.validation_loss))
                self._doing, self._step = f"{self._stage(event.stage)} is done", None
            case _:
                pass

    def _stage(self, index: int) -> str:
        last = self._n_stages - 1
        return f"Stage {index} (the last{'' if index == last else f' is {last}'})" if index >= 0 else "Corpus"

    def markdown(self, outcome: str = "") -> str:
        """Return the page as of now; `outcome` says how the run ended, if it did."""
        now = datetime.now(UTC).strftime("%H:%M:%S")
        lines = [f"**{outcome or self._doing}**", "", self._numbers(outcome), "", *self._plot(), ""]
        since = time.monotonic() - self._stepped
        stands = f"; the last step was {clock(since)} ago" if self._step and not outcome and since >= _LONG_AGO else ""
        after = clock(time.monotonic() - self._began)
        return "\n".join([*lines, f"As of {now} UTC, {after} after the start{stands}."])

    def line(self, outcome: str = "") -> str:
        """Return the same in a line for the card on the run's own page, which shows some sixty letters of it."""
        if outcome:
            judged = f", validation {loss(self._validated[-1][1])}" if self._validated else ""
            return outcome.rstrip(".") + judged
        cells = self._numbers_of_now()
        left = cells.pop("left of the run", None) or cells.pop("left of the stage", None)
        validated, step = cells.pop("last validation loss", None), self._step
        where = f"stage {step.stage} step {step.step:,}/{step.steps:,}" if step else self._doing
        first = {"loss": cells.pop("loss", None), "validation": validated, **cells}
        known = [f"{name} {value}" for name, value in first.items() if value]
        return ", ".join([*([f"{left} left"] if left else []), where, *known])

    def _numbers(self, outcome: str) -> str:
        """Return the numbers of now as one paragraph, which a narrow page wraps; after the end only what stays true."""
        cells = self._numbers_of_now()
        if outcome:
            cells = {name: cells[name] for name in cells if name == "last validation loss"}
        return " \u00b7 ".join(f"{name} **{value}**" for name, value in cells.items())

    def _numbers_of_now(self) -> dict[str, str]:
        """Return the numbers of now by their names, without what is not known."""
        step, pace = self._step, self._pace
        cells: dict[str, str] = {}
        if step is not None:
            cells["loss"] = loss(step.loss)
            cells["learning rate"] = f"{step.learning_rate:.3g}"
        if pace is not None:
            cells["tokens/s"] = f"{pace.tokens_per_second:,.0f}"
            cells["left of the stage"] = clock(pace.seconds_left)
            if pace.run_seconds_left is not None:
                cells["left of the run"] = clock(pace.run_seconds_left)
                cells["done about"] = _time_of_day(self._stepped + pace.run_seconds_left)
        if self._validated:
            cells["last validation loss"] = loss(self._validated[-1][1])
        return cells

    def _plot(self) -> list[str]:
        points = self._trained.points
        if len(points) < 2:
            return []
        settled = [value for _, value in points[int(len(points) * _FORGOTTEN) :]]
        shown = [*settled, *(value for _, value in self._validated)]
        plot = Plot(places(0, points[-1][0]), scale_of(shown), "step of all stages", "loss [nats per loss position]")
        plot.curve([step for step, _ in points], [value for _, value in points])
        for step, value in self._validated:
            plot.dot(step, value, "validated", "validation")
        drawn = as_image("Training loss (line) and validation loss (dots)", plot.image(STYLE + _DOTS))
        above = [value for _, value in points if value > plot.top]
        beyond = f" The line begins above the axis, at {loss(above[0])}." if above else ""
        return [drawn, "", f"Line: training loss, of many points their running mean. Dots: validation loss.{beyond}"]


def _time_of_day(moment: float) -> str:
    """Return when a moment of the monotonic clock is, with the date if it is not today."""
    now = datetime.now(UTC)
    then = now + timedelta(seconds=moment - time.monotonic())
    return f"{then:%H:%M} UTC" if then.date() == now.date() else f"{then:%b %d, %H:%M} UTC"


_DOING = {
    "build": "building the new stack",
    "trunk": "configuring the trunk",
    "train": "training begins",
    "adopt": "taking a stack from another rack",
    "cool": "cooling down",
    "cache": "caching activations",
    "validate": "validating",
}
_DOTS = ".validated { fill: #b8460b; } .line.thin { stroke-width: 1; opacity: 0.35; }"
