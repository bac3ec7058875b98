"""An open shard file, read through a mapping or by `pread`; every byte it gives was there, or it raises."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import cast

import numpy as np

from storage.activations.buffers import crc32c

CRC_BYTES = 4


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
