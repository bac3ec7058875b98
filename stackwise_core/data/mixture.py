"""Mixtures: which sequences of which source an epoch has, as numbers of rows of the packed sources. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.masks import IntArray
from stackwise_core.data.packing import sample_sizes, sampled_rows
from stackwise_core.data.sequences import MixedRows, PackedSequences

_WINDOW = 1 << 16
"""Rows that are interleaved at a time."""


class Source(NamedTuple):
    """An entry of `data.source`."""

    name: str
    weight: float = 0.0
    """Its share of the training sequences is this over the sum of all; 0 stands for its size."""


def sources_of(given: Any) -> list[Source]:
    """Return the entries of a valid `data.source`; one where it is not a list."""
    entries = given if isinstance(given, list) else [given]
    return [Source(each) if isinstance(each, str) else Source(each["source"], each["weight"]) for each in entries]


def shares_of(sources: Sequence[Source]) -> list[float]:
    """Return the share of each source, the shares adding up to 1; zeros where sizes decide."""
    total = math.fsum(source.weight for source in sources)
    return [source.weight / total if total else 0.0 for source in sources]


# ---------------------------------------------------------------- how many


def mixture_counts(
    train: Sequence[int], validation: Sequence[int], shares: Sequence[float], most: int, *, spread: bool
) -> tuple[list[int], list[int]]:
    """Return how many training and validation sequences of each source a mixture has, from how many there are."""
    chosen = train_counts(train, shares, most)
    return chosen, validation_counts(validation, shares, sum(train), most, spread=spread)


def train_counts(sizes: Sequence[int], shares: Sequence[float], most: int) -> list[int]:
    """Return how many training sequences of each source an epoch has, from how many there are.

    An epoch is as long as all sources together, but not longer than `most`, if it is given.
    """
    total = sum(sizes)
    return _divided(min(total, most or total), _shares(sizes, shares))


def validation_counts(
    sizes: Sequence[int], shares: Sequence[float], n_train: int, most: int, *, spread: bool
) -> list[int]:
    """Return how many validation sequences of each source there are: by the same shares, none of them twice.

    With `spread` and `most`, about the same part of them as of the `n_train` training sequences that there are.
    """
    parts = _shares(sizes, shares)
    whole = min(int(size / part + 1e-9) for size, part in zip(sizes, parts, strict=True))
    wanted = sample_sizes(n_train, whole, most)[1] if spread and most else whole
    return [min(size, count) for size, count in zip(sizes, _divided(wanted, parts), strict=True)]


def _shares(sizes: Sequence[int], shares: Sequence[float]) -> list[float]:
    return list(shares) if any(shares) else [size / sum(sizes) for size in sizes]


def _divided(n: int, shares: Sequence[float]) -> list[int]:
    """Divide a number by shares, at least 1 for each: what rounding leaves goes to the largest remainders."""
    exact = [n * share for share in shares]
    counts = [math.floor(each + 1e-9) for each in exact]
    order = sorted(range(len(shares)), key=lambda at: (counts[at] - exact[at], at))
    for at in order[: n - sum(counts)]:
        counts[at] += 1
    return [max(1, count) for count in counts]


# ---------------------------------------------------------------- which


def mixed_rows(sizes: Sequence[int], counts: Sequence[int], *, spread: bool) -> Iterator[IntArray]:
    """Yield the rows of a mixture, some at a time: numbers of the rows of all sources, one after the other.

    A source that has fewer rows than its count is repeated; of one that has more a sample is taken, or with `spread`
    False its first rows. The rows of each are spaced evenly, so that any long part of the mixture has the same shares.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    n_windows = -(-sum(counts) // _WINDOW)
    for window in range(n_windows):
        rows, places = list[IntArray](), list[NDArray[np.float64]]()
        for start, size, count in zip(starts, sizes, counts, strict=True):
            numbers = np.arange(count * window // n_windows, count * (window + 1) // n_windows, dtype=np.int64)
            rows.append(start + _of_source(numbers, size, count, spread))
            places.append((numbers + 0.5) / count)
        yield np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def _of_source(numbers: IntArray, size: int, count: int, spread: bool) -> IntArray:
    """Return the rows of a source that come at some places of its part of a mixture."""
    rows, whole = numbers % size, count // size * size
    last = numbers >= whole
    if spread and last.any():
        rows[last] = sampled_rows(size, count - whole, numbers[last] - whole)
    return rows


def mixed(parts: Sequence[PackedSequences], rows: IntArray, ids: IntArray) -> PackedSequences:
    """Return the split of a mixture from those of its sources."""
    if parts[0].targets is None or parts[0].masks is None:
        return PackedSequences(MixedRows([part.tokens for part in parts], rows), ids)
    tokens, targets, masks = (
        MixedRows([getattr(part, name) for part in parts], rows) for name in ("tokens", "targets", "masks")
    )
    return PackedSequences(tokens, ids, targets, masks)
