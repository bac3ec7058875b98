"""Fill a store with rows from any source, resuming where an interrupted attempt stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise_core.config.schema import StreamDtype
from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.errors import StageInterruptedError, size
from stackwise_core.failpoints import failpoint
from stackwise_core.model.stream import ChannelStatistics, Quantised, quantise
from stackwise_core.objectives.batches import prefetched
from stackwise_core.objectives.trunk_activations import ReadingSource, RowSource
from storage.activations.format import GROUPS, Group, GroupSpec
from storage.activations.reader import empty_pinned
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


WriteShards = Callable[[StoreWriter, Sequence[ShardRange], Callable[[], bool]], Generator[ShardRange]]
"""Writes shards in this order, and yields each once it is on the disk; before it computes one, it asks the function
whether to stop."""


def fill_store(
    write: WriteShards,
    folder: Path,
    rows: StoreRows,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    """Write every missing shard of a store in a work folder.

    After every shard, `on_progress` gets (bytes on disk, bytes in all), and `should_stop` is asked. If it returns True,
    `write` computes no further shard, but still writes those that it has computed.

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
    with closing(write(writer, missing, lambda: stopping)) as written:  # it ends before the folder's lock is released
        for number, shard in enumerate(written, 1):
            done += shard.n_rows * specs[shard.group].stored_row_bytes
            on_progress(done, total)
            failpoint("cache", number)
            stopping = stopping or should_stop()
    if done < total:
        cached = f"{size(done)} of {size(total)} cached"
        raise StageInterruptedError(f"stopped on request with {cached}; run the same command to go on")
    counts = {f"{group}_rows": spec.rows for group, spec in specs.items()}
    counts["store_bytes"] = total + sum(statistic.nbytes for statistic in rows.channels or ()) * len(specs)
    return counts, writer.files()


def write_shards(
    rows: StoreRows,
    source: RowSource,
    writer: StoreWriter,
    missing: Sequence[ShardRange],
    stopping: Callable[[], bool],
    *,
    pinned: bool = False,
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> Generator[ShardRange]:
    """Compute shards in reused buffers, and write each while the next is computed; see `WriteShards`.

    What a `ReadingSource` computes next is read meanwhile. `pinned` buffers are for rows that a CUDA device computes.
    `on_rows` gets the number of rows of each part that was computed.
    """
    memory = cycle([_memory(writer.specs.values(), pinned) for _ in range(_WRITTEN_AT_ONCE + 1)])
    with closing(_parts(rows, source, missing)) as parts, ThreadPoolExecutor(_WRITTEN_AT_ONCE) as disk:
        behind: deque[tuple[ShardRange, Future[None]]] = deque()
        for shard in takewhile(lambda _: not stopping(), missing):
            computed = _compute(rows, shard, parts, next(memory), on_rows)
            behind.append((shard, disk.submit(writer.write_shard, shard, computed)))
            if len(behind) > _WRITTEN_AT_ONCE:
                yield _written(*behind.popleft())
        while behind:
            yield _written(*behind.popleft())


def _written(shard: ShardRange, future: Future[None]) -> ShardRange:
    future.result()  # raises what the writing raised
    return shard


def write_shard(
    rows: StoreRows, source: RowSource, writer: StoreWriter, shard: ShardRange, *, pinned: bool = False
) -> None:
    """Compute and write one shard."""
    with closing(_parts(rows, source, [shard])) as parts:
        writer.write_shard(shard, _compute(rows, shard, parts, _memory([writer.specs[shard.group]], pinned)))


def _memory(specs: Iterable[GroupSpec], pinned: bool) -> list[torch.Tensor]:
    """Allocate a buffer for each array of any shard; allocating one per shard would cost as much as filling it."""
    memory: list[torch.Tensor] = []
    for first, *others in zip(*(spec.arrays.values() for spec in specs), strict=True):
        n_rows = max(len(spec.shard_range(0)) for spec in (first, *others))
        shape = n_rows, first.seq_len, first.d_model
        memory.append(empty_pinned(shape, first.torch_dtype) if pinned else torch.empty(shape, dtype=first.torch_dtype))
    return memory


_Part = tuple[ShardRange, int, int, Callable[[], torch.Tensor]]
"""A shard, the first and the last row + 1 of a part of it, and what computes the part."""


def _parts(rows: StoreRows, source: RowSource, shards: Iterable[ShardRange]) -> Generator[_Part]:
    """Yield the parts of shards; what the next one is computed from is read in a thread meanwhile."""

    def parts() -> Iterator[_Part]:
        for shard in shards:
            sequence_ids, views = rows.index(shard.group)
            for first, last in _runs(views, shard.first_row, shard.first_row + shard.n_rows):
                which = sequence_ids[first:last], int(views[first])
                compute = source.read(*which) if isinstance(source, ReadingSource) else partial(source.rows, *which)
                yield shard, first, last, compute

    return prefetched(parts(), 1)


def _compute(
    rows: StoreRows,
    shard: ShardRange,
    parts: Iterator[_Part],
    memory: list[torch.Tensor],
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> torch.Tensor | Quantised:
    """Return the rows of a shard, whose parts come next, as they are stored, in `memory`."""
    stored = [room[: shard.n_rows] for room in memory]
    last, end = shard.first_row, shard.first_row + shard.n_rows
    while last < end:
        of, first, last, compute = next(parts)
        assert of == shard
        part = compute()
        encoded = (part,) if rows.channels is None else quantise(part, rows.dtype, rows.channels)
        for out, tensor in zip(stored, encoded, strict=True):
            if tensor.shape != (last - first, *out.shape[1:]):  # assignment would broadcast it
                found, each = tuple(tensor.shape), tuple(out.shape[1:])
                raise ValueError(f"{shard}: rows {first}..{last} came as {found}, not {each} each")
            place = out[first - shard.first_row : last - shard.first_row]
            place.copy_(_rounded(tensor, out.dtype), non_blocking=True)
        on_rows(last - first)
        if last == end and part.is_cuda:
            torch.cuda.current_stream(part.device).synchronize()  # all parts have come
    return stored[0] if rows.channels is None else Quantised(*stored)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows in the type that is stored, if they have to cross a bus; on a CPU the copy rounds them."""
    return tensor if tensor.device.type == "cpu" else tensor.to(dtype)


def _runs(views: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut start .. stop into runs of one view and of bounded length."""
    first = start
    for last in range(start + 1, stop + 1):
        if last == stop or views[last] != views[first] or last - first == _SEQUENCES_AT_ONCE:
            yield first, last
            first = last
