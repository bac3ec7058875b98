"""Two processes that train a stage together, forked by a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flows.run.events import StepTaken, request_stop, stopping_on_signals, subscribed
from flows.run.inputs import open_stage
from flows.run.ranks import Job
from flows.run.stage import Stage
from flows.run.training import hooks_of
from stackwise_core.errors import StackWiseError
from stackwise_core.model import blocks
from stackwise_core.training.training import train_stage
from support.runs import Recorder

COUNT = 2
TOLERANCE = 5e-6
"""Of weights of 0.02 and losses of 5: twelve steps of float32 sums in another order; 2e-6 was seen."""
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["pytest", "torch._dynamo", "flows.run.training", "stackwise_core.training.distributed"])


@contextmanager
def in_bfloat16() -> Generator[None]:
    """Have every stack compute in bfloat16 on a CPU too."""
    from stackwise_core.training import distributed

    def low(precision: Any, device: Any) -> torch.dtype:
        return torch.bfloat16

    with mock.patch.object(blocks, "compute_dtype", low), mock.patch.object(distributed, "compute_dtype", low):
        yield


def _rank(pipe: Connection, rank: int, store: str) -> None:
    """Train the shares of a rank, job after job."""
    import torch.distributed as dist

    from flows.run.rank import ranks_of
    from support.older_torch import older_torch

    WITHIN: dict[str, Any] = {"": nullcontext, "torch 2.11": older_torch, "bfloat16": in_bfloat16}
    WITHIN["another torch in rank 1"] = partial(mock.patch.object, torch, "__version__", f"2.11.{rank}")
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    os.fsync = lambda fd: None
    dist.init_process_group("gloo", store=dist.FileStore(store, COUNT), rank=rank, world_size=COUNT)
    kept: list[Any] = []  # see `init_process_group`
    while (message := pipe.recv()) is not None:
        text, stop, within = message
        job = Job.model_validate_json(text)
        recorder = Recorder()
        try:
            with stopping_on_signals(), subscribed(recorder), WITHIN[within]():
                if stop:
                    request_stop()
                kept.append(ranks_of(job.stage))
                with open_stage(job.stage, job.build, job.folder, kept[-1]) as inputs:
                    trained = train_stage(inputs, hooks_of(job.stage, job.folder, kept[-1]), kept[-1])
            steps = [event.step for event in recorder.events if isinstance(event, StepTaken)]
            pipe.send((trained.records, trained.frozen, steps, recorder.messages))
        except StackWiseError as error:
            pipe.send(error)
    os._exit(0)


class Pair:
    """Two processes that train together."""

    def __init__(self, folder: Path) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(COUNT):
            mine, theirs = _FORKED.Pipe()
            arguments = (theirs, rank, str(folder / "store"))
            process = _FORKED.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def train(self, stage: Stage, folder: Path, stop: int = -1, *, within: str = "") -> list[Any]:
        """Train a stage into a work folder; return what each rank came to. One may be asked to `stop`.

        `within` is "torch 2.11", which lacks some names, "bfloat16", see `in_bfloat16`, or another version in rank 1.
        """
        build = stage.plan.ref("build") if stage.plan.build else None
        for rank, pipe in enumerate(self.pipes):
            pipe.send((Job(stage=stage, build=build, folder=folder).model_dump_json(), rank == stop, within))
        found: list[Any] = []
        for pipe in self.pipes:
            assert pipe.poll(600), "a rank hangs"
            found.append(pipe.recv())
        return found

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(120)
            process.kill()
