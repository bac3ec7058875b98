"""Training a stage by several processes: starts torchrun, relays its progress, and reads how each rank ended."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from flows.run.children import ending_with_us
from flows.run.events import GO_ON, Message, StepTaken, emit, stop_requested
from flows.run.stage import Stage
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.stages.identity import Ref
from stackwise_core.training.hardware import threads_of_rank
from stackwise_core.training.training import Trained
from storage.artifacts import SCRATCH
from storage.files import explain_full_disk, write_text

_POLL_SECONDS = 0.2
_MARK = "\x1e"
"""Begins a line that holds an event (RFC 7464); other lines go to the log."""
_EVENTS = {kind.__name__: kind for kind in (StepTaken, Message)}


class RankError(StackWiseError):
    """A rank failed."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Keep the exit code of the rank's error."""
        self.exit_code = exit_code
        super().__init__(message)


class Ending(BaseModel, frozen=True):
    """How a rank ended: with a result, or with an error for the user."""

    trained: Trained | None = None
    """Without its records, which are in the checkpoint."""
    error: str = ""
    exit_code: int = 0
    on_request: bool = False
    """Whether it was asked to stop."""


class Job(BaseModel, frozen=True):
    """A stage that several processes train."""

    stage: Stage
    build: Ref | None
    folder: Path
    """The work folder."""

    @property
    def scratch(self) -> Path:
        """The folder of this job's files."""
        return self.folder / SCRATCH / "ranks"

    @property
    def log(self) -> Path:
        """What the ranks print."""
        return self.scratch / "ranks.log"

    def ending_of(self, rank: int) -> Path:
        """Return the file in which a rank writes how it ended."""
        return self.scratch / f"rank-{rank}.json"


def encode_event(event: StepTaken | Message) -> str:
    """Return an event as a line."""
    return f"{_MARK}{json.dumps([type(event).__name__, dataclasses.asdict(event)])}"


def _decode_event(line: str) -> StepTaken | Message | None:
    if not line.startswith(_MARK):
        return None
    kind, fields = json.loads(line.removeprefix(_MARK))
    return _EVENTS[kind](**fields)


def train_by_ranks(stage: Stage, build: Ref | None, folder: Path) -> Trained:
    """Train a stage by `hardware.processes` processes, which end when this thread does, even if it is killed.

    The checkpoint of the last step holds the trained tensors. Raises `RankError` if a rank failed, and
    `StageInterruptedError` if a stop was requested; a checkpoint was written if training had begun.
    """
    job = Job(stage=stage, build=build, folder=folder)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.scratch.mkdir(parents=True)
    path = job.scratch / "job.json"
    write_text(path, job.model_dump_json())
    with explain_full_disk(job.log), job.log.open("w") as log, _running(stage, path) as process:
        for line in _lines(process):
            if event := _decode_event(line):
                emit(event)
                if isinstance(event, StepTaken):
                    failpoint("train", event.step)
            else:
                print(line, file=log, flush=True)
    return _result(job)


@contextmanager
def _running(stage: Stage, job: Path) -> Generator[subprocess.Popen[bytes]]:
    """Run torchrun with its ranks, in a new session so that Ctrl-C reaches this process alone, which passes it on."""
    count, threads = stage.config.hardware.processes, threads_of_rank(stage.config.hardware)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={count}", "-m", "flows.run.rank", str(job)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where a custom loss is imported from
        "PYTHONSAFEPATH": "1",  # and from nowhere else: `python -m` would put the working folder first
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    process = subprocess.Popen(
        ending_with_us(command, signal.SIGKILL),  # surviving ranks could write beside those of the next attempt
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what a process and its children print until all have ended; a stop request is passed on once."""
    assert process.stdout is not None
    asked, rest = False, b""
    while True:
        if stop_requested() and not asked:
            process.terminate()
            asked = True
        if not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
            continue
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


def _result(job: Job) -> Trained:
    """Return the result of the first rank, or raise what `train_by_ranks` raises."""
    count = job.stage.config.hardware.processes
    paths = map(job.ending_of, range(count))
    endings = [Ending.model_validate_json(path.read_bytes()) for path in paths if path.exists()]
    for ending in endings:
        if ending.error and not ending.on_request:
            raise RankError(ending.error, ending.exit_code)
        if ending.on_request:
            raise StageInterruptedError(ending.error)
    if len(endings) == count and endings[0].trained is not None:
        return endings[0].trained
    if stop_requested():
        raise StageInterruptedError(f"stopped on request; {GO_ON} from the last checkpoint")
    raise RankError(_how_it_died(job))


def _how_it_died(job: Job) -> str:
    """Describe the death of a rank that left no ending, from torchrun's log."""
    text, count = job.log.read_text(errors="replace"), job.stage.config.hardware.processes
    found = re.findall(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", text, re.M)  # as torchrun prints it
    # Ranks that wait for a killed one fail too; of the others torchrun prints the first to fail last.
    rank, code = next((entry for entry in found if int(entry[1]) < 0), found[-1] if found else ("", ""))
    number = int(code or 0)
    how = f" by {signal.Signals(-number).name}" if number < 0 else ""
    said = re.findall(rf"^\[rank{rank}\]: (\S.*)", text, re.M) if number > 0 else text.splitlines()[-1:]
    who = f"rank {rank} of {count} died{how}" if found else f"its {count} processes ended early"
    last = f": {said[-1]}" if said and number >= 0 else ""
    return f"stage {job.stage.index}: {who}{last}; {GO_ON} from the last checkpoint. The log is {job.log}"
