"""Filling a store from the one below, against the slower of its two halves: computing, and reading and writing.

One stack (d=64, one block) advances 4,096 rows of 128 positions, float32, in 17 shards; torch has one thread. "fill" is
what a run does. "compute" advances the same rows from memory and keeps none. "disk" reads the rows below, and writes
rows that are there already. If all three overlapped without a loss, a fill would take as long as the slower half.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.data.masks import IntArray
from stackwise_core.data.sequences import FIRST_VALIDATION_ID
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.training.boundary import RowsFromBoundary
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.format import Group, GroupSpec
from storage.activations.reader import StoreReader

D, T = 64, 128
AT_LEAST = 0.9
_CPU = torch.device("cpu")
_AT_ONCE = 32


class _Rows(StoreRows):
    """Rows in shards of 8 MiB."""

    def spec(self, group: Group) -> GroupSpec:
        return dataclasses.replace(super().spec(group), shard_bytes=2**23)


class _Memory:
    """Rows in one tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def rows(self, sequence_ids: IntArray, view: int) -> torch.Tensor:
        return self.values[torch.from_numpy(sequence_ids % FIRST_VALIDATION_ID)]


class _ReadOnly(_Memory):
    """Rows in memory, for which those below are read all the same."""

    def __init__(self, values: torch.Tensor, below: RowSource) -> None:
        super().__init__(values)
        self.below = below

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], torch.Tensor]:
        self.below.rows(sequence_ids, view)
        return lambda: self.rows(sequence_ids, view)


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(1)
    n_rows, rounds = (64, 2) if quick else (4096, 15)
    ids = np.arange(n_rows, dtype=np.int64)
    rows = _Rows(ids, np.zeros_like(ids), FIRST_VALIDATION_ID + ids[:1], T, D, "float32", {})
    stack = Stack(ModelShape(vocab_size=2, d_model=D, n_heads=4, n_kv_heads=4, d_ff=176, causal=True), 1)
    initialise(stack, 0)
    values = torch.randn(n_rows, T, D, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        files = _fill(rows, _Memory(values), folder / "below")
        with StoreReader(folder / "below", files, check="always") as reader:
            from_memory = RowsFromBoundary(_Memory(values), stack, _CPU)
            candidates: dict[str, Callable[[], object]] = {
                "fill": lambda: _fill(rows, RowsFromBoundary(reader, stack, _CPU), folder / "fill"),
                "compute": lambda: _compute(from_memory, ids),
                "disk": lambda: _fill(rows, _ReadOnly(values, reader), folder / "disk"),
            }

            def emptied(candidate: str) -> None:
                shutil.rmtree(folder / candidate, ignore_errors=True)

            seconds = interleaved(candidates, rounds, before=emptied)
    slower = [max(pair) for pair in zip(seconds["compute"], seconds["disk"], strict=True)]
    case = f"{n_rows:,} rows"
    return [
        *(Measure(case, what, "s", each) for what, each in seconds.items()),
        Measure(case, "slower of compute and disk / fill", "x", ratios(slower, seconds["fill"]), at_least=AT_LEAST),
    ]


def _fill(rows: StoreRows, source: RowSource, folder: Path) -> dict[str, tuple[int, str]]:
    folder.mkdir()
    write = functools.partial(write_shards, rows, source)
    return fill_store(write, folder, rows, lambda *_: None, lambda: False)[1]


def _compute(source: RowSource, ids: IntArray) -> None:
    for first in range(0, len(ids), _AT_ONCE):
        source.rows(ids[first : first + _AT_ONCE], 0)
