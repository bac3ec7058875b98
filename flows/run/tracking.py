"""Sends the steps of a run to its trackers, from threads of their own; and those of a finished run, later."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flows.run.events import Event, Message, StageDone, StepTaken, emit, subscribed
from flows.run.summary import StageSummary, summarise
from flows.run.trackers import Tracker, tracker_faults, tracker_of
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.keys import keys_of
from stackwise_core.config.schema import TrackerName
from stackwise_core.errors import ConfigError, StackWiseError, StageInterruptedError
from stackwise_core.stages.plan import RunPlan
from storage.artifacts import Artifacts
from storage.midstage import METRICS, read_metrics
from storage.runs import Attempt, find_run

_MOST_WAITING = 100_000
"""Values of steps that may wait for a tracker: one that is slower does not take the memory of training."""
_SECONDS_AT_THE_END = 60.0
_MEASURED = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes")


class TrackingError(StackWiseError):
    """A tracker failed when a finished run was sent to it."""


class Sender:
    """Tells one tracker in a thread of its own. The first thing that fails ends it, and is said once."""

    def __init__(self, name: str, tracker: Tracker, start: Callable[[Tracker], int]) -> None:
        """Start the tracker in its thread."""
        self.name, self._tracker, self._last = name, tracker, 0
        self._calls = SimpleQueue[Callable[[], object] | None]()
        self._failed = threading.Event()
        self._failure, self._said = "", False
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[Tracker], int]) -> None:
        try:
            self._last = start(self._tracker)
            for call in iter(self._calls.get, None):
                call()
        except BaseException as error:  # whatever a stranger's package raises, SystemExit too
            self._fail(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    def _fail(self, why: str) -> None:
        self._failure = why
        self._failed.set()

    def log(self, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Have the values of a step sent, unless the run has gone beyond it already."""
        if self._failed.is_set():
            return
        if self._calls.qsize() > _MOST_WAITING:
            self._fail(f"it is {_MOST_WAITING:,} steps behind")
            return
        self._calls.put(lambda: step < self._last or self._tracker.log(metrics, step, at))

    def artifact(self, path: Path) -> None:
        """Have a file sent."""
        self._calls.put(lambda: self._tracker.artifact(path))

    def finish(self, outcome: str, until: float) -> None:
        """End the tracker, and wait for it until a moment of the monotonic clock."""
        self._calls.put(lambda: self._tracker.finish(outcome))
        self._calls.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not end within {_SECONDS_AT_THE_END:.0f} s")

    def complaint(self) -> str:
        """Return what failed, once."""
        if self._said or not self._failed.is_set():
            return ""
        self._said = True
        later = f"later: stackwise track RUN --to {self.name}"
        return f"{self.name} gets no more curves of this run ({self._failure}); training goes on; {later}"


class Tracking:
    """Passes on the events of a run."""

    def __init__(self, senders: Sequence[Sender], before: Sequence[int]) -> None:
        """Take the steps before each stage."""
        self._senders, self._before, self._at = senders, before, 0.0

    def __call__(self, event: Event) -> None:
        """Pass on what an event measured."""
        match event:
            case StepTaken():
                self._at = event.record.get("time", 0.0)
                self._log(of_step(event.stage, event.record), self._before[event.stage] + event.step)
            case StageDone():  # with the time of its last step, as when it is sent afterwards
                self._log(of_end(event.summary), self._before[event.stage] + event.summary.steps)
            case _:
                return
        self.complain()

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for sender in self._senders if metrics else ():
            sender.log(metrics, step, self._at or time.time())

    def complain(self) -> None:
        """Say once of each tracker that it failed."""
        for line in filter(None, (sender.complaint() for sender in self._senders)):
            emit(Message(line))


@contextlib.contextmanager
def tracked(config: StackWiseConfig, plan: RunPlan, attempt: Attempt, artifacts: Artifacts) -> Generator[None]:
    """Send what a run measures to the trackers of its configuration while the block runs."""
    if not config.tracking.to:
        yield
        return
    start = _starting(config, plan)
    senders = [
        Sender(name, tracker_of(name, folder_of(artifacts), config.tracking.project), start)
        for name in config.tracking.to
    ]
    tracking, outcome = Tracking(senders, steps_before(plan)), "failed"
    for sender in senders:
        sender.artifact(attempt.folder / "config.yaml")
    try:
        with subscribed(tracking):
            yield
        outcome = "done"
    except (StageInterruptedError, KeyboardInterrupt):
        outcome = "stopped"
        raise
    finally:
        until = time.monotonic() + _SECONDS_AT_THE_END
        for sender in senders:
            sender.finish(outcome, until)
        tracking.complain()


