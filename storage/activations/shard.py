"""The bytes of one shard file, as Zarr's `sharding_indexed` codec defines them.

    (chunk data | crc32c of it) * chunks    index of (offset, size) * chunks_per_shard | crc32c of it

All numbers are little-endian; an index entry of two times 2^64 - 1 says that there is no such chunk.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/

A shard is read from a file (`ShardFile`) or by ranges from an object store (`ShardObject`); both give bytes that were
there, or raise.
"""

from __future__ import annotations

import mmap
import os
import weakref
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from storage.activations.buffers import bytes_of, crc32c
from storage.activations.format import GroupSpec

if TYPE_CHECKING:
    from storage.place import RangeReader

CRC_BYTES = 4
_ENTRY_BYTES = 16
_NO_CHUNK = np.uint64(2**64 - 1)
_REQUESTS_AT_ONCE = 32


class ShardDamageError(Exception):
    """What is wrong with which shard; the reader adds what to do."""

    def __init__(self, path: Path | str, problem: str) -> None:
        """Remember both."""
        super().__init__(path, problem)
        self.path, self.problem = path, problem


class ShardFile:
    """An open shard, closed when the last reference goes.

    So a thread may go on reading while another evicts the file from the reader's cache.

    A mapping saves the kernel a copy per row. But what is cut off a mapped file, or lost by its disk, kills
    the process without a message (SIGBUS): `check_size` makes that an error for all but the instant between
    the look and the read, and where even that is too much, or memory too small, the file is not mapped.
    """

    def __init__(self, path: Path, size: int, *, mapped: bool) -> None:
        """Open the file for reading.

        Args:
            path: The file.
            size: Its sealed size in bytes, at least 1.
            mapped: Read through a mapping.

        Raises:
            ShardDamageError: The file has another size.
        """
        self.path, self._size = path, size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self.check_size()
        found = os.fstat(self._fd)
        self.version = found.st_dev, found.st_ino, found.st_mtime_ns
        """Another where the file was replaced or written to in between."""
        self._mapping: np.ndarray | None = None
        if mapped:
            self._mapping = np.frombuffer(mmap.mmap(self._fd, size, access=mmap.ACCESS_READ), np.uint8)

    def check_size(self) -> None:
        """Compare the size of the file with what was sealed.

        Raises:
            ShardDamageError: It differs.
        """
        if (found := os.lseek(self._fd, 0, os.SEEK_END)) != self._size:
            raise ShardDamageError(self.path, f"cut off: {found} bytes, sealed with {self._size}")

    def mapping_now(self) -> np.ndarray:
        """All bytes of a mapped file, uint8 `[size]`, that are there at this instant.

        Raises:
            ShardDamageError: The file has another size.
        """
        self.check_size()
        return cast("np.ndarray", self._mapping)

    def will_need(self, offsets: list[int], n_bytes: int) -> ShardFile:
        """Let the kernel begin to fetch some ranges, and return what to read them from, before they are there."""
        for offset in offsets:
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_WILLNEED)
        return self

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fill uint8 `out` with the bytes at `offset`.

        Raises:
            ShardDamageError: The file ends before that.
        """
        if self._mapping is not None:
            np.copyto(out, self._mapping[offset : offset + out.nbytes])
        else:
            self._fill([out], offset)

    def read_checked(self, out: np.ndarray, offset: int, what: str) -> int:
        """Fill `out`, and compare it with the checksum that follows it, which is returned.

        Raises:
            ShardDamageError: The file ends before that, or the checksum differs; `what` names what was read.
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


