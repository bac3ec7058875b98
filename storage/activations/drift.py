"""How far boundaries are from each other: linear CKA, and the cosine between a token at one and at the other.

Letters: S stores, N tokens, D channels of a store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.activations.metadata import RowIndex
from storage.activations.statistics import FloatArray, IntArray, ReadRows, blocks, evenly_spaced


@dataclass(frozen=True)
class Drift:
    """Every store compared with every other: symmetric matrices [S, S]."""

    n_rows: int
    n_tokens: int
    """Tokens that are finite in all stores."""
    cka: FloatArray
    """1 if equal up to rotation and scale, near 0 if unrelated, NaN if a store is constant."""
    cosine: FloatArray
    """Mean cosine between a token at one boundary and at the other. NaN if the widths differ."""


def shared_places(indices: Sequence[RowIndex], wanted: int) -> list[IntArray]:
    """Return the row indices in each store of about `wanted` rows, evenly spaced, that all of the stores hold.

    Returns:
        one array per store, empty if they share no row; entry i of each is the same sequence under the same view.
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


def _keys(index: RowIndex) -> NDArray[np.void]:
    """Return (view, sequence id) of every row as one sortable value."""
    keys = np.empty(len(index.view), dtype=[("view", "<i4"), ("sequence_id", "<i8")])
    keys["view"], keys["sequence_id"] = index.view, index.sequence_id
    return keys


def measure_drift(reads: Sequence[ReadRows], places: Sequence[IntArray]) -> Drift:
    """Compare at least one store on the rows at `places`, as `shared_places` returns them; every row is read twice.

    Linear CKA of centred X and Y is |Y'X|^2 / (|X'X| |Y'Y|) in Frobenius norms (Kornblith et al. 2019, Similarity of
    neural network representations revisited, section 3). It is biased upwards unless there are many more tokens than
    channels.

    Raises:
        ValueError: the stores differ in the number of positions.
    """
    n_stores, n_tokens = len(reads), 0
    sums: list[FloatArray] = []
    for tokens in _tokens(reads, places):
        sums = [old + store.sum(0) for old, store in zip(sums or [0.0] * n_stores, tokens, strict=True)]
        n_tokens += len(tokens[0])
    means = [total / max(n_tokens, 1) for total in sums]
    pairs = [(i, j) for i in range(n_stores) for j in range(i, n_stores)]
    products = {(i, j): np.zeros((means[i].size, means[j].size)) for i, j in pairs}
    cosines = np.zeros((n_stores, n_stores))
    for tokens in _tokens(reads, places):
        centred = [store - mean for store, mean in zip(tokens, means, strict=True)]
        units = [_units(store) for store in tokens]
        for i, j in pairs:
            products[i, j] += centred[i].T @ centred[j]
            same_width = means[i].size == means[j].size
            cosines[i, j] += (units[i] * units[j]).sum() if same_width else np.nan
    squares = np.zeros((n_stores, n_stores))
    for pair, product in products.items():
        squares[pair] = (product**2).sum()
    scales = np.sqrt(np.outer(squares.diagonal(), squares.diagonal()))
    cka = np.divide(squares, scales, out=np.full_like(scales, np.nan), where=scales > 0)
    return Drift(len(places[0]), n_tokens, _symmetric(cka), _symmetric(cosines / (n_tokens or np.nan)))


def _tokens(reads: Sequence[ReadRows], places: Sequence[IntArray]) -> Iterator[list[FloatArray]]:
    """Yield the tokens that are finite in every store: [N, D] per store."""
    for rows in blocks(reads, places):
        lengths = {store.shape[1] for store in rows}
        if len(lengths) > 1:
            raise ValueError(f"stores of {sorted(lengths)} positions cannot be compared token by token")
        finite = np.logical_and.reduce([np.isfinite(store).all(2) for store in rows])
        yield [store[finite] for store in rows]


def _units(tokens_ND: FloatArray) -> FloatArray:
    norms = np.sqrt((tokens_ND**2).sum(1, keepdims=True))
    return tokens_ND / np.where(norms > 0, norms, 1.0)


def _symmetric(upper: FloatArray) -> FloatArray:
    return np.triu(upper) + np.triu(upper, 1).T
