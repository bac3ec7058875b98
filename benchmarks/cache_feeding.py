"""Training steps fed by the cache, against the same steps fed by a tensor in memory.

The second stage of a causal rack (d=256, two blocks, batches of 32 x 128), with the same weights and batches. "cache":
rows come from a sealed store with a warm page cache, through the prefetching loader of a stage. "memory": one tensor
holds the boundary of every sequence, and index_select takes rows from it. The losses of both must be equal bit for bit.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.objectives.batches import PackedBatches, prefetched
from stackwise_core.objectives.dataloader import ProgressiveDataLoader, RowSource
from stackwise_core.objectives.losses import Batch
from stackwise_core.stages.resolve import resolve_order
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import train_step
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.reader import ReusedRows, StoreReader

STEPS = 4
"""Of each candidate in a round."""


class _Memory:
    """The boundary of every sequence in one tensor [N, T, D]."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.values = rows

    def rows(self, sequence_ids: np.ndarray, view: int) -> torch.Tensor:
        return self.values.index_select(0, torch.from_numpy(sequence_ids % FIRST_VALIDATION_ID))


def measure(quick: bool) -> list[Measure]:
    rounds, n_rows = (2, 64) if quick else (25, 4096)
    config = _config()
    measures: list[Measure] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = _time(config, n_rows, rounds)
        case = f"{threads} thread" + "s" * (threads > 1)
        for name, values in seconds.items():
            measures.append(Measure(case, f"step from {name}", "s", [s / STEPS for s in values]))
        measures.append(
            Measure(case, "memory / cache", "x", ratios(seconds["memory"], seconds["cache"]), at_least=0.97)
        )
    return measures


def _config() -> StackWiseConfig:
    config = StackWiseConfig()
    config.data.seq_len = 128
    config.model.d_model = 256
    config.training.steps_per_stack = 10_000  # for the learning rate schedule; fewer are taken
    config.training.progressive.target_stacks = 2
    config.training.progressive.training_objective = "clm"
    return config


def _time(config: StackWiseConfig, n_rows: int, rounds: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    memory = _Memory(torch.randn(n_rows, 128, 256, generator=generator).bfloat16())
    ids = np.arange(n_rows, dtype=np.int64)
    rows = StoreRows(ids, np.zeros_like(ids), FIRST_VALIDATION_ID + ids[:1], 128, 256, "bfloat16", {})
    tokens = np.random.default_rng(0).integers(256, size=(n_rows, 128), dtype=np.uint16)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        write = functools.partial(write_shards, rows, memory)
        _, files = fill_store(write, Path(folder), rows, lambda done, total: None, lambda: False)
        with StoreReader(Path(folder), files) as reader:
            for first in range(0, n_rows, 32):
                reader.read("train", ids[first : first + 32])
            sources: dict[str, RowSource] = {"memory": memory, "cache": ReusedRows(reader, 3)}
            runs = {
                name: _Run(config, PackedSequences(tokens, ids), source, 2 if name == "cache" else 0)
                for name, source in sources.items()
            }
            seconds = interleaved(runs, rounds, warmup=2)
    assert runs["memory"].losses == runs["cache"].losses, "cached training gives other losses"
    return seconds


class _Run:
    """The second stage with one source of rows; each call takes some steps."""

    def __init__(self, config: StackWiseConfig, train: PackedSequences, source: RowSource, ahead: int) -> None:
        builder = ProgressiveRackBuilder(config)
        builder.add_stack()
        builder.add_stack()
        spec = resolve_stage(config, 1)
        builder.prepare_stage(spec)
        stack, head = copy.deepcopy((builder.stack(1), builder.build_rack().head))
        self.model, self.optim = StageModel(spec.anatomy, [stack], head), spec.optim
        self.optimizer = make_optimizer(self.model, spec.optim)
        packed = PackedBatches(train, resolve_order(config, len(train)), 0, 10_000)
        loader = ProgressiveDataLoader(packed, stack_idx=1, trunk_activations=source, objective="clm")
        self.batches: Iterator[Batch] = prefetched(loader, ahead) if ahead else iter(loader)
        self.losses: list[float] = []

    def __call__(self) -> None:
        for batch in itertools.islice(self.batches, STEPS):
            self.losses.append(train_step(self.model, batch, self.optimizer, self.optim, len(self.losses))["loss"])
