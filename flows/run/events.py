"""What is happening, told as events to whoever listens: a terminal, a log, Prefect's pages."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType

from flows.run.summary import StageSummary


@dataclass(frozen=True)
class RunStarted:
    """A run begins, or goes on."""

    name: str
    n_stages: int
    folder: str


@dataclass(frozen=True)
class DataReady:
    """The packed sequences are there."""

    n_train: int
    n_validation: int


@dataclass(frozen=True)
class StageOpened:
    """A stage is worked on by a flow run, which has a page where a person can watch it."""

    stage: int
    flow_run: str
    """Its id."""


@dataclass(frozen=True)
class TaskStarted:
    """A task does work."""

    stage: int
    task: str


@dataclass(frozen=True)
class TaskReused:
    """What a task would make was there already."""

    stage: int
    task: str


@dataclass(frozen=True)
class StepTaken:
    """One optimizer step, on `n_tokens` tokens."""

    stage: int
    step: int
    steps: int
    loss: float
    n_tokens: int


@dataclass(frozen=True)
class RowsCached:
    """So much of a store is on disk."""

    stage: int
    n_bytes: int
    of_bytes: int


@dataclass(frozen=True)
class StageDone:
    """A stage is over, and this is what it came to."""

    stage: int
    summary: StageSummary


@dataclass(frozen=True)
class Message:
    """Something a person should read."""

    text: str


Event = RunStarted | DataReady | StageOpened | TaskStarted | TaskReused | StepTaken | RowsCached | StageDone | Message
Listener = Callable[[Event], None]

# One process runs one run. Prefect calls tasks with plain parameters, so who listens, and whether to
# stop, is kept here instead of being passed along.
_listeners: list[Listener] = []
_stop = threading.Event()


def tell(event: Event) -> None:
    """Tell everyone who listens."""
    for listener in _listeners:
        listener(event)


@contextlib.contextmanager
def listening(listener: Listener) -> Generator[None]:
    """Let someone listen while the block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def stop_requested() -> bool:
    """Say whether the run was asked to stop at the next safe point."""
    return _stop.is_set()


def request_stop() -> None:
    """Ask the run to stop at the next safe point."""
    _stop.set()


@contextlib.contextmanager
def stopping_on_signals() -> Generator[None]:
    """Turn the first SIGTERM or SIGINT into a request to stop; a second one ends the process at once.

    Entered by every task and not once for the run: Prefect installs a SIGTERM handler of its own at
    the start of every flow, which would raise in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop.clear()

    def ask(number: int, frame: FrameType | None) -> None:
        if _stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _stop.set()
        tell(Message("stopping at the next safe point; once more to stop at once"))

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
