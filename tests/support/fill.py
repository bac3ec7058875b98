"""A store of ten small shards, and a source that gives its rows and remembers what it was asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise_core.data.masks import VALIDATION_VIEW, IntArray
from storage.activations.fill import StoreRows, fill_store, write_shards
from storage.activations.format import Group, GroupSpec

T, D, N = 3, 4, 50
FIRST_VALIDATION_ID = 1 << 40


class SmallShards(StoreRows):
    """Rows in shards of five, two to a chunk, where a real store would put all of these in one."""

    def spec(self, group: Group) -> GroupSpec:
        spec = super().spec(group)
        return dataclasses.replace(spec, chunk_bytes=2 * spec.row_bytes, shard_bytes=6 * spec.row_bytes)


def rows_to_store(dtype: str = "bfloat16") -> StoreRows:
    """Two views of 50 sequences, but not every pair; five validation sequences. Ten shards."""
    ids = np.concatenate([np.arange(N), np.arange(3)]).astype(np.int64)
    views = np.repeat([0, 1], [N, 3]).astype(np.int64)
    validation = FIRST_VALIDATION_ID + np.arange(5, dtype=np.int64)
    return SmallShards(ids, views, validation, T, D, dtype, {"id": "x"})


def value(sequence_id: int, view: int, dtype: torch.dtype) -> Tensor:
    """A row that depends on its sequence and its view, and on nothing else: [T, D]."""
    generator = torch.Generator().manual_seed(sequence_id * 7 + view + 1)
    return torch.randn(T, D, generator=generator).to(dtype)


class Source:
    """Has every row, and remembers what it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.asked: list[tuple[int, int]] = []
        self.sizes: list[int] = []

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        self.asked += [(int(sequence_id), view) for sequence_id in sequence_ids]
        self.sizes.append(len(sequence_ids))
        return torch.stack([value(int(sequence_id), view, self.dtype) for sequence_id in sequence_ids])


def fill(folder: Path, source: Source, n_shards: int | None = None, **changes: Any) -> Any:
    """Fill, and stop after `n_shards` if they are given; changes are of the rows."""
    told: list[tuple[int, int]] = []
    rows = dataclasses.replace(rows_to_store(), **changes)
    write = functools.partial(write_shards, rows, source)
    result = fill_store(write, folder, rows, lambda *n: told.append(n), lambda: len(told) - 1 == n_shards)
    return (*result, told)


def pairs() -> list[tuple[int, int]]:
    rows = rows_to_store()
    train = list(zip(rows.sequence_ids.tolist(), rows.views.tolist(), strict=True))
    return train + [(int(sequence_id), VALIDATION_VIEW) for sequence_id in rows.validation_ids]


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
