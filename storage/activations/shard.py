"""The bytes of one shard file, as Zarr's `sharding_indexed` codec defines them.

    (chunk data | crc32c of it) * chunks    index of (offset, size) * chunks_per_shard | crc32c of it

All numbers are little-endian; an index entry of two times 2^64 - 1 says that there is no such chunk.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import numpy as np
import torch

from storage.activations.buffers import bytes_of, crc32c
from storage.activations.format import GroupSpec
from storage.activations.shard_file import CRC_BYTES, ShardDamageError, ShardFile
from storage.activations.shard_object import ShardObject

_ENTRY_BYTES = 16
_NO_CHUNK = np.uint64(2**64 - 1)


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
