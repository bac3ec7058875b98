"""How far a live run is, as markdown for its page: numbers of now, and the curve of its losses so far."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from flows.pages.plots import Plot, places, scale_of
from flows.pages.report import STYLE, as_image
from flows.run.events import Event, Judged, RowsCached, RunStarted, StageDone, StepTaken, TaskStarted
from flows.run.live import Meter, Pace
from flows.run.numbers import clock, loss, percent, size

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
        self._speed, self._stages_done = 0.0, 0
        """Tokens per second, as last measured, and the number of stages that are done."""
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
                self._speed = pace.tokens_per_second if pace else self._speed
                if event.stage != self._of_stage[0]:
                    self._before += self._of_stage[1]
                    self._of_stage = event.stage, event.steps
                self._trained.add(self._before + event.step, event.loss)
                if event.validation_loss is not None:
                    self._validated.append((self._before + event.step, event.validation_loss))
            case RowsCached():
                done = f"{size(max(event.n_bytes, event.computed))} of {size(event.of_bytes)}"
                self._doing = f"{self._stage(event.stage)}: caching activations, {done}"
                self._step, self._pace, self._stepped = None, pace, time.monotonic()
            case Judged() if self._task == "validate":  # not inside a stage, whose steps are shown
                done = f"{event.done} of {event.of} {event.what}"
                self._doing = f"{self._stage(event.stage)}: {_DOING['validate']}, {done}"
            case StageDone():
                if (validated := event.summary.validation_loss) is not None:
                    self._validated.append((self._before + self._of_stage[1], validated))
                self._doing, self._step, self._pace = f"{self._stage(event.stage)} is done", None, None
                self._stages_done = event.stage + 1
            case _:
                pass

    def _stage(self, index: int) -> str:
        last = self._n_stages - 1
        return f"Stage {index} (the last{'' if index == last else f' is {last}'})" if index >= 0 else "Corpus"

    def markdown(self, outcome: str = "") -> str:
        """Return the page as of now; `outcome` says how the run ended, if it did, such as 'Failed: no space'."""
        now, after = datetime.now(UTC).strftime("%H:%M:%S"), clock(time.monotonic() - self._began)
        since = time.monotonic() - self._stepped
        stands = f"; the last step was {clock(since)} ago" if self._step and not outcome and since >= _LONG_AGO else ""
        numbers = " \u00b7 ".join(f"{name} **{value}**" for name, value in self._numbers_of_now(outcome).items())
        lines = [f"**{outcome or self._doing}**", ""]
        if outcome and self._n_stages and not self._is_done:
            stood = f"{self._doing[0].lower()}{self._doing[1:]}".replace(": ", ", ", 1)
            lines += [f"Where it stood: {stood}.", ""]
        when = f"{'Ended at' if outcome else 'As of'} {now} UTC, {after} after the start{stands}."
        return "\n".join([*lines, numbers, "", *self._plot(), "", when])

    def line(self, outcome: str = "") -> str:
        """Return the same in a line for the card on the run's own page, which shows some sixty letters of it."""
        if outcome:
            how, _, what = outcome.partition(": ")
            judged = f", validation loss {loss(self._validated[-1][1])}" if self._validated else ""
            return f"{how} after {clock(time.monotonic() - self._began)}{judged}: {what}"
        cells = self._numbers_of_now()
        left = cells.get("left of the run") or cells.get("left of the stage")
        return f"{left} left, {self._standing(cells)}" if left else self._standing(cells)

    def stood(self) -> str:
        """Return where the run stood when it ended early, and how old the last validation is."""
        cells, since = self._numbers_of_now("ended"), 0
        if self._step and self._validated:
            since = self._before + self._step.step - self._validated[-1][0]
        if since:
            cells["last validation loss"] += f" ({since:,} steps before)"
        return self._standing(cells)

    def _standing(self, cells: Mapping[str, str]) -> str:
        step = self._step
        where = f"stage {step.stage} step {step.step:,}/{step.steps:,}" if step else _short(self._doing)
        known = {"loss": cells.get("loss"), "validation": cells.get("last validation loss")}
        speed = [f"{cells['tokens/s']} tokens/s"] if "tokens/s" in cells else []
        share = [f"{cells['trained']} trained"] if "trained" in cells else []
        return ", ".join([where, *(f"{name} {value}" for name, value in known.items() if value), *speed, *share])

    @property
    def _is_done(self) -> bool:
        return self._stages_done == self._n_stages

    def _numbers_of_now(self, outcome: str = "") -> dict[str, str]:
        """Return the numbers of now by their names, without what is not known; after the end nothing is left."""
        step, pace, cells = self._step, self._pace, dict[str, str]()
        if (share := self._meter.run_share) is not None and not self._is_done:
            cells["trained"] = percent(share)
        if step is not None:
            cells["loss"] = loss(step.loss)
        if self._validated:
            cells["last validation loss"] = loss(self._validated[-1][1])
        if self._speed:
            cells["tokens/s"] = f"{self._speed:,.0f}"
        if step is not None:
            cells["learning rate"] = f"{step.learning_rate:.3g}"
        if outcome:
            return cells
        left = self._meter.run_seconds_left
        if pace is not None:
            cells["left of the stage"] = clock(max(0.0, pace.seconds_left - self._waited(left)))
        if left is not None:
            cells["left of the run"] = clock(left)
            cells["done about"] = _time_of_day(left)
        return cells

    def _waited(self, left: float | None) -> float:
        """Return what is taken off the time left since the last event [s]."""
        told = self._pace.run_seconds_left if self._pace else None
        return 0.0 if left is None or told is None else told - left

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


def _short(doing: str) -> str:
    """Return what is done without which stage is the last: 'stage 1 validating'."""
    return re.sub(r"^Stage (\d+) \(the last.*?\):?", r"stage \1", doing)


def _time_of_day(seconds: float) -> str:
    """Return when it is in so many seconds, with the date if that is not today."""
    now = datetime.now(UTC)
    then = now + timedelta(seconds=seconds)
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
