"""The order in which rows are visited: a pure function of (seed, epoch), shared by all stages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.masking import SALT_ORDER, IntArray, hash_bits


class RowOrder(BaseModel, frozen=True):
    """Which rows step s reads, and under which view. A value: it enters ids as it stands.

    An epoch is a permutation of the `n_rows` training sequences cut into whole batches; what does
    not fill a batch is left out of that epoch (another permutation brings it in). The view of
    epoch e is e mod `views`. Resuming needs one integer: the step.
    """

    seed: int
    n_rows: int
    batch_size: int
    views: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the rows.

        Raises:
            ConfigError: the rows do not fill one.
        """
        if self.n_rows < self.batch_size:
            allowed = f"the corpus gives only {self.n_rows} training sequences"
            raise ConfigError([Fault("training.batch_size", str(self.batch_size), allowed)])
        return self.n_rows // self.batch_size

    def epoch_rows(self, epoch: int) -> IntArray:
        """Return the permutation of an epoch: [n_rows] row numbers."""
        rows = np.arange(self.n_rows, dtype=np.int64)
        return np.argsort(hash_bits(self.seed, SALT_ORDER, epoch, rows), kind="stable").astype(np.int64)

    def batches(self, start: int, stop: int) -> Iterator[tuple[IntArray, int]]:
        """Yield (rows [batch_size], view) for the steps start .. stop - 1."""
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                permutation = self.epoch_rows(epoch)
            first = (step % self.steps_per_epoch) * self.batch_size
            yield permutation[first : first + self.batch_size], epoch % self.views

    def count_visited(self, steps: int) -> int:
        """Return how many (row, view) pairs `visited` would, without drawing an order; at most that many."""
        return min(steps * self.batch_size, self.views * min(self.n_rows, steps * self.batch_size))

    def visited(self, steps: int) -> tuple[IntArray, IntArray]:
        """Return the distinct (row, view) pairs that `steps` steps read, ordered by view, then row.

        Where every row is visited under every view, entry view * n_rows + n is row n.

        Returns:
            rows [R] and views [R], R <= n_rows * views.
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
