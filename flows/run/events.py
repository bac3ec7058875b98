"""The events of a run, and who subscribes to them: the terminal, a log, Prefect's pages."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import FrameType

from flows.run.summary import StageSummary

GO_ON = "run the same command to go on"


@dataclass(frozen=True)
class RunStarted:
    """A run starts or resumes."""

    name: str
    n_stages: int
    folder: str


@dataclass(frozen=True)
class CorpusRead:
    """Bytes of the corpus that are read, or packed, so far."""

    what: str
    """What is done with them, such as 'packed'."""
    n_bytes: int
    of_bytes: int
    """0 if it is not known."""
    seconds: float
    """Since it began."""


@dataclass(frozen=True)
class DataReady:
    """The corpus is packed into sequences."""

    n_train: int
    n_validation: int


@dataclass(frozen=True)
class StagesPriced:
    """What the training of every stage costs, judging it, and filling its store."""

    flops: tuple[float, ...]
    """Of its training; 0 of a stage that is there already."""
    judging: tuple[tuple[int, float], ...] = ()
    """Its steps, and the FLOPs of a validation; 0 of a stage that is there already."""
    every: int = 0
    """Steps between validations inside a stage; 0 if there are none."""
    filling: tuple[float, ...] = ()
    """FLOPs of filling its store; 0 of one that is there already, or that no later stage reads."""


@dataclass(frozen=True)
class StageOpened:
    """A flow run, given by its id, works on a stage; Prefect has a page for it."""

    stage: int
    flow_run: str


@dataclass(frozen=True)
class TaskStarted:
    """A task starts to make its artifact."""

    stage: int
    task: str


@dataclass(frozen=True)
class TaskReused:
    """The artifact of a task existed already."""

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
    learning_rate: float = 0.0
    validation_loss: float | None = None
    """If it was measured after this step."""
    record: Mapping[str, float] = field(default_factory=dict)
    """All that the step measured, as `metrics.jsonl` has it."""


@dataclass(frozen=True)
class RowsCached:
    """Bytes of a store that are on disk so far."""

    stage: int
    n_bytes: int
    of_bytes: int
    computed: int = 0
    """Bytes that are computed so far, if that is said between two shards."""


@dataclass(frozen=True)
class Judged:
    """How far a validation is, of the whole rack or inside a stage's training."""

    stage: int
    done: int
    of: int
    what: str
    """What is counted, such as 'stacks'."""


@dataclass(frozen=True)
class StageDone:
    """A stage is complete."""

    stage: int
    summary: StageSummary


@dataclass(frozen=True)
class Message:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class EndsAtOnce:
    """The process ends when its subscribers have heard this."""


Event = (
    RunStarted
    | CorpusRead
    | DataReady
    | StagesPriced
    | StageOpened
    | TaskStarted
    | TaskReused
    | StepTaken
    | RowsCached
    | Judged
    | StageDone
    | Message
    | EndsAtOnce
)
Subscriber = Callable[[Event], None]

# Module state, because one process runs one run and Prefect calls tasks with plain parameters only.
_subscribers: list[Subscriber] = []
_stop = threading.Event()


def emit(event: Event) -> None:
    """Pass an event to every subscriber."""
    for subscriber in _subscribers:
        subscriber(event)


def emit_waiting(holder: str) -> None:
    """Emit that this process waits for the holder of a lock."""
    emit(Message(f"waiting for {holder}"))


@contextlib.contextmanager
def subscribed(subscriber: Subscriber) -> Generator[None]:
    """Subscribe to all events while the block runs."""
    _subscribers.append(subscriber)
    try:
        yield
    finally:
        _subscribers.remove(subscriber)


def stop_requested() -> bool:
    """Return whether the run was asked to stop at the next safe point."""
    return _stop.is_set()


def request_stop() -> None:
    """Ask the run to stop at the next safe point."""
    _stop.set()


@contextlib.contextmanager
def stopping_on_signals() -> Generator[None]:
    """Turn the first SIGTERM or SIGINT into a request to stop; a second one ends the process at once.

    The outermost block forgets earlier requests. The stages of a run enter it, and every task again, because Prefect
    installs its own SIGTERM handler at the start of every flow, which would raise in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is not _ask_to_stop:
        _stop.clear()
    before = {number: signal.signal(number, _ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(number: int, frame: FrameType | None) -> None:
    if _stop.is_set():
        emit(EndsAtOnce())
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _stop.set()
    emit(Message("stopping at the next safe point; once more to stop at once"))
