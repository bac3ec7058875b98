"""Reads rows, as bytes, from the shards of one array and verifies checksums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import groupby
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np

from storage.activations.format import GroupSpec
from storage.activations.shard import (
    CRC_BYTES,
    ShardDamageError,
    ShardFile,
    ShardObject,
    crc32c,
    read_offsets,
)

Check = Literal["first_touch", "always", "never"]
"""When the checksum of a chunk is verified."""
Shard = ShardFile | ShardObject

MAX_OPEN_SHARDS: Final = 128
"""Per array. The limit on open files is often 1,024, and a mapping counts as another one."""


class ShardedArray:
    """Reads rows of one array; safe to use from several threads."""

    def __init__(
        self,
        spec: GroupSpec,
        folder: Path,
        shards: dict[str, int],
        checksums_of: Callable[[int], np.ndarray],
        check: Check,
        *,
        mapped: bool,
        object_of: Callable[[str], ShardObject] | None,
    ) -> None:
        """Describe an array of `shards`, in order {path in the folder: sealed size}; each is opened when first read.

        `checksums_of` returns the sealed crc32c of every chunk of a shard, or an empty array if they are unknown.
        `object_of`, if given, returns a shard that is in an object store and not in the folder.
        """
        self._spec, self._sizes, self._check, self._mapped = spec, list(shards.values()), check, mapped
        self._checksums_of = checksums_of
        self._rows_per_chunk, self._chunks_per_shard = spec.rows_per_chunk, spec.chunks_per_shard
        # For every chunk: its offset in the shard, -1 until the shard's index is read; its sealed checksum, -1 until
        # it is known; whether it was read before, which with `first_touch` means that its checksum was right.
        self._offsets = np.full(spec.n_chunks, -1, np.int64)
        self._crcs = np.full(spec.n_chunks, -1, np.int64)
        self._seen = np.zeros(spec.n_chunks, np.bool_)

        # Not a bound method: without a reference cycle, files close as soon as the array is dropped.
        versions: dict[int, tuple[int, int, int]] = {}
        seen, per_shard = self._seen, spec.chunks_per_shard
        names, sizes = list(shards), self._sizes

        def open_shard(shard: int) -> Shard:
            if object_of:
                return object_of(names[shard])
            file = ShardFile(folder / names[shard], sizes[shard], mapped=mapped)
            if versions.setdefault(shard, file.version) != file.version:  # replaced since its chunks were verified
                versions[shard] = file.version
                seen[shard * per_shard : (shard + 1) * per_shard] = False
            return file

        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(open_shard)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of these indices, int64 `[B]`, into uint8 `[B, row_bytes]`, which is undefined after an error.

        Raises:
            ShardDamageError: A shard differs from what was sealed.
            FileNotFoundError: A shard is missing.
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
        """Copy rows that are mapped and need no verification.

        A batch takes a millisecond, and its bytes evict the interpreter from the processor's caches: two more calls per
        row cost a tenth of the speed.
        """
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        mappings = self._mappings(shards)
        if np.count_nonzero(self._seen[chunks]) < len(chunks):  # a shard was reopened and has been replaced
            self._fetch(rows, chunks, out)
            return
        offsets, n_bytes, copy = self._offsets_of(rows, chunks), self._spec.row_bytes, np.copyto
        for row, shard, offset in zip(out, shards, offsets, strict=True):
            copy(row, mappings[shard][offset : offset + n_bytes])

    def _copy_checked(self, chunks: np.ndarray, out: np.ndarray) -> None:
        """Copy rows that are mapped and one chunk each, verifying each in `out`, while the processor has it cached."""
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        mappings = self._mappings(shards)
        offsets, n_bytes, copy = self._offsets[chunks].tolist(), self._spec.row_bytes, np.copyto
        for row, shard, offset, crc in zip(out, shards, offsets, self._crcs[chunks].tolist(), strict=True):
            copy(row, mappings[shard][offset : offset + n_bytes])
            if crc32c(row) != crc:
                self._fetch(chunks, chunks, out)  # raises, and names the chunk
                return

    def _mappings(self, shards: list[int]) -> dict[int, np.ndarray]:
        return {shard: cast("ShardFile", self._open(shard)).checked_mapping() for shard in set(shards)}

    def _fetch(self, rows: np.ndarray, chunks: np.ndarray, out: np.ndarray) -> None:
        shards: list[int] = (chunks // self._chunks_per_shard).tolist()
        files = self._prefetched(chunks, {shard: self._opened(shard) for shard in set(shards)})
        due = ~self._seen[chunks] if self._check == "first_touch" else np.full(len(chunks), self._check == "always")
        places = np.flatnonzero(due)
        if self._rows_per_chunk == 1:
            for place, chunk in zip(places.tolist(), chunks[places].tolist(), strict=True):
                self._fetch_chunk(chunk, files, out[place])
        else:
            self._fetch_from_chunks(chunks, rows % self._rows_per_chunk, places, files, out)
        offsets = self._offsets_of(rows, chunks)
        for place in np.flatnonzero(~due).tolist():
            files[shards[place]].read(out[place], offsets[place])
        self._seen[chunks] = True

    def _offsets_of(self, rows: np.ndarray, chunks: np.ndarray) -> list[int]:
        """Offsets of rows in their shards, whose indices have been read."""
        first = self._offsets[chunks]
        if self._rows_per_chunk > 1:
            first += rows % self._rows_per_chunk * self._spec.row_bytes
        return first.tolist()

    def read_indices(self, pool: Executor) -> None:
        """Read the indices of all shards in parallel; raises as `read` does."""
        for _ in pool.map(self._opened, range(len(self._sizes))):
            pass

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        self._open.cache_clear()

    def _opened(self, shard: int) -> Shard:
        """Open a shard, check its size, and read its index."""
        file = self._open(shard)
        file.check_size()
        first = shard * self._chunks_per_shard
        if self._offsets[first] < 0:  # harmless if several threads do it: all write the same numbers
            n_chunks = self._spec.chunks_in_shard(shard)
            known = self._checksums_of(shard)
            self._crcs[first : first + n_chunks] = known if len(known) else -1
            self._offsets[first : first + n_chunks] = read_offsets(file, self._sizes[shard], self._spec, n_chunks)
        return file

    def _prefetched(self, chunks: np.ndarray, files: dict[int, Shard]) -> dict[int, Shard]:
        """Request all new chunks at once instead of waiting for one after another."""
        new = chunks[~self._seen[chunks]] if self._mapped else chunks  # a mapped store fits into memory: seen is cached
        n_bytes = self._spec.chunk_bytes + CRC_BYTES
        wanted: dict[int, list[int]] = {}
        for chunk, offset in zip(new.tolist(), self._offsets[new].tolist(), strict=True):
            wanted.setdefault(chunk // self._chunks_per_shard, []).append(offset)
        return files | {shard: files[shard].will_need(offsets, n_bytes) for shard, offsets in wanted.items()}

    def _fetch_from_chunks(
        self, chunks: np.ndarray, within: np.ndarray, places: np.ndarray, files: dict[int, Shard], out: np.ndarray
    ) -> None:
        """Fill `out[places]` from chunks of several rows, each fetched and verified once."""
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
            problem = f"chunk {slot} is intact, but not the one that was sealed here"
            raise ShardDamageError(files[shard].path, problem)
