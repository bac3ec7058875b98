"""One rank of a stage: `python -m torch.distributed.run ... -m flows.run.rank JOB`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from flows.run.children import end_with_parent
from flows.run.events import Event, Message, StepTaken, request_stop, subscribed
from flows.run.inputs import open_stage
from flows.run.ranks import FIRST_NODE, Ending, Job, encode_event
from flows.run.stage import Stage, fingerprint_of
from flows.run.training import failures_explained, hooks_of
from stackwise_core.errors import StackWiseError, StageInterruptedError
from stackwise_core.training.distributed import DistributedRanks, Replicas, Shards, check_alike, init_process_group
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
        reports = FIRST_NODE in os.environ and os.environ["LOCAL_RANK"] == "0"  # one for all, where the run is
        with subscribed(_print_event) if reports else nullcontext():
            init_process_group(stage.device)
            ranks = ranks_of(stage)
            ranks.reports = reports
            with failures_explained(stage), open_stage(stage, job.build, job.folder, ranks) as inputs:
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


def ranks_of(stage: Stage) -> DistributedRanks:
    """Return this process of the group, which trains a stage; raises ConfigError unless all run the same software."""
    check_alike({"StackWise": version("stackwise"), **fingerprint_of(stage)})
    return (Shards if stage.sharded else Replicas)(stage.device)


def _end(job: Job, rank: int, ending: Ending) -> int:
    write_text(job.ending_of(rank), ending.model_dump_json())
    return ending.exit_code


def _print_event(event: Event) -> None:
    if isinstance(event, (StepTaken, Message)):
        print(encode_event(event), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
