"""Two processes that train a stage together, compiled and recomputed: `python -m support.compiled_ranks KIND STORE`.

Prints the losses of three steps alone, those together, and how many graphs the two blocks have. Forked here,
so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from stackwise_core.objectives.losses import batch_rows
from stackwise_core.stages.stages import resolve_stages
from stackwise_core.training import hardware
from stackwise_core.training.distributed import Replicas, Shards
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import ALONE, Ranks
from stackwise_core.training.training import train_step
from support.growth import batch_of, built, model_of
from support.training import tiny


def losses(ranks: Ranks, *, compiled: bool) -> list[float]:
    config = tiny()
    config.model.blocks_per_stack, config.training.activation_checkpointing = 2, compiled
    model, spec, batch = model_of(built(config, 1), config, 0), resolve_stages(config)[0].optim, batch_of(config, 0)
    model.compiles = compiled
    n_rows = len(batch["sequence_ids"]) // ranks.count
    batch = batch_rows(batch, slice(ranks.rank * n_rows, (ranks.rank + 1) * n_rows))
    with model.compiled():
        ranks.wrap(model)
        optimizer = make_optimizer(model, spec)
        return [train_step(model, batch, optimizer, spec, step, None, ranks)["loss"] for step in range(3)]


def main(kind: str, store: str) -> None:
    torch.set_num_threads(1)
    hardware.BACKEND = "aot_eager"
    other = os.fork()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(not other), world_size=2)
    kinds: dict[str, Any] = {"shards": Shards, "replicas": Replicas}
    together = losses(kinds[kind](torch.device("cpu")), compiled=True)
    if other:
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        alone = losses(ALONE, compiled=False)
        print(json.dumps({"alone": alone, "together": together, "graphs": graphs, "breaks": breaks}), flush=True)
        os.waitpid(other, 0)
    os._exit(0)  # see `init_process_group`


if __name__ == "__main__":
    main(*sys.argv[1:])
