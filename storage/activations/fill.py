"""Fill a store with rows from any source, resuming where an interrupted attempt stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise_core.config.schema import StreamDtype
from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.errors import StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.model.stream import ChannelStatistics, Quantised, quantise
from stackwise_core.objectives.dataloader import RowSource
from storage.activations.format import GROUPS, Group, GroupSpec
from storage.activations.statistics import evenly_spaced
from storage.activations.writer import RowKeys, ShardRange, StoreWriter

_SEQUENCES_AT_ONCE = 32

_WRITTEN_AT_ONCE = 2
"""Shards: while one is flushed to the disk, the next is hashed and copied to the kernel."""


@dataclass(frozen=True)
class StoreRows:
    """The rows of a store, and the attributes that describe it."""

    sequence_ids: np.ndarray
    """int64 [training rows]."""
    views: np.ndarray
    """int64 [training rows]."""
    validation_ids: np.ndarray
    """int64 [validation rows]."""
    seq_len: int
    d_model: int
    dtype: StreamDtype
    attributes: dict[str, Any]
    channels: ChannelStatistics | None = None
    """For a quantised store, the statistics that standardise its channels."""

    def index(self, group: Group) -> RowKeys:
        """Return the sequence ids (int64) and views (int32) of a group."""
        if group == "train":
            return self.sequence_ids, self.views.astype(np.int32)
        return self.validation_ids, np.full(len(self.validation_ids), VALIDATION_VIEW, np.int32)

    def spec(self, group: Group) -> GroupSpec:
        """Return the layout of a group."""
        return GroupSpec(len(self.index(group)[0]), self.seq_len, self.d_model, self.dtype)

    def sample(self, n_rows: int) -> list[tuple[int, int]]:
        """Return about `n_rows` (sequence id, view) pairs, spread evenly over both groups."""
        sequence_ids, views = (np.concatenate([self.index(group)[part] for group in GROUPS]) for part in (0, 1))
        return [(int(sequence_ids[place]), int(views[place])) for place in evenly_spaced(len(views), n_rows)]


WriteShards = Callable[[StoreWriter, Iterator[ShardRange]], Generator[ShardRange]]
"""Writes the shards that the iterator yields, taking the next one only when it is ready for it, and yields each shard
once it is on the disk."""


def fill_store(
    write: WriteShards,
    folder: Path,
    rows: StoreRows,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    """Write every missing shard of a store in a work folder.

    After every shard, `on_progress` gets (bytes on disk, bytes in all), and `should_stop` is asked. If it returns True,
    `write` gets no further shard, but still writes those that it has computed.

    Returns:
        The counts train_rows, validation_rows and store_bytes; and (size, checksum) of every file.

    Raises:
        StageInterruptedError: A stop was requested; the shards written so far are kept.
        StoreSpaceError: The disk is full; the shards written so far are kept.
    """
    specs: dict[Group, GroupSpec] = {group: rows.spec(group) for group in GROUPS}
    indices: dict[Group, RowKeys] = {group: rows.index(group) for group in GROUPS}
    writer = StoreWriter(folder, specs, rows.attributes, indices, rows.channels)
    missing = writer.missing_shards()
    total = sum(spec.rows * spec.stored_row_bytes for spec in specs.values())
    done = total - sum(shard.n_rows * specs[shard.group].stored_row_bytes for shard in missing)
    on_progress(done, total)
    stopping = False
    wanted = takewhile(lambda _: not stopping, missing)
    with closing(write(writer, wanted)) as written:  # ends all writing before the folder's lock is released
        for number, shard in enumerate(written, 1):
            done += shard.n_rows * specs[shard.group].stored_row_bytes
            on_progress(done, total)
            failpoint("cache", number)
            stopping = stopping or should_stop()
    if done < total:
        cached = f"{done:,} of {total:,} bytes cached"
        raise StageInterruptedError(f"stopped on request with {cached}; run the same command to go on")
    counts = {f"{group}_rows": spec.rows for group, spec in specs.items()}
    counts["store_bytes"] = total + sum(statistic.nbytes for statistic in rows.channels or ()) * len(specs)
    return counts, writer.files()


def write_shards(
    rows: StoreRows, source: RowSource, writer: StoreWriter, wanted: Iterator[ShardRange]
) -> Generator[ShardRange]:
    """Compute shards in reused buffers, and write each while the next is computed; see `WriteShards`."""
    memory = cycle([_memory(writer.specs.values()) for _ in range(_WRITTEN_AT_ONCE + 1)])
    with ThreadPoolExecutor(_WRITTEN_AT_ONCE, "disk") as disk:
        behind: deque[tuple[ShardRange, Future[None]]] = deque()
        for shard in wanted:
            computed = _compute(rows, shard, source, next(memory))
            behind.append((shard, disk.submit(writer.write_shard, shard, computed)))
            if len(behind) > _WRITTEN_AT_ONCE:
                yield _written(*behind.popleft())
        while behind:
            yield _written(*behind.popleft())


def _written(shard: ShardRange, future: Future[None]) -> ShardRange:
    future.result()  # raises what the writing raised
    return shard


def write_shard(rows: StoreRows, source: RowSource, writer: StoreWriter, shard: ShardRange) -> None:
    """Compute and write one shard."""
    writer.write_shard(shard, _compute(rows, shard, source, _memory([writer.specs[shard.group]])))


def _memory(specs: Iterable[GroupSpec]) -> list[torch.Tensor]:
    """Allocate a buffer for each array of any shard; allocating one per shard would cost as much as filling it."""
    memory: list[torch.Tensor] = []
    for first, *others in zip(*(spec.arrays.values() for spec in specs), strict=True):
        n_rows = max(len(spec.shard_range(0)) for spec in (first, *others))
        memory.append(torch.empty((n_rows, first.seq_len, first.d_model), dtype=first.torch_dtype))
    return memory


def _compute(
    rows: StoreRows, shard: ShardRange, source: RowSource, memory: list[torch.Tensor]
) -> torch.Tensor | Quantised:
    """Return the rows of a shard as they are stored, in `memory`."""
    stored = [room[: shard.n_rows] for room in memory]
    sequence_ids, views = rows.index(shard.group)
    for first, last in _runs(views, shard.first_row, shard.first_row + shard.n_rows):
        part = source.rows(sequence_ids[first:last], int(views[first]))
        encoded = (part,) if rows.channels is None else quantise(part, rows.dtype, rows.channels)
        for out, tensor in zip(stored, encoded, strict=True):
            if tensor.shape != (last - first, *out.shape[1:]):  # assignment would broadcast it
                found, each = tuple(tensor.shape), tuple(out.shape[1:])
                raise ValueError(f"{shard}: rows {first}..{last} came as {found}, not {each} each")
            out[first - shard.first_row : last - shard.first_row] = tensor.cpu()
    return stored[0] if rows.channels is None else Quantised(*stored)


def _runs(views: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut start .. stop into runs of one view and of bounded length."""
    first = start
    for last in range(start + 1, stop + 1):
        if last == stop or views[last] != views[first] or last - first == _SEQUENCES_AT_ONCE:
            yield first, last
            first = last
