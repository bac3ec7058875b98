"""A shard in an object store, read by ranges; every byte it gives was there, or it raises.

The look-alike of `ShardFile`. A request takes tens of milliseconds and many go side by side, so what a batch
wants is asked for all at once: one request a shard, ranges that lie near each other fetched together.
"""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from storage.activations.buffers import crc32c
from storage.activations.shard_file import CRC_BYTES, ShardDamageError

if TYPE_CHECKING:
    from storage.place import RangeReader

_REQUESTS_AT_ONCE = 32


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
