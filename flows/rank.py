"""One of the processes that train a stage together: `python -m torch.distributed.run ... -m flows.rank JOB`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from flows.children import end_with_parent
from flows.job import Ending, Job, told
from flows.progress import Event, Message, StepTaken, listening, request_stop
from flows.training import train_live_part
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.several import joined
from storage.durable import write_text


def main(path: str) -> int:
    """Train a share of a job, and write down how it ended; what nobody expected goes to the log as a traceback."""
    end_with_parent()
    job, rank = Job.model_validate_json(Path(path).read_bytes()), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop())
    try:
        ending = _train(job, rank)
    except StackWiseError as error:
        on_request = isinstance(error, StageInterruptedError)
        ending = Ending(error=str(error), exit_code=error.exit_code, on_request=on_request)
    write_text(job.ending_of(rank), ending.model_dump_json())
    return ending.exit_code


def _train(job: Job, rank: int) -> Ending:
    stage = job.stage
    sharded = stage.plan.spec.mode == "joint"
    with listening(_say if rank == 0 else _keep_still), joined(stage.device, sharded=sharded) as ranks:
        trained = train_live_part(stage, job.build, job.folder, ranks)
    return Ending(attempt=trained.attempt)


def _say(event: Event) -> None:
    if isinstance(event, (StepTaken, Message)):
        print(told(event), flush=True)


def _keep_still(event: Event) -> None:
    """Leave it to the first rank to tell what all do."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
