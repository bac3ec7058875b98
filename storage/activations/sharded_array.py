"""Rows of bytes in the shards of one array, checked when they are due."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from storage.activations.format import GroupSpec
from storage.activations.shard import ShardIndex
from storage.activations.shard_file import CRC_BYTES, ShardFile

Check = Literal["first_touch", "always", "never"]

MAX_OPEN_SHARDS: Final = 128
"""Of one array; the limit on open files is often 1,024, and a mapping counts as another."""


@dataclass(frozen=True, slots=True)
class _Touch:
    """What one read wants of one shard: for each chunk, (place in the result, row within the chunk)."""

    file: ShardFile
    index: ShardIndex
    wanted: dict[int, list[tuple[int, int]]]


class ShardedArray:
    """Reads rows of one array. Several threads may do so at once."""

    def __init__(
        self, spec: GroupSpec, path_of: Callable[[int], Path], sizes: list[int], check: Check, *, mapped: bool
    ) -> None:
        """Name the shards; none is opened before it is read.

        Args:
            spec: How rows are cut into chunks and shards.
            path_of: Where a shard lies.
            sizes: Sealed size in bytes of every shard.
            check: When to compare checksums of chunks.
            mapped: Read through mappings.
        """
        self._spec, self._sizes, self._check, self._mapped = spec, sizes, check, mapped
        self._indices: dict[int, ShardIndex] = {}
        self._indexing = threading.Lock()

        # Not a bound method: without a cycle the files close as soon as the array is dropped.
        def open_shard(shard: int) -> ShardFile:
            return ShardFile(path_of(shard), sizes[shard], mapped=mapped)

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
        touches = self._touches(rows)
        for touch in touches:  # all that is new is on its way from the disk before the first of it is waited for
            self._announce(touch)
        for touch in touches:
            touch.file.check_size()
            for slot, wanted in touch.wanted.items():
                self._read_chunk(touch, slot, wanted, out)

    def close(self) -> None:
        """Close all files; a later read opens them anew."""
        self._open.cache_clear()

    def _touches(self, rows: np.ndarray) -> list[_Touch]:
        """In the order of the files, so that rows of one chunk are read together."""
        chunk_of: list[int] = (rows // self._spec.rows_per_chunk).tolist()
        row_of: list[int] = (rows % self._spec.rows_per_chunk).tolist()
        touches: dict[int, _Touch] = {}
        for place in np.argsort(rows, kind="stable").tolist():
            shard, slot = divmod(chunk_of[place], self._spec.chunks_per_shard)
            if shard not in touches:
                touches[shard] = _Touch(self._open(shard), self._index(shard), {})
            touches[shard].wanted.setdefault(slot, []).append((place, row_of[place]))
        return list(touches.values())

    def _announce(self, touch: _Touch) -> None:
        for slot in touch.wanted:
            if not (self._mapped and touch.index.seen[slot]):  # if all fits into memory, what was read before is there
                touch.file.will_need(touch.index.offsets[slot], self._spec.chunk_bytes + CRC_BYTES)

    def _read_chunk(self, touch: _Touch, slot: int, wanted: list[tuple[int, int]], out: np.ndarray) -> None:
        file, offset, what, row_bytes = touch.file, touch.index.offsets[slot], f"chunk {slot}", self._spec.row_bytes
        if self._check == "never" or (self._check == "first_touch" and touch.index.seen[slot]):
            for place, row in wanted:
                file.read(out[place], offset + row * row_bytes, what)
        else:
            # A chunk of one row is read to where it belongs, and only copied if it was asked for twice.
            alone = self._spec.rows_per_chunk == 1
            chunk = out[wanted[0][0]] if alone else np.empty(self._spec.chunk_bytes, np.uint8)
            file.read_checked(chunk, offset, what)
            for place, row in wanted[1:] if alone else wanted:
                out[place] = chunk[row * row_bytes : (row + 1) * row_bytes]
        touch.index.seen[slot] = True

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, read at its first touch and kept for as long as the array."""
        if (known := self._indices.get(shard)) is not None:
            return known
        index = ShardIndex(self._open(shard), self._sizes[shard], self._spec, self._spec.chunks_in_shard(shard))
        with self._indexing:  # another thread may have been first, and have seen chunks
            return self._indices.setdefault(shard, index)
