"""Rows of bytes in the shards of one array, checked when they are due."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import groupby
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np

from storage.activations.buffers import crc32c
from storage.activations.format import GroupSpec
from storage.activations.shard import CRC_BYTES, ShardDamageError, ShardFile, ShardObject, read_offsets

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
        self._rows_per_chunk, self._chunks_per_shard = spec.rows_per_chunk, spec.chunks_per_shard
        # Of every chunk: its place in the shard, -1 until the shard's index is read; its sealed checksum, -1 until
        # it is known; whether it was read before, which with `first_touch` says that it was found whole.
        self._offsets = np.full(spec.n_chunks, -1, np.int64)
        self._crcs = np.full(spec.n_chunks, -1, np.int64)
        self._seen = np.zeros(spec.n_chunks, np.bool_)

        # Not a bound method: without a cycle the files close as soon as the array is dropped.
        versions: dict[int, tuple[int, int, int]] = {}
        seen, per_shard = self._seen, spec.chunks_per_shard

        def open_shard(shard: int) -> Shard:
            if object_of:
                return object_of(shard)
            file = ShardFile(path_of(shard), sizes[shard], mapped=mapped)
            if versions.setdefault(shard, file.version) != file.version:  # what was seen was another's
                versions[shard] = file.version
                seen[shard * per_shard : (shard + 1) * per_shard] = False
            return file

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
        chunks = rows if self._rows_per_chunk == 1 else rows // self._rows_per_chunk
        if not self._mapped or np.count_nonzero(self._seen[chunks]) < len(chunks):
            self._fetch(rows, chunks, out)
        elif self._check != "always":
            self._copy(rows, chunks, out)
        elif self._rows_per_chunk == 1:
            self._copy_checked(chunks, out)
        else:
            self._fetch(rows, chunks, out)

    def _copy(self, rows: np.ndarray, chunks: np.ndarray, out: np.ndarray) -> None:
        """Copy rows that are mapped and need no check.

        A batch takes a millisecond, and its bytes throw the interpreter out of the caches: two calls more for every row
        were a tenth of the speed.
        """
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        mappings = self._mappings(shards)
        if np.count_nonzero(self._seen[chunks]) < len(chunks):  # one was opened anew, and is another
            self._fetch(rows, chunks, out)
            return
        offsets, n_bytes, copy = self._offsets_of(rows, chunks), self._spec.row_bytes, np.copyto
        for row, shard, offset in zip(out, shards, offsets, strict=True):
            copy(row, mappings[shard][offset : offset + n_bytes])

    def _copy_checked(self, chunks: np.ndarray, out: np.ndarray) -> None:
        """Copy rows that are mapped and chunks of their own, compared with the checksum found when first read.

        Each is compared where it arrives, while the processor still has it at hand.
        """
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        mappings = self._mappings(shards)
        offsets, n_bytes, copy = self._offsets[chunks].tolist(), self._spec.row_bytes, np.copyto
        for row, shard, offset, crc in zip(out, shards, offsets, self._crcs[chunks].tolist(), strict=True):
            copy(row, mappings[shard][offset : offset + n_bytes])
            if crc32c(row) != crc:
                self._fetch(chunks, chunks, out)  # says which, and raises
                return

    def _mappings(self, shards: list[int]) -> dict[int, np.ndarray]:
        return {shard: cast("ShardFile", self._open(shard)).mapping_now() for shard in set(shards)}

    def _fetch(self, rows: np.ndarray, chunks: np.ndarray, out: np.ndarray) -> None:
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        files = self._announced(chunks, {shard: self._whole(shard) for shard in set(shards)})
        due = self._due(chunks)
        if self._rows_per_chunk == 1:
            self._fetch_due(chunks, np.flatnonzero(due), files, out)
        else:
            self._fetch_due_shared(chunks, rows % self._rows_per_chunk, np.flatnonzero(due), files, out)
        offsets = self._offsets_of(rows, chunks)
        for place in np.flatnonzero(~due).tolist():
            files[shards[place]].read(out[place], offsets[place])
        self._seen[chunks] = True

    def _offsets_of(self, rows: np.ndarray, chunks: np.ndarray) -> list[int]:
        """Where rows begin in their shards, whose indices are read."""
        first = self._offsets[chunks]
        if self._rows_per_chunk > 1:
            first += rows % self._rows_per_chunk * self._spec.row_bytes
        return first.tolist()

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
        first = shard * self._chunks_per_shard
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
            wanted.setdefault(chunk // self._chunks_per_shard, []).append(offset)
        return files | {shard: files[shard].will_need(offsets, n_bytes) for shard, offsets in wanted.items()}

    def _due(self, chunks: np.ndarray) -> np.ndarray:
        """Whose checksum is to be compared: bool `[B]`."""
        if self._check == "first_touch":
            return ~self._seen[chunks]
        return np.full(len(chunks), self._check == "always")

    def _fetch_due(self, chunks: np.ndarray, places: np.ndarray, files: dict[int, Shard], out: np.ndarray) -> None:
        """Fill rows that are chunks of their own, compared with their checksums."""
        for place, chunk in zip(places.tolist(), chunks[places].tolist(), strict=True):
            self._fetch_chunk(chunk, files, out[place])

    def _fetch_due_shared(
        self, chunks: np.ndarray, within: np.ndarray, places: np.ndarray, files: dict[int, Shard], out: np.ndarray
    ) -> None:
        """Copy rows out of chunks of several, each fetched whole, once, and compared with its checksum."""
        row_bytes = self._spec.row_bytes
        data = np.empty(self._spec.chunk_bytes, np.uint8)
        by_chunk = places[np.argsort(chunks[places], kind="stable")].tolist()
        for chunk, wanted in groupby(by_chunk, key=chunks.__getitem__):
            self._fetch_chunk(int(chunk), files, data)
            for place in wanted:
                first = within[place] * row_bytes
                out[place] = data[first : first + row_bytes]

    def _fetch_chunk(self, chunk: int, files: dict[int, Shard], out: np.ndarray) -> None:
        shard, slot = divmod(chunk, self._chunks_per_shard)
        crc = files[shard].read_checked(out, self._offsets.item(chunk), f"chunk {slot}")
        if self._crcs.item(chunk) == -1:
            self._crcs[chunk] = crc
        elif self._crcs.item(chunk) != crc:
            problem = f"chunk {slot} is whole, but not the one that was sealed here"
            raise ShardDamageError(files[shard].path, problem)
