"""One rank of a stage: `python -m torch.distributed.run ... -m flows.run.rank JOB`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from flows.run.children import end_with_parent
from flows.run.events import Event, Message, StepTaken, request_stop, subscribed
from flows.run.inputs import open_stage
from flows.run.ranks import Ending, Job, encode_event
from flows.run.training import hooks_of, memory_explained
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.training.distributed import init_process_group
from stackwise_core.training.training import train_stage
from storage.files import write_text


def main(path: str) -> NoReturn:
    """Train as one rank of a job, write how it ended, and exit; an unexpected error goes to the log as a traceback."""
    end_with_parent()
    job, rank = Job.model_validate_json(Path(path).read_bytes()), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop())
    ranks, code = None, 1
    try:
        stage = job.stage
        with subscribed(_print_event) if rank == 0 else nullcontext():  # the first rank reports for all
            ranks = init_process_group(stage.device, sharded=stage.plan.spec.mode == "joint")
            with memory_explained(stage), open_stage(stage, job.build, job.folder, ranks) as inputs:
                trained = train_stage(inputs, hooks_of(stage, job.folder, ranks), ranks)
        code = _end(job, rank, Ending(trained=replace(trained, records=[])))
    except StackWiseError as error:
        on_request = isinstance(error, StageInterruptedError)
        code = _end(job, rank, Ending(error=str(error), exit_code=error.exit_code, on_request=on_request))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # while `ranks` still exists: see `init_process_group`


def _end(job: Job, rank: int, ending: Ending) -> int:
    write_text(job.ending_of(rank), ending.model_dump_json())
    return ending.exit_code


def _print_event(event: Event) -> None:
    if isinstance(event, (StepTaken, Message)):
        print(encode_event(event), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
