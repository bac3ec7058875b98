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
from flows.run.numbers import clock, percent, size
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
    """While steps are taken; 0 of a task that does not train."""
    seconds_left: float
    """Of the training of this stage with the validations inside it, or of this task [s]."""
    run_seconds_left: float | None
    """Of all stages, at the speed of this one [s]; None if it is not known."""
    run_share: float | None = None
    """How much of the training of the run is done; None if it is not known."""


class Meter:
    """Measures the pace of a run from its events."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._counts: type[Event] | None = None
        """The kind of event that counts how far the task is."""
        self._first, self._seconds = 0, 0.0
        """The first count, and what the counts since then have taken, without validations [s]."""
        self._last = 0.0
        """When the last of these events came."""
        self._priced = StagesPriced(())
        self._a_flop, self._a_judged_flop, self._a_filled_flop = 0.0, 0.0, 0.0
        """What a FLOP of training, one of validating and one of filling a store take [s]; 0 if it is not known."""
        self._filling: tuple[int, float] | None = None
        """The stage whose store is filled, and since when."""
        self._judged: float | None = None
        """Since when the task that validates counts what it counts; None in other tasks."""
        self._left: float | None = None
        self._left_at, self._going_on = 0.0, 0.0
        """What is left of the run, when that was known, and how much of it what goes on since then takes [s]."""
        self.run_share: float | None = None
        """How much of the training of the run is done; None if there is nothing to train, or it is not known."""

    def __call__(self, event: Event) -> Pace | None:
        """Take in an event, and return the pace if it can be told from the event."""
        match event:
            case StagesPriced():
                self._priced = event
                self._done(0, 0.0)
            case TaskStarted():
                self._counts = None
                self._filled(event.stage if event.task == "cache" else None)
                self._judged = time.monotonic() if event.task == "validate" else None
                self._know(self._from(event.stage, event.task), self._of_task(event.stage, event.task))
            case StageDone():
                self._done(event.stage, 1.0)
                self._filled()
                self._know(self._from(event.stage + 1))
            case StepTaken():
                self._done(event.stage, event.step / event.steps)
                return self._pace_of(event)
            case RowsCached():
                done = max(event.n_bytes, event.computed)
                self._count(RowsCached, done)
                if a_byte := self._each(done, 1):
                    left = (event.of_bytes - done) * a_byte
                    after = self._from(event.stage, "validate")
                    self._know(None if after is None else left + after, left)
                    return Pace(0.0, left, self._left, self.run_share)
            case Judged() if self._judged is not None:
                self._judge(event, time.monotonic() - self._judged)
            case _:
                pass
        return None

    @property
    def run_seconds_left(self) -> float | None:
        """What is left of the run as of now [s]; None if it is not known.

        What goes on is taken off while it takes no longer than it should: a run that stands ends later.
        """
        if self._left is None:
            return None
        left = self._left - min(time.monotonic() - self._left_at, self._going_on)
        return left if round(left) else None  # what still goes on takes longer than it was known to

    def _know(self, left: float | None, going_on: float = 0.0) -> None:
        self._left, self._left_at, self._going_on = left, time.monotonic(), going_on

    def _count(self, counts: type[Event], count: int, own: float = 0.0) -> float:
        """Take in a count of an event, and return the seconds since the one before; `own` are its own if known."""
        now = time.monotonic()
        if counts is not self._counts:
            self._counts, self._first, self._seconds, self._last = counts, count, 0.0, now
            return 0.0
        since, self._last = now - self._last, now
        self._seconds += min(own, since) if own else since
        return since

    def _each(self, count: int, least: int) -> float:
        """Return the seconds that one of what is counted takes, or 0 if it is too early to tell."""
        since = count - self._first
        return self._seconds / since if self._seconds >= _SECONDS_TO_TELL and since >= least else 0.0

    def _pace_of(self, event: StepTaken) -> Pace | None:
        own = 0.0
        if event.validation_loss is not None:  # its time is not that of a step
            speed = event.record.get("tokens_per_second", 0.0)
            own = event.n_tokens / speed if speed else self._each(event.step - 1, 1)
        since = self._count(StepTaken, event.step, own)
        flops, (_, judging) = self._of(event.stage), self._judging(event.stage)
        if own and since > own and judging:
            self._a_judged_flop = (since - own) / judging
        if not (a_step := self._each(event.step, _STEPS_TO_TELL)):
            return None
        if flops:
            self._a_flop = a_step * event.steps / flops
        left = (event.steps - event.step) * a_step + self._inside(event.stage, event.step) * self._a_judgement(judging)
        after = self._from(event.stage, "cache")
        self._know(None if after is None or not flops else left + after, self._next(event, a_step, judging))
        return Pace(event.n_tokens / a_step, left, self._left, self.run_share)

    def _next(self, event: StepTaken, a_step: float, judging: float) -> float:
        """Return the seconds until the next step has been taken, with the validation after it if there is one."""
        every = self._priced.every
        validates = every and (event.step + 1) % every == 0 and event.step + 1 < event.steps
        return a_step + (self._a_judgement(judging) if validates else 0.0)

    def _from(self, stage: int, task: str = "build") -> float | None:
        """Return what the run takes from a task of a stage on [s]; None if no step has been measured yet."""
        if not self._a_flop or stage < 0:
            return None
        left = 0.0
        for index in range(stage, len(self._priced.flops)):
            steps, judging = self._judging(index)
            if index > stage or task in _BEFORE_TRAINED:
                left += self._of(index) * self._a_flop + self._inside(index, 0, steps) * self._a_judgement(judging)
            if index > stage or task != "validate":
                left += self._of_task(index, "cache")
            left += self._a_judgement(judging)  # at the end of the stage
        return left

    def _of(self, stage: int) -> float:
        """Return the FLOPs of training a stage; 0 if it is there already, or not priced."""
        return self._priced.flops[stage] if 0 <= stage < len(self._priced.flops) else 0.0

    def _judging(self, stage: int) -> tuple[int, float]:
        """Return the steps of a stage and the FLOPs of validating it once; 0 of a stage that is there already."""
        return self._priced.judging[stage] if 0 <= stage < len(self._priced.judging) else (0, 0.0)

    def _inside(self, stage: int, step: int, steps: int | None = None) -> int:
        """Return how many validations there are inside a stage after a step."""
        every, steps = self._priced.every, self._judging(stage)[0] if steps is None else steps
        return max(0, (steps - 1) // every - step // every) if every else 0

    def _a_judgement(self, flops: float) -> float:
        """Return the seconds of a validation; until one is measured, as if a FLOP took as long as in training."""
        return flops * (self._a_judged_flop or self._a_flop)

    def _of_task(self, stage: int, task: str) -> float:
        """Return the seconds of filling the store of a stage, or of its validation; 0 for other tasks."""
        if task == "validate":
            return self._a_judgement(self._judging(stage)[1])
        if task != "cache" or not 0 <= stage < len(self._priced.filling):
            return 0.0
        return self._priced.filling[stage] * (self._a_filled_flop or self._a_flop)

    def _filled(self, begins: int | None = None) -> None:
        """Measure what filling a store has taken, if it was filled until now; that of stage `begins` is filled next."""
        if self._filling is not None:
            stage, since = self._filling
            flops = self._priced.filling[stage] if 0 <= stage < len(self._priced.filling) else 0.0
            self._a_filled_flop = (time.monotonic() - since) / flops if flops else self._a_filled_flop
        self._filling = None if begins is None else (begins, time.monotonic())

    def _judge(self, event: Judged, seconds: float) -> None:
        """Tell what is left by what is judged so far: cached rows first, if there are any, and then stacks."""
        if event.done == event.of:
            self._judged = time.monotonic()
        if seconds >= _SECONDS_TO_TELL:
            left = (event.of - event.done) * seconds / event.done
            left += self._of_task(event.stage, "validate") if event.what != "stacks" else 0.0
            after = self._from(event.stage + 1)
            self._know(None if after is None else left + after, left)

    def _done(self, stage: int, share: float) -> None:
        flops = self._priced.flops
        if stage < len(flops) and (whole := sum(flops)):
            self.run_share = (sum(flops[:stage]) + share * flops[stage]) / whole


_BEFORE_TRAINED = ("build", "trunk", "train", "adopt")
"""Tasks with which, or before which, the training of a stage begins."""


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
    if pace is None:
        return said
    left = {"seconds_left": pace.seconds_left, "run_seconds_left": pace.run_seconds_left, "run_share": pace.run_share}
    return {**said, **left}


def told(said: Mapping[str, Any]) -> str:
    """Return in words how far a task is, from what a `LiveFile` says of it; '' if it has only begun."""
    if "bytes" in said:
        words = f"cached {size(said['bytes'])} of {size(said['of_bytes'])}"
        words += f", {size(said['computed'])} computed" if "computed" in said else ""
        return words + _left(said) if said.get("seconds_left") else words
    if "what" in said:
        return f"validating, {said['done']} of {said['of']} {said['what']}"
    if "step" not in said:
        return ""
    words = f"step {said['step']}/{said['steps']}, loss {said['loss']:.4f}"
    if "validation_loss" in said:
        words += f", validation loss {said['validation_loss']:.4f}"
    if "seconds_left" not in said:
        return words
    return f"{words}{_left(said)}, {said['tokens_per_second']:,.0f} tokens/s"


def _left(said: Mapping[str, Any]) -> str:
    """Return what is left of a task, unless that is nothing, and of the run, if that is known and another time."""
    of_task, of_run, share = clock(said["seconds_left"]), said.get("run_seconds_left"), said.get("run_share")
    left = f", {of_task} left" if round(said["seconds_left"]) else ""
    if of_run is None or clock(of_run) == of_task:
        return left
    return f"{left}, {clock(of_run)} left of the run" + (f" ({percent(share)} trained)" if share is not None else "")


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
