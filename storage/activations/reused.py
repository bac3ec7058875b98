"""Rows of a store in buffers that are used again: fresh memory costs as much as filling it."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import torch

from storage.activations.buffers import empty_aligned
from storage.activations.reader import StoreReader


class ReusedRows:
    """The rows of a reader, each batch in the buffer of the one that was read `n_buffers` before it."""

    def __init__(self, reader: StoreReader, n_buffers: int, *, pinned: bool = False) -> None:
        """Make no buffer yet: the first batches say how large.

        Args:
            reader: of a sealed store.
            n_buffers: batches that are valid at once.
            pinned: whether a CUDA device copies out of them: from pinned memory it does so by itself.
        """
        self.reader, self.pinned = reader, pinned
        self._buffers: list[torch.Tensor | None] = [None] * n_buffers
        self._turn = cycle(range(n_buffers))

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> torch.Tensor:
        """Return what `StoreReader.rows` does, valid until `n_buffers` further batches were asked for."""
        turn, n_rows = next(self._turn), len(sequence_ids)
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < n_rows:
            buffer = self._buffers[turn] = self._new_buffer(n_rows)
        return self.reader.rows(sequence_ids, view, out=buffer[:n_rows])

    def _new_buffer(self, n_rows: int) -> torch.Tensor:
        spec = self.reader.train
        shape = (n_rows, spec.seq_len, spec.d_model)
        if self.pinned:
            return torch.empty(shape, dtype=self.reader.dtype, pin_memory=True)
        return empty_aligned(shape, self.reader.dtype)
