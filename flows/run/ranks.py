"""Training a stage by several processes: starts torchrun, relays its progress, and reads how each rank ended."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from flows.run.children import ending_with_us
from flows.run.devices import SHARED, address_of
from flows.run.events import GO_ON, Message, StepTaken, emit, stop_requested
from flows.run.say import complain, say
from flows.run.stage import Stage
from stackwise_core.errors import ConfigError, Fault, StackWiseError, StageInterruptedError, size
from stackwise_core.failpoints import failpoint
from stackwise_core.files import recover_folder
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.memory import memory
from stackwise_core.strict import read_bounded
from stackwise_core.training.hardware import threads_of_rank
from stackwise_core.training.training import Trained
from storage.artifacts import Artifacts
from storage.files import explain_full_disk, write_text
from storage.midstage import RANKS, STATE_FOLDER

FIRST_NODE = "STACKWISE_FIRST_NODE"
"""Environment variable of the ranks on the machine of the run."""
_POLL_SECONDS, _LOOK_SECONDS = 0.2, 1.0
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
    token: str = ""
    """Of this attempt: nodes that join another one do not meet its ranks."""

    @property
    def scratch(self) -> Path:
        """The folder of this job's files."""
        return self.folder / RANKS

    @property
    def path(self) -> Path:
        """The file of this job, which is there as long as it is trained; that of the next attempt has another name."""
        return self.scratch / f"job-{self.token}.json"

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
    """Train a stage by several processes, which end when this thread does, even if it is killed.

    With several nodes, those of the others are started by `join` there.

    The checkpoint of the last step holds the trained tensors. Raises `RankError` if a rank failed, and
    `StageInterruptedError` if a stop was requested; a checkpoint was written if training had begun.
    """
    job = Job(stage=stage, build=build, folder=folder, token=secrets.token_hex(8))
    shutil.rmtree(job.scratch, ignore_errors=True)
    recover_folder(folder / STATE_FOLDER)  # once, before all ranks read it
    job.scratch.mkdir(parents=True)
    write_text(job.path, job.model_dump_json())
    if stage.sharded and stage.plan.spec.mode != "joint":
        emit(Message(_sharded(stage)))
    if (nodes := stage.config.hardware.nodes) > 1:
        emit(Message(f"stage {stage.index} trains on {nodes} nodes, once `stackwise join` runs on the others"))
    with explain_full_disk(job.log), job.log.open("w") as log, _running(job, first=True) as process:
        for line in _lines(process):
            if event := _decode_event(line):
                emit(event)
                if isinstance(event, StepTaken):
                    failpoint("train", event.step)
            else:
                print(line, file=log, flush=True)
    return _result(job)


def _sharded(stage: Stage) -> str:
    """Say that the processes of a growth stage share out what trains, and what follows from it."""
    whole = dataclasses.replace(stage.setting, shards=1)
    peaks = f"{size(memory(stage.setting).peak)} each, instead of {size(memory(whole).peak)}"
    later = "; it is validated when it has ended" if stage.config.validation.every else ""
    return f"stage {stage.index} is shared out between its {stage.setting.shards} processes: about {peaks}{later}"


def torchrun(job: Job, *, first: bool) -> list[str]:
    """Return the command of torchrun on a node: alone, or with the others at the rendezvous of the first."""
    hardware = job.stage.config.hardware
    where = ["--standalone", "--local-addr=127.0.0.1"]
    if hardware.nodes > 1:
        where = [f"--nnodes={hardware.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={hardware.rendezvous}"]
        where += [f"--rdzv-id={job.token}", f"--rdzv-conf=is_host={int(first)}", f"--local-addr={address_of(hardware)}"]
    per_node = f"--nproc-per-node={hardware.processes}"
    return [sys.executable, "-m", "torch.distributed.run", *where, per_node, "-m", "flows.run.rank", str(job.path)]


@contextmanager
def _running(job: Job, *, first: bool) -> Generator[subprocess.Popen[bytes]]:
    """Run torchrun with its ranks, in a new session so that Ctrl-C reaches this process alone, which passes it on."""
    hardware, command = job.stage.config.hardware, torchrun(job, first=first)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where a custom loss is imported from
        "PYTHONSAFEPATH": "1",  # and from nowhere else: `python -m` would put the working folder first
        "OMP_NUM_THREADS": str(threads_of_rank(hardware)),
        **({"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")} if hardware.nodes == 1 else {}),
        **({FIRST_NODE: "1"} if first else {}),
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
        if first:
            job.path.unlink(missing_ok=True)  # which ends the ranks of the other nodes
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: subprocess.Popen[bytes], goes_on: Callable[[], bool] = lambda: True) -> Iterator[str]:
    """Yield what a process and its children print until all have ended or none goes on; a stop is passed on once."""
    assert process.stdout is not None
    asked, rest = False, b""
    while goes_on():
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
    count = job.stage.config.hardware.ranks
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
    text, count = job.log.read_text(errors="replace"), job.stage.config.hardware.ranks
    found = re.findall(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", text, re.M)  # as torchrun prints it
    # Ranks that wait for a killed one fail too; of the others torchrun prints the first to fail last.
    rank, code = next((entry for entry in reversed(found) if int(entry[1]) < 0), found[-1] if found else ("", ""))
    number = int(code or 0)
    how = f" by {signal.Signals(-number).name}" if number < 0 else ""
    said = re.findall(rf"^\[rank{rank}\]: (\S.*)", text, re.M) if number > 0 else text.splitlines()[-1:]
    if not found and "RendezvousTimeoutError" in text:
        return f"stage {job.stage.index}: not all nodes came within ten minutes; {GO_ON}. The log is {job.log}"
    who = f"rank {rank} of {count} died{how}" if found else f"its {count} processes ended early"
    last = f": {said[-1]}" if said and number >= 0 else ""
    if number > 0 and job.stage.config.hardware.nodes > 1:
        last += ", perhaps since one on another node did, where `stackwise join` says why"
    return f"stage {job.stage.index}: {who}{last}; {GO_ON} from the last checkpoint. The log is {job.log}"


# ---------------------------------------------------------------- the other nodes


def join(artifacts: Artifacts) -> None:
    """Run this node's ranks of every stage that a run of several nodes trains in a folder, until a stop is requested.

    A file says which stage is trained; its ranks end when it is gone. The folder need not be there yet.
    """
    if artifacts.is_remote:
        raise ConfigError([Fault("--artifacts", repr(artifacts.uri), SHARED)])
    seen = set[str]()
    while not stop_requested():
        for path in (artifacts.root / "work").glob(f"*/{RANKS}/job-*.json"):
            job = _job_at(path)
            if job is None or job.token in seen or job.stage.config.hardware.nodes == 1:
                continue
            seen.add(job.token)
            if job.path == path:
                _take_part(job)
            else:
                complain(f"{path}: the first node has it at {job.path}; the folder must have one path on all nodes")
        time.sleep(_LOOK_SECONDS)


def _job_at(path: Path) -> Job | None:
    """Return a job that other nodes may join; None if it is over, or another version of StackWise wrote it."""
    try:
        return Job.model_validate_json(read_bounded(path))
    except (OSError, ValueError):
        return None


def _take_part(job: Job) -> None:
    title = f"stage {job.stage.index} of {job.stage.config.run.name}"
    say(f"joins {title}")
    with _running(job, first=False) as process:
        for line in _lines(process, goes_on=job.path.exists):
            complain(line)
        if not job.path.exists():
            process.kill()
    say(f"left {title}")
