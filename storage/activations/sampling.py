"""Which rows of a store are looked at, and how they are read without holding them all.

Letters: T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from storage.activations.metadata import RowIndex

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
ReadRows = Callable[[IntArray], torch.Tensor]
"""From places in a store [B] to its rows [B, T, D]."""

_BLOCK_VALUES: Final = 2**22
"""32 MiB in float64: rows are read and summed so many values at a time."""


def evenly_spaced(n_rows: int, wanted: int) -> IntArray:
    """Return about `wanted` places of 0 .. n_rows - 1, the first and the last among them: all if there are no more."""
    places = np.linspace(0, n_rows - 1, min(wanted, n_rows))
    return np.unique(places.round().astype(np.int64))


def shared_places(indices: Sequence[RowIndex], wanted: int) -> list[IntArray]:
    """Return where each of some stores holds the rows that all of them hold, about `wanted`, evenly spaced.

    Returns:
        One array of places per store, all of one length, which is 0 if they share no row: entry i of each is the
        same sequence under the same view.
    """
    keys = [_keys(index) for index in indices]
    shared = keys[0]
    for other in keys[1:]:
        shared = np.intersect1d(shared, other)
    chosen = np.sort(shared)[evenly_spaced(len(shared), wanted)]
    orders = [np.argsort(key, kind="stable") for key in keys]
    return [
        order[np.searchsorted(key, chosen, sorter=order)].astype(np.int64)
        for key, order in zip(keys, orders, strict=True)
    ]


def blocks(reads: Sequence[ReadRows], places: Sequence[IntArray]) -> Iterator[list[FloatArray]]:
    """Read the same rows of some stores, a block at a time.

    Args:
        reads: one per store.
        places: where each holds the rows: [rows] each.

    Yields:
        [b, T, D] per store, in float64.
    """
    at, per_block = 0, 1
    while at < len(places[0]):
        block = [read(where[at : at + per_block]).double().numpy() for read, where in zip(reads, places, strict=True)]
        yield block
        at += per_block
        per_block = max(1, _BLOCK_VALUES // sum(rows[0].size for rows in block))


def _keys(index: RowIndex) -> NDArray[np.void]:
    """Return (view, sequence id) of every row as one sortable value."""
    keys = np.empty(len(index.view), dtype=[("view", "<i4"), ("sequence_id", "<i8")])
    keys["view"], keys["sequence_id"] = index.view, index.sequence_id
    return keys
