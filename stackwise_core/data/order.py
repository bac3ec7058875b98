"""The order in which rows are visited: a pure function of seed and epoch, the same in all stages."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from stackwise_core.data.masks import SALT_BATCHES, SALT_ORDER, BoolArray, IntArray, hash_bits
from stackwise_core.errors import ConfigError, Fault

_SORTED_ROWS = 1 << 21
"""About how many rows are sorted at a time."""
_HASHED_ROWS = 1 << 18


class RowOrder(BaseModel, frozen=True):
    """Which rows each step reads, and under which view. Resuming needs only the number of the step.

    An epoch is a permutation of the `n_rows` training sequences, cut into full batches; the remaining rows are left out
    of that epoch. The view of epoch e is e mod `views`.

    With `fixed_batches` the rows of a view are cut into batches once, and its epochs only shuffle the batches. What is
    drawn per batch, such as a time step, is then the same for a row whenever it is read under that view, so that a
    cache can hold it. The remaining rows are then left out of the whole view.
    """

    seed: int
    n_rows: int
    batch_size: int
    views: int
    fixed_batches: bool = False
    block: int = 0
    """Rows in a block that stays together; 0 shuffles all rows."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the rows; raises ConfigError if they do not fill one."""
        if self.n_rows < self.batch_size:
            allowed = f"the corpus gives only {self.n_rows} training sequences"
            raise ConfigError([Fault("training.batch_size", str(self.batch_size), allowed)])
        return self.n_rows // self.batch_size

    def epoch_rows(self, epoch: int) -> IntArray:
        """Return the permutation of an epoch: [n_rows] row numbers."""
        if not self.fixed_batches:
            return self._shuffle(epoch).rows(0, self.n_rows)
        rows = _permutation(self.seed, SALT_BATCHES, epoch % self.views, self.n_rows, self.block)
        whole = self.steps_per_epoch * self.batch_size
        batches = rows[:whole].reshape(-1, self.batch_size)
        return np.concatenate([batches[self._epoch_batches(epoch)].ravel(), rows[whole:]])

    def _shuffle(self, epoch: int) -> _Shuffle:
        """Return the rows of an epoch, if batches are not fixed."""
        return _Shuffle(self.seed, epoch, self.n_rows, self.block)

    def _epoch_batches(self, epoch: int) -> IntArray:
        """Return the batches of a view in the order of an epoch: [steps_per_epoch] batch numbers."""
        if not self.fixed_batches:
            return np.arange(self.steps_per_epoch, dtype=np.int64)
        # Keep batches from the same mixed blocks together, so that an epoch still reads few runs of the store.
        together = -(-self.block * MIXED_BLOCKS // self.batch_size)
        return _permutation(self.seed, SALT_ORDER, epoch, self.steps_per_epoch, together, mixed=1)

    def batches(self, start: int, stop: int) -> Iterator[tuple[IntArray, int, int]]:
        """Yield (rows [batch_size], view, number of the batch) for the steps start .. stop - 1.

        Batches are numbered within the view if they are fixed, else within the epoch.
        """
        if not self.fixed_batches:
            yield from self._shuffled_batches(start, stop)
            return
        epoch, permutation, numbers = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation, numbers = self.epoch_rows(epoch), self._epoch_batches(epoch)
            n = step % self.steps_per_epoch
            yield permutation[n * self.batch_size : (n + 1) * self.batch_size], epoch % self.views, int(numbers[n])

    def _shuffled_batches(self, start: int, stop: int) -> Iterator[tuple[IntArray, int, int]]:
        epoch, shuffle = -1, self._shuffle(0)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                shuffle = self._shuffle(epoch)
            n = step % self.steps_per_epoch
            yield shuffle.rows(n * self.batch_size, (n + 1) * self.batch_size), epoch % self.views, n

    def places(self, rows: IntArray, view: int) -> tuple[IntArray, IntArray]:
        """Return the batch [R] and the position in it [R] of rows [R] under a view, for fixed batches only.

        Rows that do not fill a batch are numbered as in one after the last.
        """
        assert self.fixed_batches
        positions = _positions(self, view)[rows]
        return positions // self.batch_size, positions % self.batch_size

    def count_visited(self, steps: int) -> int:
        """Return an upper bound of the number of pairs in `visited(steps)`, without drawing an order."""
        reads = steps * self.batch_size
        per_view = self.n_rows // self.batch_size * self.batch_size if self.fixed_batches else self.n_rows
        return min(reads, self.views * min(per_view, reads))

    def visited(self, steps: int, first: int = 0) -> tuple[IntArray, IntArray]:
        """Return the distinct pairs of row [R] and view [R] that `steps` steps from `first` on read.

        They are ordered by view, then row. If every row is visited under every view, entry view * n_rows + n is row n.
        """
        seen = np.zeros((self.views, self.n_rows), dtype=bool)
        for epoch, start, stop in self._parts(steps, first):
            for rows in self._rows_between(epoch, start * self.batch_size, stop * self.batch_size):
                seen[epoch % self.views, rows] = True
            if seen.all():
                break
        views, rows = np.nonzero(seen)
        return rows.astype(np.int64), views.astype(np.int64)

    def count_again(self, steps: int, first: int, before: int) -> int:
        """Return about how many pairs that `steps` steps from `first` on visit were visited by the `before` last ones.

        That is what can be expected of shuffled rows, without drawing an order.
        """
        read, earlier = self._shares_read(steps, first), self._shares_read(before, first - before)
        found = 0.0
        for view in range(self.views):
            missed = [
                math.prod(1.0 - share for epoch, share in shares.items() if epoch % self.views == view)
                for shares in (read, earlier)
            ]
            neither = math.prod(
                1.0 - read.get(epoch, 0.0) - earlier.get(epoch, 0.0)
                for epoch in read.keys() | earlier.keys()
                if epoch % self.views == view
            )
            found += self.n_rows * (1.0 - sum(missed) + neither)
        return round(found)

    def _shares_read(self, steps: int, first: int) -> dict[int, float]:
        """Return the share of its rows that is read of each epoch, of the last ones if all views come round."""
        most = (self.views + 2) * self.steps_per_epoch
        first, steps = first + max(0, steps - most), min(steps, most)
        return {
            epoch: (stop - start) * self.batch_size / self.n_rows for epoch, start, stop in self._parts(steps, first)
        }

    def _parts(self, steps: int, first: int) -> Iterator[tuple[int, int, int]]:
        """Yield each epoch that `steps` steps from `first` on read of, and between which of its steps."""
        last = first + steps
        for epoch in range(first // self.steps_per_epoch, -(-last // self.steps_per_epoch)):
            begins = epoch * self.steps_per_epoch
            yield epoch, max(0, first - begins), min(self.steps_per_epoch, last - begins)

    def _rows_between(self, epoch: int, start: int, stop: int) -> Iterator[IntArray]:
        """Yield the rows at some places of an epoch, some at a time."""
        if self.fixed_batches:
            yield self.epoch_rows(epoch)[start:stop]
            return
        shuffle = self._shuffle(epoch)
        for at in range(start, stop, _SORTED_ROWS):
            yield shuffle.rows(at, min(at + _SORTED_ROWS, stop))


class _Shuffle:
    """The permutation of an epoch, of which only a range of hashes is sorted, and in memory, at a time.

    So the memory does not grow with the rows, unless blocks of them stay together.
    """

    def __init__(self, seed: int, epoch: int, n_rows: int, block: int) -> None:
        self._keys, self._n_rows, self._block = (seed, SALT_ORDER, epoch), n_rows, block
        self._shift = np.uint64(64 - max(0, -(-n_rows // _SORTED_ROWS) - 1).bit_length())
        self._first = 0
        self._sorted = np.empty(0, dtype=np.int64)
        """The rows from place `_first` on."""

    def rows(self, start: int, stop: int) -> IntArray:
        """Return the rows at the places from `start` to `stop`."""
        parts = list[IntArray]()
        while start < stop:
            if not self._first <= start < self._first + len(self._sorted):
                self._sort_around(start)
            at = start - self._first
            parts.append(self._sorted[at : at + stop - start])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _sort_around(self, place: int) -> None:
        """Sort the rows whose hashes begin with the same bits as that of a place."""
        if self._block or int(self._shift) == 64:
            self._first, self._sorted = 0, _permutation(*self._keys, self._n_rows, self._block)
            return
        ends = np.cumsum(self._counts)
        part = int(np.searchsorted(ends, place, side="right"))
        found = [(numbers[which], hashes[which]) for numbers, hashes, which in self._of_part(part)]
        numbers, hashes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        self._first = int(ends[part] - self._counts[part])
        self._sorted = numbers[np.argsort(hashes, kind="stable")]

    @functools.cached_property
    def _counts(self) -> IntArray:
        """How many hashes begin with each value of the first bits."""
        n_parts, counts = 1 << (64 - int(self._shift)), np.zeros(0, dtype=np.int64)
        for _, hashes in self._hashed():
            found = np.bincount((hashes >> self._shift).astype(np.int64), minlength=n_parts)
            counts = found if not len(counts) else counts + found
        return counts

    def _of_part(self, part: int) -> Iterator[tuple[IntArray, NDArray[np.uint64], BoolArray]]:
        for numbers, hashes in self._hashed():
            yield numbers, hashes, hashes >> self._shift == np.uint64(part)

    def _hashed(self) -> Iterator[tuple[IntArray, NDArray[np.uint64]]]:
        """Yield the numbers of all rows and their hashes, some at a time."""
        for at in range(0, self._n_rows, _HASHED_ROWS):
            numbers = np.arange(at, min(at + _HASHED_ROWS, self._n_rows), dtype=np.int64)
            yield numbers, hash_bits(*self._keys, numbers)


MIXED_BLOCKS = 16
"""Number of blocks whose rows are shuffled together: as many runs of a store are read at once."""


def _permutation(seed: int, salt: int, key: int, n: int, block: int, mixed: int = MIXED_BLOCKS) -> IntArray:
    """Return a permutation of 0 .. n - 1; with a `block`, one that keeps numbers of a block near one another."""
    numbers = np.arange(n, dtype=np.int64)
    hashes = hash_bits(seed, salt, key, numbers)
    if not block:
        return np.argsort(hashes, kind="stable").astype(np.int64)
    blocks = np.arange(-(-n // block), dtype=np.int64)
    # Hash numbers past the last row, so that the hashes of blocks are independent of those of rows.
    order = blocks[np.argsort(hash_bits(seed, salt, key, n + blocks), kind="stable")]
    rank = np.empty_like(order)
    rank[order] = blocks
    return np.lexsort((hashes, rank[numbers // block] // mixed)).astype(np.int64)


@functools.lru_cache(maxsize=2)  # a store is filled view by view
def _positions(order: RowOrder, view: int) -> IntArray:
    """Return the position of every row in the permutation that a view's batches are cut from: [n_rows]."""
    rows = _permutation(order.seed, SALT_BATCHES, view, order.n_rows, order.block)
    positions = np.empty_like(rows)
    positions[rows] = np.arange(order.n_rows, dtype=np.int64)
    return positions
