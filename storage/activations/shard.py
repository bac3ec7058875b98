"""The bytes of one shard file, as Zarr's `sharding_indexed` codec defines them, and how they are read.

    (chunk data | crc32c of it) * chunks    index of (offset, size) * chunks_per_shard | crc32c of it

All numbers are little-endian; an index entry of two times 2^64 - 1 marks a chunk that does not exist.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/

A shard is read from a file (`ShardFile`) or by byte ranges from an object store (`ShardObject`).
"""

from __future__ import annotations

import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import google_crc32c
import numpy as np
import torch

from storage.activations.format import GroupSpec

if TYPE_CHECKING:
    from storage.place import RangeReader

CRC_BYTES = 4
_ENTRY_BYTES = 16
_NO_CHUNK = np.uint64(2**64 - 1)

crc32c: Final[Callable[[np.ndarray], int]] = google_crc32c.value  # pyright: ignore
"""Checksum of contiguous uint8 `[size]`; takes an array because google_crc32c refuses a writable memoryview."""


class ShardDamageError(Exception):
    """A shard is damaged; the reader turns this into an error with a remedy."""

    def __init__(self, path: Path | str, problem: str) -> None:
        """Keep the path of the shard, and what is wrong with it."""
        super().__init__(path, problem)
        self.path, self.problem = path, problem


class ShardFile:
    """An open shard, closed when the last reference goes, so that one thread may evict it while another reads it.

    A mapping saves a copy per row in the kernel. But reading a part of it that was cut off the file, or that the disk
    lost, kills the process without a message (SIGBUS). `check_size` makes that an error, except for the instant
    between the check and the read; where that is not enough, or memory is too small, the file is not mapped.
    """

    def __init__(self, path: Path, size: int, *, mapped: bool) -> None:
        """Open a file of `size` bytes; raises ShardDamageError if it has another size."""
        self.path, self._size = path, size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self.check_size()
        if size == 0:
            raise ShardDamageError(path, "is empty")
        found = os.fstat(self._fd)
        self.version = found.st_dev, found.st_ino, found.st_mtime_ns
        """Differs if the file was replaced or written to."""
        self._mapping: np.ndarray | None = None
        if mapped:
            self._mapping = np.frombuffer(mmap.mmap(self._fd, size, access=mmap.ACCESS_READ), np.uint8)

    def check_size(self) -> None:
        """Raise ShardDamageError if the file no longer has its sealed size."""
        if (found := os.lseek(self._fd, 0, os.SEEK_END)) != self._size:
            raise ShardDamageError(self.path, f"cut off: {found} bytes, sealed with {self._size}")

    def checked_mapping(self) -> np.ndarray:
        """Return all bytes of a mapped file, uint8 `[size]`, after `check_size`."""
        self.check_size()
        return cast("np.ndarray", self._mapping)

    def will_need(self, offsets: list[int], n_bytes: int) -> ShardFile:
        """Ask the kernel to begin fetching some ranges, and return what to read them from."""
        for offset in offsets:
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_WILLNEED)
        return self

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fill uint8 `out` with the bytes at `offset`; raises ShardDamageError if the file is too short."""
        if self._mapping is not None:
            np.copyto(out, self._mapping[offset : offset + out.nbytes])
        else:
            self._fill([out], offset)

    def read_checked(self, out: np.ndarray, offset: int, what: str) -> int:
        """Fill `out`, compare it with the checksum that follows it, and return that.

        Raises:
            ShardDamageError: The file is too short, or the checksum of `what` differs.
        """
        if self._mapping is not None:
            end = offset + out.nbytes
            np.copyto(out, self._mapping[offset:end])
            crc = self._mapping[end : end + CRC_BYTES]
        else:
            crc = np.empty(CRC_BYTES, np.uint8)
            self._fill([out, crc], offset)
        if (found := crc32c(out)) != int.from_bytes(crc, "little"):
            raise ShardDamageError(self.path, f"the checksum of {what} differs from its bytes")
        return found

    def _fill(self, buffers: list[np.ndarray], offset: int) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        if (got := os.preadv(self._fd, [buffer.data for buffer in buffers], offset)) != wanted:
            raise ShardDamageError(self.path, f"cut off: {got} of {wanted} bytes at offset {offset}")


class ShardObject:
    """A shard in an object store, with the same methods as `ShardFile`.

    An object is replaced as a whole or not at all, and its size is compared when the store is opened.
    """

    def __init__(self, remote: RangeReader, pool: Executor, name: str) -> None:
        """Name the shard, which the threads of `pool` will fetch; nothing is requested yet."""
        self.path = remote.uri(name)
        self._remote, self._pool, self._name = remote, pool, name

    def check_size(self) -> None:
        """Do nothing: an object that is too short is noticed when it is read."""

    def will_need(self, offsets: list[int], n_bytes: int) -> ShardObject:
        """Begin to fetch some ranges, and return what to read them from."""
        wanted = sorted(set(offsets))
        return _PrefetchedShard(self, wanted, n_bytes, self._pool.submit(self._fetch, wanted, n_bytes))

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fill uint8 `out` with the bytes at `offset`; raises ShardDamageError if there are too few."""
        np.copyto(out, self._bytes(offset, out.nbytes))

    def read_checked(self, out: np.ndarray, offset: int, what: str) -> int:
        """Do what `ShardFile.read_checked` does."""
        found = self._bytes(offset, out.nbytes + CRC_BYTES)
        np.copyto(out, found[:-CRC_BYTES])
        if (crc := crc32c(out)) != int.from_bytes(found[-CRC_BYTES:], "little"):
            raise ShardDamageError(self.path, f"the checksum of {what} differs from its bytes")
        return crc

    def _bytes(self, offset: int, n_bytes: int) -> np.ndarray:
        (found,) = self._fetch([offset], n_bytes)
        return self._complete(found, offset, n_bytes)

    def _fetch(self, offsets: list[int], n_bytes: int) -> list[np.ndarray]:
        try:
            return self._remote.ranges(self._name, offsets, n_bytes)
        except FileNotFoundError:
            raise ShardDamageError(self.path, "is missing from a sealed artifact") from None

    def _complete(self, found: np.ndarray, offset: int, n_bytes: int) -> np.ndarray:
        if len(found) != n_bytes:
            raise ShardDamageError(self.path, f"cut off: {len(found)} of {n_bytes} bytes at offset {offset}")
        return found


