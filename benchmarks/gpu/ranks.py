"""DDP and FSDP2 over NCCL, in a group of one process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from benchmarks.gpu.record import Run
from benchmarks.gpu.stages import SHAPE_8B, Values, later
from benchmarks.harness import Measure
from stackwise_core.training.stage_model import ALONE, Ranks
from stackwise_core.training.training import capture, restore, train_step


def one_rank(run: Run) -> Iterator[Measure]:
    """DDP and FSDP2 in a group of one process: two steps, and a third after capture and restore, against none."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_in_a_group, args=(theirs, run), daemon=True)
    process.start()  # a child, since leaving a group of gloo can hang: see `stackwise_core.training.distributed`
    theirs.close()
    try:
        for _ in range(2):
            name, difference = ours.recv()
            what = f"{name}: largest difference of a loss from one process alone"
            yield Measure("group of one", what, "nats", [difference], at_most=1e-3)
    except EOFError:
        raise RuntimeError("the process of the group died; its message is above") from None
    finally:
        process.kill()
        process.join()


def _in_a_group(pipe: Connection, run: Run) -> None:
    from stackwise_core.training.distributed import Replicas, Shards, init_process_group

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    alone = _losses(run, ALONE)
    init_process_group(run.device)
    for kind in (Replicas, Shards):
        losses = _losses(run, kind(run.device))
        pipe.send((kind.__name__, max(abs(a - b) for a, b in zip(losses, alone, strict=True))))
    os._exit(0)


def _losses(run: Run, ranks: Ranks) -> list[float]:
    """Return the losses of two steps, and of a third by another model that goes on from the state after them."""
    losses: list[float] = []
    state = None
    for n_steps in (2, 1):
        torch.manual_seed(0)
        stage = later(run, SHAPE_8B, _SMALL if not run.quick else {}, ranks=ranks)
        if state is not None:
            restore(stage.model, stage.optimizer, state, ranks)
        for _ in range(n_steps):
            step = train_step(stage.model, stage.batch, stage.optimizer, stage.spec.optim, 0, None, ranks)
            losses.append(step["loss"])
        state = capture(stage.model, stage.optimizer, [], ranks).copy()
    return losses


_SMALL: Values = {"model.d_model": 1024, "model.d_ff": 2816, "model.n_heads": 16, "data.seq_len": 512}
