"""What a flow and the ranks it starts hand each other: a job, lines about progress, how each of them ended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import BaseModel

from flows.run.events import Message, StepTaken
from flows.run.stage import Stage
from flows.run.training import Attempt
from stackwise_core.stages.identity import Ref
from storage.artifacts import SCRATCH

_MARK = "\x1e"
"""First character of a line that holds an event (RFC 7464); other lines are for the log."""
_EVENTS = {kind.__name__: kind for kind in (StepTaken, Message)}


class Ending(BaseModel, frozen=True):
    """How a rank ended: with a result, or an error that is explained to the user."""

    attempt: Attempt | None = None
    error: str = ""
    exit_code: int = 0
    on_request: bool = False
    """Whether it stopped because it was asked to."""


class Job(BaseModel, frozen=True):
    """A stage that several processes train."""

    stage: Stage
    build: Ref | None
    folder: Path
    """The work folder."""

    @property
    def scratch(self) -> Path:
        """Where the job, its log and its results are."""
        return self.folder / SCRATCH / "ranks"

    @property
    def log(self) -> Path:
        """What the ranks print."""
        return self.scratch / "ranks.log"

    def ending_of(self, rank: int) -> Path:
        """Return the file in which a rank says how it ended."""
        return self.scratch / f"rank-{rank}.json"


def encode_event(event: StepTaken | Message) -> str:
    """Return an event as one line of output."""
    return f"{_MARK}{json.dumps([type(event).__name__, dataclasses.asdict(event)])}"


def decode_event(line: str) -> StepTaken | Message | None:
    """Return the event in a line of output, or None for a log line."""
    if not line.startswith(_MARK):
        return None
    kind, fields = json.loads(line.removeprefix(_MARK))
    return _EVENTS[kind](**fields)