class _PrefetchedShard(ShardObject):
    """A shard of which some ranges have been requested."""

    def __init__(self, shard: ShardObject, offsets: list[int], n_bytes: int, fetched: Future[list[np.ndarray]]) -> None:
        super().__init__(shard._remote, shard._pool, shard._name)
        self._offsets, self._n_bytes, self._fetched = offsets, n_bytes, fetched

    def _bytes(self, offset: int, n_bytes: int) -> np.ndarray:
        place = bisect_right(self._offsets, offset) - 1
        start = offset - self._offsets[place] if place >= 0 else self._n_bytes
        if start + n_bytes > self._n_bytes:  # not among the requested ranges
            return super()._bytes(offset, n_bytes)
        return self._complete(self._fetched.result()[place][start : start + n_bytes], offset, n_bytes)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """View a contiguous CPU tensor `[n, ...]` as uint8 `[n, bytes]` without a copy."""
    return tensor.view(torch.uint8).numpy().reshape(len(tensor), tensor[:1].nbytes)


def shard_file_bytes(spec: GroupSpec, n_rows: int) -> int:
    """Return the file size of a shard of `n_rows` rows."""
    n_chunks = -(-n_rows // spec.rows_per_chunk)
    return n_chunks * (spec.chunk_bytes + CRC_BYTES) + spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES


def encode_shard(spec: GroupSpec, rows: torch.Tensor, shard: np.ndarray) -> np.ndarray:
    """Fill uint8 `[shard_file_bytes]` with the file of one shard, and return the crc32c of its chunks, uint32.

    `rows` are `[n, T, D]`, contiguous, on the CPU, with 1 <= n <= rows_per_shard. Padding is the fill value.
    """
    data = bytes_of(rows)
    whole, rest = divmod(len(data), spec.rows_per_chunk)
    n_chunks = whole + bool(rest)
    stride = spec.chunk_bytes + CRC_BYTES
    body = shard[: n_chunks * stride].reshape(n_chunks, stride)
    chunks = body[:, : spec.chunk_bytes]
    n_whole_rows = whole * spec.rows_per_chunk
    chunks[:whole] = data[:n_whole_rows].reshape(whole, spec.chunk_bytes)
    if rest:
        last = chunks[whole].reshape(spec.rows_per_chunk, spec.row_bytes)
        last[:rest] = data[n_whole_rows:]
        last[rest:] = bytes_of(torch.full_like(rows[:1], spec.fill_value))
    crcs = np.array([crc32c(chunk) for chunk in chunks], "<u4")
    body[:, spec.chunk_bytes :] = crcs.view(np.uint8).reshape(n_chunks, CRC_BYTES)

    entries = np.full((spec.chunks_per_shard, 2), _NO_CHUNK, "<u8")
    entries[:n_chunks, 0] = np.arange(n_chunks) * stride
    entries[:n_chunks, 1] = stride
    index = entries.view(np.uint8).reshape(-1)
    shard[body.size : -CRC_BYTES] = index
    shard[-CRC_BYTES:] = np.array([crc32c(index)], "<u4").view(np.uint8)
    return crcs


def read_offsets(file: ShardFile | ShardObject, size: int, spec: GroupSpec, n_chunks: int) -> np.ndarray:
    """Read the index of a shard of `size` bytes, and return the offsets of its `n_chunks` chunks: int64 `[n_chunks]`.

    Raises:
        ShardDamageError: The index is cut off, damaged, or lacks a chunk.
    """
    start = size - (spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES)
    if start < 0:
        raise ShardDamageError(file.path, f"{size} bytes are too few to hold an index")
    raw = np.empty(size - start - CRC_BYTES, np.uint8)
    file.read_checked(raw, start, "the index")
    entries = raw.view("<u8").reshape(-1, 2)[:n_chunks]
    stride = spec.chunk_bytes + CRC_BYTES
    # Offsets are compared with a difference, because a sum could overflow.
    bad = (entries[:, 1] != stride) | (entries[:, 0] > max(start - stride, 0))
    if bad.any():
        slot = int(bad.argmax())
        offset, n_bytes = (int(x) for x in entries[slot])
        absent = offset == n_bytes == int(_NO_CHUNK)
        what = "is not there" if absent else f"is said to be {n_bytes} bytes at offset {offset}"
        raise ShardDamageError(file.path, f"chunk {slot} {what}; expected {stride} bytes before offset {start}")
    return entries[:, 0].astype(np.int64)
