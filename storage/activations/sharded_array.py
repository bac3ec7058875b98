"""Rows of bytes in the shards of one array, checked when they are due."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import groupby
from pathlib import Path
from typing import Final, Literal

import numpy as np

from storage.activations.format import GroupSpec
from storage.activations.shard import read_offsets
from storage.activations.shard_file import CRC_BYTES, ShardDamageError, ShardFile
from storage.activations.shard_object import ShardObject

Check = Literal["first_touch", "always", "never"]
Shard = ShardFile | ShardObject

MAX_OPEN_SHARDS: Final = 128
"""Of one array; the limit on open files is often 1,024, and a mapping counts as another."""


class ShardedArray:
    """Reads rows of one array. Several threads may do so at once."""

    def __init__(
        self,
        spec: GroupSpec,
        path_of: Callable[[int], Path],
        sizes: list[int],
        checksums_of: Callable[[int], np.ndarray],
        check: Check,
        *,
        mapped: bool,
        object_of: Callable[[int], ShardObject] | None = None,
    ) -> None:
        """Name the shards; none is opened before it is read.

        Args:
            spec: How rows are cut into chunks and shards.
            path_of: Where a shard lies.
            sizes: Sealed size in bytes of every shard.
            checksums_of: Sealed crc32c of every chunk of a shard, or an empty array if they are not known.
            check: When to compare checksums of chunks.
            mapped: Read through mappings.
            object_of: A shard in an object store; without it shards are files at `path_of`.
        """
        self._spec, self._sizes, self._check, self._mapped = spec, sizes, check, mapped
        self._checksums_of = checksums_of
        # Of every chunk: its place in the shard, -1 until the shard's index is read; its sealed checksum, -1 if not
        # known; whether it was read before, which with `first_touch` says that it was found whole.
        self._offsets = np.full(spec.n_chunks, -1, np.int64)
        self._crcs = np.full(spec.n_chunks, -1, np.int64)
        self._seen = np.zeros(spec.n_chunks, np.bool_)

        # Not a bound method: without a cycle the files close as soon as the array is dropped.
        def open_shard(shard: int) -> Shard:
            return object_of(shard) if object_of else ShardFile(path_of(shard), sizes[shard], mapped=mapped)

        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(open_shard)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy some rows.

        Args:
            rows: int64 `[B]`, each in the array; in any order.
            out: uint8 `[B, row_bytes]`, filled; undefined after an error.

        Raises:
            ShardDamageError: A shard is not what was sealed.
            FileNotFoundError: A shard is not there.
        """
        chunks, within = np.divmod(rows, self._spec.rows_per_chunk)
        shards: list[int] = (chunks // self._spec.chunks_per_shard).tolist()
        files = self._announced(chunks, {shard: self._whole(shard) for shard in set(shards)})
        due = self._due(chunks)
        if due.any():
            self._read_due(chunks, within, np.flatnonzero(due), files, out)
        # A batch is read some thousand times a second: what follows takes a microsecond a row, and the copy.
        offsets: list[int] = (self._offsets[chunks] + within * self._spec.row_bytes).tolist()
        for place in np.flatnonzero(~due).tolist():
            files[shards[place]].read(out[place], offsets[place])
        self._seen[chunks] = True

    def read_indices(self, pool: Executor) -> None:
        """Read the indices of all shards side by side, and so make sure that every shard is there.

        Raises:
            ShardDamageError: One is not what was sealed.
        """
        for _ in pool.map(self._whole, range(len(self._sizes))):
            pass

    def close(self) -> None:
        """Close all files; a later read opens them anew."""
        self._open.cache_clear()

    def _whole(self, shard: int) -> Shard:
        """A shard in its size, its index read."""
        file = self._open(shard)
        file.check_size()
        first = shard * self._spec.chunks_per_shard
        if self._offsets[first] < 0:  # of several threads each would write the same numbers
            n_chunks = self._spec.chunks_in_shard(shard)
            known = self._checksums_of(shard)
            self._crcs[first : first + n_chunks] = known if len(known) else -1
            self._offsets[first : first + n_chunks] = read_offsets(file, self._sizes[shard], self._spec, n_chunks)
        return file

    def _announced(self, chunks: np.ndarray, files: dict[int, Shard]) -> dict[int, Shard]:
        """Let all that is new come at once, and not one after another as each is waited for."""
        new = chunks[~self._seen[chunks]] if self._mapped else chunks  # if all fits into memory, what was seen is there
        n_bytes = self._spec.chunk_bytes + CRC_BYTES
        wanted: dict[int, list[int]] = {}
        for chunk, offset in zip(new.tolist(), self._offsets[new].tolist(), strict=True):
            wanted.setdefault(chunk // self._spec.chunks_per_shard, []).append(offset)
        return files | {shard: files[shard].will_need(offsets, n_bytes) for shard, offsets in wanted.items()}

    def _due(self, chunks: np.ndarray) -> np.ndarray:
        """Whose checksum is to be compared: bool `[B]`."""
        if self._check == "first_touch":
            return ~self._seen[chunks]
        return np.full(len(chunks), self._check == "always")

    def _read_due(
        self, chunks: np.ndarray, within: np.ndarray, places: np.ndarray, files: dict[int, Shard], out: np.ndarray
    ) -> None:
        """Copy rows out of chunks that are read whole, once each, and compared with their checksums."""
        row_bytes = self._spec.row_bytes
        by_chunk = places[np.argsort(chunks[places], kind="stable")].tolist()
        for chunk, group in groupby(by_chunk, key=chunks.__getitem__):
            wanted = list(group)
            # A chunk of one row is read to where it belongs, and only copied if it was asked for twice.
            alone = self._spec.rows_per_chunk == 1
            data = out[wanted[0]] if alone else np.empty(self._spec.chunk_bytes, np.uint8)
            shard, slot = divmod(int(chunk), self._spec.chunks_per_shard)
            crc = files[shard].read_checked(data, int(self._offsets[chunk]), f"chunk {slot}")
            if self._crcs[chunk] not in (crc, -1):
                problem = f"chunk {slot} is whole, but not the one that was sealed here"
                raise ShardDamageError(files[shard].path, problem)
            for place in wanted[1:] if alone else wanted:
                first = within[place] * row_bytes
                out[place] = data[first : first + row_bytes]
