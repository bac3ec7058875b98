"""The order in which rows are visited: a pure function of seed and epoch, the same in all stages."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel

from stackwise_core.data.masks import SALT_BATCHES, SALT_ORDER, IntArray, hash_bits
from stackwise_core.errors import ConfigError, Fault


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
            return _permutation(self.seed, SALT_ORDER, epoch, self.n_rows, self.block)
        rows = _permutation(self.seed, SALT_BATCHES, epoch % self.views, self.n_rows, self.block)
        whole = self.steps_per_epoch * self.batch_size
        batches = rows[:whole].reshape(-1, self.batch_size)
        return np.concatenate([batches[self._epoch_batches(epoch)].ravel(), rows[whole:]])

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
        epoch, permutation, numbers = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation, numbers = self.epoch_rows(epoch), self._epoch_batches(epoch)
            n = step % self.steps_per_epoch
            yield permutation[n * self.batch_size : (n + 1) * self.batch_size], epoch % self.views, int(numbers[n])

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

    def visited(self, steps: int) -> tuple[IntArray, IntArray]:
        """Return the distinct pairs of row [R] and view [R] that `steps` steps read, ordered by view, then row.

        If every row is visited under every view, entry view * n_rows + n is row n.
        """
        seen = np.zeros((self.views, self.n_rows), dtype=bool)
        epochs = -(-steps // self.steps_per_epoch)
        for epoch in range(epochs):
            n_steps = min(steps - epoch * self.steps_per_epoch, self.steps_per_epoch)
            seen[epoch % self.views, self.epoch_rows(epoch)[: n_steps * self.batch_size]] = True
            if seen.all():
                break
        views, rows = np.nonzero(seen)
        return rows.astype(np.int64), views.astype(np.int64)


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