class ShardObjects:
    """The shards of one store, and the threads that fetch of them."""

    def __init__(self, folder: RangeReader) -> None:
        """Name the store's folder."""
        self.folder = folder
        self.pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "ranges")

    def open(self, name: str) -> ShardObject:
        """Return a shard; nothing is asked yet."""
        return ShardObject(self, name)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class ShardObject:
    """One shard. An object is replaced whole or not at all; sizes are compared when the store is opened."""

    def __init__(self, objects: ShardObjects, name: str) -> None:
        """Name it."""
        self.path = objects.folder.uri(name)
        self._objects, self._name = objects, name

    def check_size(self) -> None:
        """Do nothing: a short object shows when it is read."""

    def will_need(self, offsets: list[int], n_bytes: int) -> ShardObject:
        """Begin to fetch some ranges, and return what to read them from."""
        wanted = sorted(set(offsets))
        coming = self._objects.pool.submit(self._fetch, wanted, n_bytes)
        return _Announced(self._objects, self._name, wanted, n_bytes, coming)

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fill uint8 `out` with the bytes at `offset`.

        Raises:
            ShardDamageError: The object is missing or ends before that.
        """
        np.copyto(out, self._bytes(offset, out.nbytes))

    def read_checked(self, out: np.ndarray, offset: int, what: str) -> int:
        """Fill `out`, and compare it with the checksum that follows it, which is returned.

        Raises:
            ShardDamageError: The object is missing or ends before that, or the checksum differs; `what` names what
                was read.
        """
        found = self._bytes(offset, out.nbytes + CRC_BYTES)
        np.copyto(out, found[:-CRC_BYTES])
        if (crc := crc32c(out)) != int.from_bytes(found[-CRC_BYTES:], "little"):
            raise ShardDamageError(self.path, f"the checksum of {what} differs from its bytes")
        return crc

    def _bytes(self, offset: int, n_bytes: int) -> np.ndarray:
        (found,) = self._fetch([offset], n_bytes)
        return self._whole(found, offset, n_bytes)

    def _fetch(self, offsets: list[int], n_bytes: int) -> list[np.ndarray]:
        try:
            return self._objects.folder.ranges(self._name, offsets, n_bytes)
        except FileNotFoundError:
            raise ShardDamageError(self.path, "is missing from a sealed artifact") from None

    def _whole(self, found: np.ndarray, offset: int, n_bytes: int) -> np.ndarray:
        if len(found) != n_bytes:
            raise ShardDamageError(self.path, f"cut off: {len(found)} of {n_bytes} bytes at offset {offset}")
        return found


class _Announced(ShardObject):
    """A shard of which some ranges are on their way."""

    def __init__(
        self, objects: ShardObjects, name: str, offsets: list[int], n_bytes: int, coming: Future[list[np.ndarray]]
    ) -> None:
        super().__init__(objects, name)
        self._offsets, self._n_bytes, self._coming = offsets, n_bytes, coming

    def _bytes(self, offset: int, n_bytes: int) -> np.ndarray:
        place = bisect_right(self._offsets, offset) - 1
        start = offset - self._offsets[place] if place >= 0 else self._n_bytes
        if start + n_bytes > self._n_bytes:  # not announced
            return super()._bytes(offset, n_bytes)
        return self._whole(self._coming.result()[place][start : start + n_bytes], offset, n_bytes)


def shard_file_bytes(spec: GroupSpec, n_rows: int) -> int:
    """Return the size of the file of a shard of `n_rows` rows."""
    n_chunks = -(-n_rows // spec.rows_per_chunk)
    return n_chunks * (spec.chunk_bytes + CRC_BYTES) + spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES


def encode_shard(spec: GroupSpec, rows: torch.Tensor, out: np.ndarray | None = None) -> np.ndarray:
    """Lay out one shard.

    Args:
        spec: The group it belongs to.
        rows: `[n, T, D]`, contiguous, on the CPU; 1 <= n <= rows_per_shard. Rows that lack in the last
            chunk are the fill value on disk.
        out: uint8 `[shard_file_bytes]`, to be filled and returned; without it a new array is made.

    Returns:
        uint8 `[size]`: the whole file.
    """
    data = bytes_of(rows)
    whole, rest = divmod(len(data), spec.rows_per_chunk)
    n_chunks = whole + bool(rest)
    stride = spec.chunk_bytes + CRC_BYTES
    shard = np.empty(shard_file_bytes(spec, len(rows)), np.uint8) if out is None else out

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
    return shard


def chunk_checksums(spec: GroupSpec, shard: np.ndarray) -> np.ndarray:
    """Return the crc32c of every chunk of a shard that was laid out by `encode_shard`: uint32 `[n_chunks]`."""
    stride = spec.chunk_bytes + CRC_BYTES
    n_chunks = (shard.size - (spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES)) // stride
    ends = shard[: n_chunks * stride].reshape(n_chunks, stride)[:, spec.chunk_bytes :]
    return np.ascontiguousarray(ends).view("<u4").reshape(-1)


def read_offsets(file: ShardFile | ShardObject, size: int, spec: GroupSpec, n_chunks: int) -> np.ndarray:
    """Read the index at the end of a shard.

    Args:
        file: The shard.
        size: Its sealed size in bytes.
        spec: The group it belongs to.
        n_chunks: Chunks that it must hold.

    Returns:
        int64 `[n_chunks]`: the byte offset of every chunk.

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
    # The size is compared first: an offset is then bounded without overflow.
    bad = (entries[:, 1] != stride) | (entries[:, 0] > max(start - stride, 0))
    if bad.any():
        slot = int(bad.argmax())
        offset, n_bytes = (int(x) for x in entries[slot])
        empty = offset == n_bytes == int(_NO_CHUNK)
        what = "is not there" if empty else f"is said to be {n_bytes} bytes at offset {offset}"
        problem = f"chunk {slot} {what}; {stride} bytes before offset {start} are expected"
        raise ShardDamageError(file.path, problem)
    return entries[:, 0].astype(np.int64)