def replay(artifacts: Artifacts, name: str, to: TrackerName, project: str) -> str:
    """Send the sealed stages of a run to a tracker, and return what was sent and how to look at it.

    Raises:
        ConfigError: there is no such run, or the package is missing.
        TrackingError: what the tracker raised.
    """
    if faults := tracker_faults([to], "--to"):
        raise ConfigError(faults)
    attempt = find_run(artifacts, name)
    plan, n_sent = attempt.plan, 0
    tracker, before = tracker_of(to, folder_of(artifacts), project), steps_before(plan)
    stages = list(zip(plan.stages, summarise(artifacts, plan), strict=True))
    try:
        last = _starting(attempt.config, plan)(tracker)
        for stage, summary in stages:
            at, manifest = attempt_time(attempt), artifacts.sealed(stage.ref("stack"))
            if manifest is None or METRICS not in manifest.files:
                continue
            for record in read_metrics(artifacts.checked(manifest.ref) / METRICS):
                step, at = before[stage.index] + int(record["step"]) + 1, record.get("time", at)
                if step >= last:
                    tracker.log(of_step(stage.index, record), step, at)
                    n_sent += 1
            if (end := of_end(summary)) and before[stage.index] + summary.steps >= last:
                tracker.log(end, before[stage.index] + summary.steps, at)
        tracker.finish("done")
    except StackWiseError:
        raise
    except Exception as error:  # a stranger's package
        said = str(error).strip().partition("\n")[0]
        raise TrackingError(f"{to} failed ({type(error).__name__}: {said}); what it has of the run stays") from error
    had = f", which had steps up to {last:,}" if last else ""
    return f"{name}: {n_sent:,} steps sent to {to}{had}; look: {tracker.look}"


def attempt_time(attempt: Attempt) -> float:
    """Return when an attempt began [s since 1970], for steps of before their time was recorded."""
    from datetime import datetime

    return datetime.fromisoformat(attempt.start["started"]).timestamp()


def _starting(config: StackWiseConfig, plan: RunPlan) -> Callable[[Tracker], int]:
    values = {key.name: key.value for key in keys_of(config)}
    ids = {"run": run_id(config.run.name, plan)}
    ids |= {f"stage-{stage.index}": stage.ref("stack").name for stage in plan.stages}
    return lambda tracker: tracker.start(config.run.name, values, ids)


def run_id(name: str, plan: RunPlan) -> str:
    """Return by what a tracker knows a run: its name, and the first stage that it trains, which growing on keeps."""
    first = next((stage for stage in plan.stages if not stage.spec.adopted), plan.stages[0])
    return f"{name}-{hashlib.sha256(first.stack.sha256.encode()).hexdigest()[:8]}"


def steps_before(plan: RunPlan) -> list[int]:
    """Return how many steps were planned before each stage."""
    steps = (0 if stage.spec.adopted else stage.spec.optim.steps for stage in plan.stages)
    return [0, *itertools.accumulate(steps)][: len(plan.stages)]


def folder_of(artifacts: Artifacts) -> Path:
    """Return the folder of this machine for what trackers keep."""
    return artifacts.root / "tracking"


def of_step(stage: int, record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracker is told of a step."""
    found = dict(_numbers(("train", name, record.get(name)) for name in _MEASURED))
    found |= dict(_numbers([("validation", "loss", record.get("validation_loss"))]))
    return {**found, "stage": stage}


def of_end(summary: StageSummary) -> dict[str, float]:
    """Return what a tracker is told of a stage that is over; nothing if it was adopted without being judged."""
    return dict(_numbers([("validation", "loss", summary.validation_loss), ("cooled", "loss", summary.cooled_loss)]))


def _numbers(named: Any) -> Iterator[tuple[str, float]]:
    for group, name, value in named:
        if isinstance(value, (int, float)):
            yield f"{group}/{name}", value
