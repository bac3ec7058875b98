"""How far a run is while it lives: speed and time left, and a file of it that `stackwise status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flows.run.events import Event, Judged, RowsCached, StageDone, StagesPriced, StepTaken, TaskStarted, subscribed
from flows.run.numbers import clock, size
from stackwise_core.strict import parse_object
from storage.runs import Attempt

LIVE = "live.json"
"""In the folder of an attempt while it lives; what a killed process left there is older than the run's holder."""
_SECONDS_BETWEEN_WRITES = 2.0
_MOST_BYTES = 4096


_STEPS_TO_TELL, _SECONDS_TO_TELL = 3, 2.0
"""What is measured over less says too little of the time left."""


class Pace(NamedTuple):
    """How quickly a task goes on, measured since its second step: the first one also warms up."""

    tokens_per_second: float
    """0 of a task that does not train."""
    seconds_left: float
    """Of the training of this stage, or of this task [s]."""
    run_seconds_left: float | None
    """Of all stages, at the speed of this one [s]; None if it is not known."""


class Meter:
    """Measures the pace of a run from its events."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._began, self._first = 0.0, 0
        self._counts: type[Event] | None = None
        """The kind of event that counts how far the task is."""
        self._flops: tuple[float, ...] = ()
        self.run_share: float | None = None
        """How much of the training of the run is done; None if there is nothing to train, or it is not known."""

    def __call__(self, event: Event) -> Pace | None:
        """Take in an event, and return the pace if it can be told from the event."""
        match event:
            case StagesPriced():
                self._flops = event.flops
                self._done(0, 0.0)
            case TaskStarted():
                self._counts = None
            case StageDone():
                self._done(event.stage, 1.0)
            case StepTaken():
                self._done(event.stage, event.step / event.steps)
                if a_step := self._each(StepTaken, event.step, _STEPS_TO_TELL):
                    left = (event.steps - event.step) * a_step
                    return Pace(event.n_tokens / a_step, left, self._left_of_run(event, a_step, left))
            case RowsCached():
                done = max(event.n_bytes, event.computed)
                if a_byte := self._each(RowsCached, done, 1):
                    return Pace(0.0, (event.of_bytes - done) * a_byte, None)
            case _:
                pass
        return None

    def _each(self, counts: type[Event], count: int, least: int) -> float:
        """Return the seconds that one of what is counted takes, or 0 if it is too early to tell."""
        if counts is not self._counts:
            self._counts, self._began, self._first = counts, time.monotonic(), count
        took, since = time.monotonic() - self._began, count - self._first
        return took / since if took >= _SECONDS_TO_TELL and since >= least else 0.0

    def _done(self, stage: int, share: float) -> None:
        if stage < len(self._flops) and (whole := sum(self._flops)):
            self.run_share = (sum(self._flops[:stage]) + share * self._flops[stage]) / whole

    def _left_of_run(self, event: StepTaken, a_step: float, left: float) -> float | None:
        if event.stage >= len(self._flops) or not (here := self._flops[event.stage]):
            return None
        return left + sum(self._flops[event.stage + 1 :]) * a_step * event.steps / here


class LiveFile:
    """Keeps the file of a live attempt up to date, at most every two seconds; what fails here stops no run."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        """Write into the folder of an attempt."""
        self.path, self._meter, self._now, self._last = folder / LIVE, Meter(), now, -float("inf")

    def __call__(self, event: Event) -> None:
        """Write what an event says, if it is time."""
        pace = self._meter(event)
        known = _known(event, pace)
        if known is None or (self._now() - self._last < _SECONDS_BETWEEN_WRITES and not isinstance(event, TaskStarted)):
            return
        self._last = self._now()
        beside = self.path.with_name(f".{LIVE}.{os.getpid()}")
        try:
            beside.write_text(json.dumps({**known, "at": time.time()}))
            beside.replace(self.path)
        except OSError:  # a full disk is said where something is lost by it
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def live_file(attempt: Attempt) -> Generator[None]:
    """Keep the file of an attempt while the block runs; a run that several processes share has that of the last."""
    file = LiveFile(attempt.folder)
    with subscribed(file):
        try:
            yield
        finally:
            file.path.unlink(missing_ok=True)


def _known(event: Event, pace: Pace | None) -> dict[str, Any] | None:
    match event:
        case TaskStarted():
            return {"stage": event.stage, "task": event.task}
        case StepTaken():
            return {"stage": event.stage, "task": "train", **of_step(event, pace)}
        case RowsCached():
            return {"stage": event.stage, "task": "cache", **of_rows(event, pace)}
        case Judged():
            return {"stage": event.stage, "task": "validate", "done": event.done, "of": event.of, "what": event.what}
        case _:
            return None


def of_step(event: StepTaken, pace: Pace | None) -> dict[str, Any]:
    """Return what a step says, as `told` takes it."""
    said: dict[str, Any] = {"step": event.step, "steps": event.steps, "loss": event.loss}
    if event.validation_loss is not None:
        said["validation_loss"] = event.validation_loss
    return said if pace is None else {**said, **pace._asdict()}


def of_rows(event: RowsCached, pace: Pace | None) -> dict[str, Any]:
    """Return what `RowsCached` says, as `told` takes it."""
    said: dict[str, Any] = {"bytes": event.n_bytes, "of_bytes": event.of_bytes}
    if event.computed > event.n_bytes:
        said["computed"] = event.computed
    return said if pace is None else {**said, "seconds_left": pace.seconds_left}


def told(said: Mapping[str, Any]) -> str:
    """Return in words how far a task is, from what a `LiveFile` says of it; '' if it has only begun."""
    if "bytes" in said:
        words = f"cached {size(said['bytes'])} of {size(said['of_bytes'])}"
        words += f", {size(said['computed'])} computed" if "computed" in said else ""
        return f"{words}, {clock(said['seconds_left'])} left" if said.get("seconds_left") else words
    if "what" in said:
        return f"validating, {said['done']} of {said['of']} {said['what']}"
    if "step" not in said:
        return ""
    words = f"step {said['step']}/{said['steps']}, loss {said['loss']:.4f}"
    if "validation_loss" in said:
        words += f", validation loss {said['validation_loss']:.4f}"
    if "seconds_left" not in said:
        return words
    words += f", {clock(said['seconds_left'])} left"
    of_run = said["run_seconds_left"]
    words += "" if of_run is None or of_run == said["seconds_left"] else f", {clock(of_run)} for the run"
    return f"{words}, {said['tokens_per_second']:,.0f} tokens/s"


def progress_line(said: Mapping[str, Any]) -> str:
    """Return where a run is, and how far, from what a `LiveFile` says of it."""
    where = f"stage {said['stage']}, {said['task']}" if said["stage"] >= 0 else str(said["task"])
    return ": ".join(filter(None, [where, told(said)]))


def read_live(folder: Path) -> dict[str, Any] | None:
    """Return what the file of an attempt says; None if there is none, or it is no such file."""
    try:
        with (folder / LIVE).open("rb") as file:
            said = parse_object(file.read(_MOST_BYTES))
        return said if {"stage", "task", "at"} <= said.keys() else None
    except (OSError, ValueError):
        return None
