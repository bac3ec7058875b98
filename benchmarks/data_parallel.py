"""Two processes with one thread each that train a stage together, against one process with one thread."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.config import StackWiseConfig
from stackwise_core.model.growth_operators import grow_stack, new_rack
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import ALONE, Ranks, StageModel
from stackwise_core.training.training import train_step

SEQ_LEN = 256
N_BLOCKS = 2
SHAPES = ((256, 16), (512, 8))
"""Width of the stream and sequences per batch."""
PROCESSES = 2
AT_LEAST = 1.6
_STEPS = 2
"""Of each round."""
_SAME_LOSS = 1e-4


def measure(quick: bool) -> list[Measure]:
    return [m for d_model, batch_size in SHAPES for m in _measure(d_model, batch_size, rounds=3 if quick else 12)]


def _measure(d_model: int, batch_size: int, rounds: int) -> list[Measure]:
    with _ranks("DDP", d_model, batch_size) as ddp, _ranks("FSDP2", d_model, batch_size) as fsdp:
        alone = _Steps(d_model, batch_size, ALONE)
        together = {"DDP": ddp, "FSDP2": fsdp}
        losses = {name: steps() for name, steps in {"one process": alone, **together}.items()}
        for name, loss in losses.items():
            assert abs(loss - losses["one process"]) < _SAME_LOSS, f"{name} does other work: {losses}"
        seconds = interleaved({"one process": alone, **together}, rounds)
    case = f"d={d_model}, batch {batch_size}, {PROCESSES} processes"
    tokens = _STEPS * batch_size * SEQ_LEN
    measures = [Measure(case, name, "tokens/s", [tokens / s for s in seconds[name]]) for name in seconds]
    for name in together:
        goal = AT_LEAST if name == "DDP" else None
        speedup = ratios(seconds["one process"], seconds[name])
        measures.append(Measure(case, f"{name} / one process", "x", speedup, at_least=goal))
    return measures


class _Steps:
    """Steps of a first stage; every step uses this process's share of the same batch."""

    def __init__(self, d_model: int, batch_size: int, ranks: Ranks) -> None:
        torch.set_num_threads(1)
        config = StackWiseConfig()
        config.model.d_model, config.model.n_heads = d_model, d_model // 64
        config.training.progressive.training_objective = "clm"
        shape, stage = resolve_shape(config), resolve_stage(config, 0)
        rack, stack = new_rack(shape, seed=0), grow_stack(shape, N_BLOCKS, 0, "random", seed=0)
        self.model = StageModel(stage.anatomy, [stack], rack.head, rack.embedding)
        self.batch = _share(shape.vocab_size, batch_size, ranks)
        self.spec, self.ranks = stage.optim, ranks
        ranks.wrap(self.model)
        self.optimizer = make_optimizer(self.model, self.spec)

    def __call__(self) -> float:
        """Take the steps and return the last loss."""
        losses = [
            train_step(self.model, self.batch, self.optimizer, self.spec, 0, None, self.ranks)["loss"]
            for _ in range(_STEPS)
        ]
        return losses[-1]


def _share(vocab_size: int, batch_size: int, ranks: Ranks) -> Batch:
    rows = slice(ranks.rank * batch_size // ranks.count, (ranks.rank + 1) * batch_size // ranks.count)
    tokens = np.random.default_rng(0).integers(vocab_size, size=(batch_size, SEQ_LEN))[rows]
    ids = torch.arange(batch_size)[rows]
    return {**make_batch({"input_ids": tokens, "sequence_ids": ids}, None), "trunk_activations": None, "stack_idx": 0}


# ---------------------------------------------------------------- the other processes


@contextmanager
def _ranks(kind: str, d_model: int, batch_size: int) -> Generator[Callable[[], float]]:
    """Start processes that sleep until they are asked to take their steps; yield the function that asks them."""
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rank in range(PROCESSES):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, rank, scratch, kind, d_model, batch_size), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)

        def steps() -> float:
            for pipe in pipes:
                pipe.send(True)
            return [pipe.recv() for pipe in pipes][-1]

        try:
            yield steps
        finally:
            for pipe, process in zip(pipes, processes, strict=True):
                pipe.close()
                process.join()


def _serve(pipe: Connection, rank: int, scratch: str, kind: str, d_model: int, batch_size: int) -> None:
    import torch.distributed as dist

    from stackwise_core.training.distributed import Replicas, Shards

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{scratch}/store", PROCESSES), rank=rank, world_size=PROCESSES
    )
    steps = _Steps(d_model, batch_size, {"DDP": Replicas, "FSDP2": Shards}[kind](torch.device("cpu")))
    try:
        while pipe.recv():
            pipe.send(steps())
    except EOFError:
        os._exit(0)  # see `stackwise_core.training.distributed.join`
