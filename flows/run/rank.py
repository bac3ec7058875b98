"""One of the processes that train a stage together: `python -m torch.distributed.run ... -m flows.run.rank JOB`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from flows.run.children import end_with_parent
from flows.run.events import Event, Message, StepTaken, request_stop, subscribed
from flows.run.job import Ending, Job, encode_event
from flows.run.training import train_live_part
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.training.distributed import join
from storage.durable import write_text


def main(path: str) -> NoReturn:
    """Train a share of a job, write down how it ended, and end; what nobody expected goes to the log as a traceback."""
    end_with_parent()
    job, rank = Job.model_validate_json(Path(path).read_bytes()), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop())
    ranks, code = None, 1
    try:
        stage = job.stage
        with subscribed(_print if rank == 0 else _ignore):
            ranks = join(stage.device, sharded=stage.plan.spec.mode == "joint")
            trained = train_live_part(stage, job.build, job.folder, ranks)
        code = _end(job, rank, Ending(attempt=trained.attempt))
    except StackWiseError as error:
        on_request = isinstance(error, StageInterruptedError)
        code = _end(job, rank, Ending(error=str(error), exit_code=error.exit_code, on_request=on_request))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # `ranks` is still there: see `join`


def _end(job: Job, rank: int, ending: Ending) -> int:
    write_text(job.ending_of(rank), ending.model_dump_json())
    return ending.exit_code


def _print(event: Event) -> None:
    if isinstance(event, (StepTaken, Message)):
        print(encode_event(event), flush=True)


def _ignore(event: Event) -> None:
    """Drop it: rank 0 reports for all ranks."""


if __name__ == "__main__":
    main(sys.argv[1])
