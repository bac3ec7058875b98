"""How much of a stage's time a cache of the frozen trunk saves, compared with the trunk's share of the FLOPs.

The last stage of an appended rack, with the same batches and weights. Its boundary is read from a store on disk, with
every checksum verified at every read, or computed by the live trunk. The saving is 1 - cached / live. It excludes the
time to fill the store, whose pages are in memory. The losses of both must be equal bit for bit. One thread.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import Stream
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.dataloader import ProgressiveDataLoader, RowSource
from stackwise_core.stages.costs import stage_flops
from stackwise_core.stages.resolve import resolve_order, resolve_shape
from stackwise_core.stages.stages import StageSpec, resolve_stage
from stackwise_core.training.boundary import InputsFromTokens, LiveTrunk, RowsFromTokens
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import train_step
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.reader import StoreReader

DEPTHS = (2, 3, 4, 6, 8, 10, 12)
AT_LEAST = 0.9
"""Of the predicted saving."""
STEPS = 3
"""Of each candidate in a round; both go over the same batches every round."""


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(1)
    depths, rounds = ((2, 4), 2) if quick else (DEPTHS, 9)
    return [m for depth in depths for m in _measure(_config(depth), rounds)]


def _config(depth: int) -> StackWiseConfig:
    config = StackWiseConfig()
    config.data.seq_len = 128
    config.model.d_model = 256
    config.model.blocks_per_stack = 2
    config.training.batch_size = 8
    config.training.steps_per_stack = 1000  # for the learning rate schedule; fewer are taken
    config.training.progressive.target_stacks = depth
    config.training.progressive.training_objective = "clm"
    return config


def _measure(config: StackWiseConfig, rounds: int) -> list[Measure]:
    depth = config.training.progressive.target_stacks
    builder = ProgressiveRackBuilder(config)
    while builder.n_stacks < depth:
        builder.add_stack()
    spec = resolve_stage(config, depth - 1)
    builder.prepare_stage(spec)
    train, validation = _sequences(config)
    trunk = LiveTrunk(
        builder.build_rack().embedding,
        [builder.stack(index) for index in spec.anatomy.below],
        Stream(config.cache.dtype),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = RowsFromTokens(InputsFromTokens(train, validation, None), trunk)
        rows = _rows(config, train, validation)
        write = functools.partial(write_shards, rows, source)
        _, files = fill_store(write, Path(folder), rows, _say_nothing, lambda: False)
        with StoreReader(Path(folder), files, check="always") as reader:
            candidates = {
                "cached": _Candidate(config, builder, spec, train, reader),
                "live": _Candidate(config, builder, spec, train, trunk),
            }
            seconds = interleaved(candidates, rounds, warmup=2)
    losses = [candidate.losses for candidate in candidates.values()]
    assert losses[0] == losses[1], f"cached and live training differ at depth {depth}"

    live, below = stage_flops(resolve_shape(config), spec, config.data.seq_len, 1.0 - 1.0 / config.data.seq_len)
    predicted_saving = below / (live + below)
    savings = [1.0 - ratio for ratio in ratios(seconds["cached"], seconds["live"])]
    case = f"{depth} stacks"
    return [
        Measure(case, "cached step", "s", [s / STEPS for s in seconds["cached"]]),
        Measure(case, "live / cached", "x", ratios(seconds["live"], seconds["cached"])),
        Measure(case, "live / cached, by FLOPs", "x", [(live + below) / live]),
        Measure(case, "saving / saving by FLOPs", "x", [s / predicted_saving for s in savings], at_least=AT_LEAST),
    ]


class _Candidate:
    """The last stage with one source of its boundary; each call takes some steps."""

    def __init__(
        self,
        config: StackWiseConfig,
        builder: ProgressiveRackBuilder,
        spec: StageSpec,
        train: PackedSequences,
        boundary: RowSource | LiveTrunk,
    ) -> None:
        """Copy stack and head, so that both candidates start from the same weights."""
        stack, head = copy.deepcopy((builder.stack(spec.index), builder.build_rack().head))
        self.model, self.optim = StageModel(spec.anatomy, [stack], head), spec.optim
        self.optimizer = make_optimizer(self.model, spec.optim)
        packed = PackedBatches(train, resolve_order(config, len(train)), 0, STEPS)
        self.loader = ProgressiveDataLoader(packed, stack_idx=spec.index, trunk_activations=boundary, objective="clm")
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Train on every batch once."""
        for batch in self.loader:
            self.losses.append(train_step(self.model, batch, self.optimizer, self.optim, len(self.losses))["loss"])


def _sequences(config: StackWiseConfig) -> tuple[PackedSequences, PackedSequences]:
    """Return random tokens: exactly the rows that the steps read, and one unused validation row."""
    n_rows = STEPS * config.training.batch_size
    tokens = np.random.default_rng(0).integers(256, size=(n_rows + 1, config.data.seq_len), dtype=np.uint16)
    ids = np.arange(n_rows + 1, dtype=np.int64)
    return PackedSequences(tokens[:-1], ids[:-1]), PackedSequences(tokens[-1:], ids[-1:])


def _rows(config: StackWiseConfig, train: PackedSequences, validation: PackedSequences) -> StoreRows:
    return StoreRows(
        sequence_ids=train.sequence_ids,
        views=np.zeros(len(train), dtype=np.int64),
        validation_ids=validation.sequence_ids,
        seq_len=config.data.seq_len,
        d_model=config.model.d_model,
        dtype=config.cache.dtype,
        attributes={"id": "benchmark", "recipe": {}},
    )


def _say_nothing(n_bytes: int, of_bytes: int) -> None:
    """Ignore the progress of filling a store."""
