"""How far a run is while it lives: speed and time left, and a file of it that `stackwise status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flows.run.events import Event, RowsCached, StagesPriced, StepTaken, TaskStarted, subscribed
from flows.run.numbers import clock, size
from stackwise_core.strict import parse_object
from storage.runs import Attempt

LIVE = "live.json"
"""In the folder of an attempt while it lives; what a killed process left there is older than the run's holder."""
_SECONDS_BETWEEN_WRITES = 2.0
_MOST_BYTES = 4096


class Pace(NamedTuple):
    """How quickly a stage trains, measured since its second step: the first one also warms up."""

    tokens_per_second: float
    seconds_left: float
    """Of the training of this stage [s]."""
    run_seconds_left: float | None
    """Of all stages, at the speed of this one [s]; None if it is not known."""


class Meter:
    """Measures the pace of a run from its events."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._began, self._first = 0.0, 0
        self._stage = -1
        self._flops: tuple[float, ...] = ()

    def __call__(self, event: Event) -> Pace | None:
        """Take in an event, and return the pace if the event is a step from which it can be told."""
        match event:
            case StagesPriced():
                self._flops = event.flops
            case TaskStarted():
                self._stage = -1
            case StepTaken() if event.stage != self._stage:
                self._stage, self._began, self._first = event.stage, time.monotonic(), event.step
            case StepTaken():
                return self._pace(event)
            case _:
                pass
        return None

    def _pace(self, event: StepTaken) -> Pace:
        a_step = max(time.monotonic() - self._began, 1e-9) / (event.step - self._first)
        left = (event.steps - event.step) * a_step
        return Pace(event.n_tokens / a_step, left, self._left_of_run(event, a_step, left))

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
            return {"stage": event.stage, "task": "cache", "bytes": event.n_bytes, "of_bytes": event.of_bytes}
        case _:
            return None


def of_step(event: StepTaken, pace: Pace | None) -> dict[str, Any]:
    """Return what a step says, as `told` takes it."""
    said: dict[str, Any] = {"step": event.step, "steps": event.steps, "loss": event.loss}
    if event.validation_loss is not None:
        said["validation_loss"] = event.validation_loss
    return said if pace is None else {**said, **pace._asdict()}


def told(said: Mapping[str, Any]) -> str:
    """Return in words how far a task is, from what a `LiveFile` says of it; '' if it has only begun."""
    if "bytes" in said:
        return f"cached {size(said['bytes'])} of {size(said['of_bytes'])}"
    if "step" not in said:
        return ""
    words = f"step {said['step']}/{said['steps']}, loss {said['loss']:.4f}"
    if "validation_loss" in said:
        words += f", validation loss {said['validation_loss']:.4f}"
    if "seconds_left" not in said:
        return words
    words = f"{words}, {said['tokens_per_second']:,.0f} tokens/s, {clock(said['seconds_left'])} left"
    of_run = said["run_seconds_left"]
    return words if of_run is None or of_run == said["seconds_left"] else f"{words}, {clock(of_run)} for the run"


def read_live(folder: Path) -> dict[str, Any] | None:
    """Return what the file of an attempt says; None if there is none, or it is no such file."""
    try:
        with (folder / LIVE).open("rb") as file:
            said = parse_object(file.read(_MOST_BYTES))
        return said if {"stage", "task", "at"} <= said.keys() else None
    except (OSError, ValueError):
        return None
