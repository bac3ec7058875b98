"""Training a stage by several processes: torchrun in a child process, its progress told here as if it were ours."""

from __future__ import annotations

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
from typing import TextIO

from flows.run.children import ending_with_us
from flows.run.events import StepTaken, emit, stop_requested
from flows.run.job import Ending, Job, decode_event
from flows.run.stage import Stage
from flows.run.training import Attempt
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.stages.identity import Ref
from stackwise_core.training.hardware import threads_of_rank

_SECONDS_BETWEEN_LOOKS = 0.2


class RankError(StackWiseError):
    """A process of several that train a stage failed."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """Keep the exit code that the rank's own error has."""
        self.exit_code = exit_code
        super().__init__(message)


def train_by_ranks(stage: Stage, build: Ref | None, folder: Path) -> Attempt:
    """Train a stage by `hardware.processes` processes; the checkpoint of its last step is the result.

    They end with this thread, however it ends.

    Raises:
        StageInterruptedError: a stop was asked for; a checkpoint was written if they had begun.
        RankError: one of them failed.
    """
    job = Job(stage=stage, build=build, folder=folder)
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.scratch.mkdir(parents=True)
    path = job.scratch / "job.json"
    path.write_text(job.model_dump_json())
    with job.log.open("w") as log, _running(stage, path) as process:
        for line in _lines(process):
            if event := decode_event(line):
                emit(event)
                if isinstance(event, StepTaken):
                    failpoint("train", event.step)
            else:
                _write(log, line)
    return _attempt(job)


@contextmanager
def _running(stage: Stage, job: Path) -> Generator[subprocess.Popen[bytes]]:
    """Give torchrun with its ranks, in a session of its own: Ctrl-C is for us, who pass it on."""
    count, threads = stage.config.hardware.processes, threads_of_rank(stage.config.hardware)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={count}", "-m", "flows.run.rank", str(job)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a loss of one's own is found where it was here
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    process = subprocess.Popen(
        ending_with_us(command, signal.SIGKILL),  # ranks that lived on could write beside those of the next attempt
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
    """Yield what a process and its children print, until all have ended; a request to stop is passed on once."""
    assert process.stdout is not None
    asked, rest = False, b""
    while True:
        if stop_requested() and not asked:
            process.terminate()
            asked = True
        if not select.select([process.stdout], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            continue
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


def _write(log: TextIO, line: str) -> None:
    log.write(line + "\n")
    log.flush()


def _attempt(job: Job) -> Attempt:
    """Return what came of a job.

    Raises:
        StageInterruptedError, RankError: nothing did.
    """
    count = job.stage.config.hardware.processes
    paths = [path for path in map(job.ending_of, range(count)) if path.exists()]
    endings = [Ending.model_validate_json(path.read_bytes()) for path in paths]
    for ending in endings:
        if ending.error and not ending.on_request:
            raise RankError(ending.error, ending.exit_code)
        if ending.on_request:
            raise StageInterruptedError(ending.error)
    if len(endings) == count and endings[0].attempt is not None:
        return endings[0].attempt
    if stop_requested():
        raise StageInterruptedError("stopped on request; run the same command to go on from the last checkpoint")
    raise RankError(_how_it_died(job))


def _how_it_died(job: Job) -> str:
    """Return what is known of a rank that died without a word."""
    text, count = job.log.read_text(errors="replace"), job.stage.config.hardware.processes
    found = re.findall(r"^\s*rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", text, re.M)  # torchrun's account of it
    # Those that wait for one that was killed fail too; of the others torchrun names the first last.
    rank, code = next((entry for entry in found if int(entry[1]) < 0), found[-1] if found else ("", ""))
    number = int(code or 0)
    how = f" by {signal.Signals(-number).name}" if number < 0 else ""
    said = re.findall(rf"^\[rank{rank}\]: (\S.*)", text, re.M) if number > 0 else text.splitlines()[-1:]
    who = f"rank {rank} of {count} died{how}" if found else f"its {count} processes ended early"
    last = f": {said[-1]}" if said and number >= 0 else ""
    again = "run the same command to go on from the last checkpoint"
    return f"stage {job.stage.index}: {who}{last}; {again}. The log is {job.log}"
