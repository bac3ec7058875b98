"""The bytes of one shard file, as Zarr's `sharding_indexed` codec defines them.

    (chunk data | crc32c of it) * chunks    index of (offset, size) * chunks_per_shard | crc32c of it

All numbers are little-endian; an index entry of two times 2^64 - 1 says that there is no such chunk.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import torch

from storage.activations.buffers import bytes_of, crc32c
from storage.activations.format import GroupSpec

CRC_BYTES = 4
_ENTRY_BYTES = 16
_NO_CHUNK = np.uint64(2**64 - 1)


class ShardDamageError(Exception):
    """What is wrong with a shard; the reader adds which one and what to do."""


def encode_shard(spec: GroupSpec, rows: torch.Tensor) -> np.ndarray:
    """Lay out one shard.

    Args:
        spec: The group it belongs to.
        rows: `[n, T, D]`, contiguous, on the CPU; 1 <= n <= rows_per_shard. Rows that lack in the last
            chunk are NaN on disk.

    Returns:
        uint8 `[size]`: the whole file.
    """
    data = bytes_of(rows)
    whole, rest = divmod(len(data), spec.rows_per_chunk)
    n_chunks = whole + bool(rest)
    stride = spec.chunk_bytes + CRC_BYTES
    shard = np.empty(n_chunks * stride + spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES, np.uint8)

    body = shard[: n_chunks * stride].reshape(n_chunks, stride)
    chunks = body[:, : spec.chunk_bytes]
    n_whole_rows = whole * spec.rows_per_chunk
    chunks[:whole] = data[:n_whole_rows].reshape(whole, spec.chunk_bytes)
    if rest:
        last = chunks[whole].reshape(spec.rows_per_chunk, spec.row_bytes)
        last[:rest] = data[n_whole_rows:]
        last[rest:] = bytes_of(torch.full_like(rows[:1], torch.nan))
    crcs = np.array([crc32c(chunk) for chunk in chunks], "<u4")
    body[:, spec.chunk_bytes :] = crcs.view(np.uint8).reshape(n_chunks, CRC_BYTES)

    entries = np.full((spec.chunks_per_shard, 2), _NO_CHUNK, "<u8")
    entries[:n_chunks, 0] = np.arange(n_chunks) * stride
    entries[:n_chunks, 1] = stride
    index = entries.view(np.uint8).reshape(-1)
    shard[body.size : -CRC_BYTES] = index
    shard[-CRC_BYTES:] = np.array([crc32c(index)], "<u4").view(np.uint8)
    return shard


class ShardIndex:
    """Where the chunks of a shard lie, and which of them have been found whole.

    Attributes:
        offsets: Byte offset of every chunk that holds a row.
        verified: One flag per chunk.
    """

    def __init__(self, file: ShardFile, size: int, spec: GroupSpec, n_chunks: int) -> None:
        """Read the index at the end of the file and check it.

        Args:
            file: The shard.
            size: Its sealed size in bytes.
            spec: The group it belongs to.
            n_chunks: Chunks that it must hold.

        Raises:
            ShardDamageError: The index is cut off, damaged, or lacks a chunk.
        """
        start = size - (spec.chunks_per_shard * _ENTRY_BYTES + CRC_BYTES)
        if start < 0:
            raise ShardDamageError(f"{size} bytes are too few to hold an index")
        raw = np.empty(size - start, np.uint8)
        file.read_checked(raw[:-CRC_BYTES], raw[-CRC_BYTES:], start, "the index")
        entries = raw[:-CRC_BYTES].view("<u8").reshape(-1, 2)[:n_chunks]
        stride = spec.chunk_bytes + CRC_BYTES
        # The size is compared first: an offset is then bounded without overflow.
        bad = (entries[:, 1] != stride) | (entries[:, 0] > max(start - stride, 0))
        if bad.any():
            slot = int(bad.argmax())
            offset, n_bytes = (int(x) for x in entries[slot])
            empty = offset == n_bytes == int(_NO_CHUNK)
            what = "is not there" if empty else f"is said to be {n_bytes} bytes at offset {offset}"
            raise ShardDamageError(f"chunk {slot} {what}; {stride} bytes before offset {start} are expected")
        self.offsets: list[int] = entries[:, 0].tolist()
        self.verified = np.zeros(n_chunks, np.bool_)


class ShardFile:
    """An open shard, closed when the last reference goes.

    So a thread may go on reading while another evicts the file from the reader's cache.
    """

    def __init__(self, path: Path) -> None:
        """Open the file for reading."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def read(self, out: np.ndarray, offset: int, what: str) -> None:
        """Fill uint8 `out` with the bytes at `offset`.

        Raises:
            ShardDamageError: The file ends before that; `what` names the part that was read.
        """
        self._fill([out], offset, what)

    def read_checked(self, out: np.ndarray, crc: np.ndarray, offset: int, what: str) -> None:
        """Fill `out` and the 4 bytes of `crc` that follow it, and compare the two.

        Raises:
            ShardDamageError: The file ends before that, or the checksum differs.
        """
        self._fill([out, crc], offset, what)
        if crc32c(out) != int(crc.view("<u4")[0]):
            raise ShardDamageError(f"the checksum of {what} differs from its bytes")

    def _fill(self, buffers: list[np.ndarray], offset: int, what: str) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        if (got := os.preadv(self._fd, [buffer.data for buffer in buffers], offset)) != wanted:
            raise ShardDamageError(f"{what} is cut off: {got} of {wanted} bytes at offset {offset}")
