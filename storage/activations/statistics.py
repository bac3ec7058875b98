"""Statistics of the values in a store: channels, tokens, positions and principal directions.

Two passes over the sampled rows: the first finds the mean and the second sums centred values, so that no variance is
a difference of large numbers. All sums are float64. A token with a value that is not finite is counted and left out.

Letters: T positions, D channels, N tokens that are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
ReadRows = Callable[[IntArray], torch.Tensor]
"""Takes row indices [B] and returns the rows [B, T, D]."""

_BLOCK_VALUES: Final = 2**22
"""Values that are read and summed at a time: 32 MiB in float64."""
OUTLIER_FACTOR: Final = 6.0
"""A channel is an outlier if its root mean square is at least this multiple of the median channel's.

Six is the bound of LLM.int8() (Dettmers et al. 2022: magnitude 6 in the hidden states) and of Bondarenko et al. 2023
(Quantizable transformers: six standard deviations of the tensor). Relative to the median channel it needs no unit, and
an outlier cannot hide by widening the deviation that it is measured in.
"""
DEAD_FACTOR: Final = 1e-3
"""A channel is dead if its standard deviation is at most this fraction of the median over the channels that vary.

In bfloat16, whose steps are 2^-8 of a value, that is below the rounding error of an ordinary channel.
"""
TOKEN_QUANTILES: Final = (0.0, 0.01, 0.5, 0.99, 1.0)
POSITION_QUANTILES: Final = (0.1, 0.5, 0.9)
_BINS: Final = 80
_HISTOGRAM_RANGE: Final = 8.0
"""The histogram ends at this multiple of the median channel's root mean square."""


@dataclass(frozen=True)
class Channels:
    """Statistics of each channel over all finite tokens: [D] each."""

    mean: FloatArray
    std: FloatArray
    rms: FloatArray
    smallest: FloatArray
    largest: FloatArray
    kurtosis: FloatArray
    """Fourth central moment over the squared variance: 3 for a normal distribution, NaN for a constant channel."""

    @property
    def outlier_bound(self) -> float:
        """Root mean square at which a channel becomes an outlier."""
        return OUTLIER_FACTOR * _median_positive(self.rms)

    @property
    def dead_bound(self) -> float:
        """Standard deviation at or below which a channel is dead."""
        return DEAD_FACTOR * _median_positive(self.std)

    @property
    def outliers(self) -> IntArray:
        """Outlier channels, the largest first."""
        found = np.flatnonzero((self.rms >= self.outlier_bound) & (self.rms > 0))
        return found[np.argsort(-self.rms[found], kind="stable")]

    @property
    def dead(self) -> IntArray:
        """Dead channels, ascending."""
        return np.flatnonzero(self.std <= self.dead_bound)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the centred tokens [N, D]."""

    std: FloatArray
    """Singular values over sqrt(N), descending: the standard deviation along each principal direction [D]."""

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli 2007)."""
        shares = self.std / self.std.sum() if self.std.any() else self.std
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin 2007)."""
        return float((self.std**2).sum() / self.std[0] ** 2) if self.std.any() else 0.0

    def directions_for(self, share: float) -> int:
        """Return how many of the first directions are needed to hold this share of the variance."""
        cumulated = np.cumsum(self.std**2)
        return int(np.searchsorted(cumulated, share * cumulated[-1]) + 1) if self.std.any() else 0


@dataclass(frozen=True)
class Statistics:
    """Statistics of some rows. If no token is finite, everything except the counts is NaN."""

    n_rows: int
    n_tokens: int
    """N: finite tokens only."""
    n_non_finite: int
    """Values that are NaN or infinite."""
    mean: float
    std: float
    channels: Channels
    norm_quantiles: FloatArray
    """Euclidean norm of a token, at TOKEN_QUANTILES."""
    norm_by_position: FloatArray
    """Mean norm at each position [T]."""
    norm_quantiles_by_position: FloatArray
    """[3, T], at POSITION_QUANTILES."""
    neighbour_cosine: float
    """Mean cosine between tokens at neighbouring positions."""
    pair_cosine: float
    """Mean cosine between any two tokens: anisotropy (Ethayarajh 2019)."""
    spectrum: Spectrum
    bin_edges: FloatArray
    """[81]"""
    bin_counts: IntArray
    """[80]"""
    n_beyond: int
    """Values outside the histogram."""


def evenly_spaced(n_rows: int, wanted: int) -> IntArray:
    """Return about `wanted` indices of 0 .. n_rows - 1 with both ends, or all of them if there are no more."""
    places = np.linspace(0, n_rows - 1, min(wanted, n_rows))
    return np.unique(places.round().astype(np.int64))


def blocks(reads: Sequence[ReadRows], places: Sequence[IntArray]) -> Iterator[list[FloatArray]]:
    """Read the rows at `places[i]` by `reads[i]`, and yield them block by block: for each i [b, T, D] in float64."""
    at, per_block = 0, 1
    while at < len(places[0]):
        block = [read(where[at : at + per_block]).double().numpy() for read, where in zip(reads, places, strict=True)]
        yield block
        at += per_block
        per_block = max(1, _BLOCK_VALUES // sum(rows[0].size for rows in block))


def describe_rows(read: ReadRows, places: IntArray, seq_len: int, d_model: int) -> Statistics:
    """Compute the statistics of at least one row, reading each twice.

    Memory holds one block of rows, a [D, D] matrix and the norm of every token.
    """
    first = _FirstPass(d_model)
    for (rows,) in blocks([read], [places]):
        first.add(rows.reshape(-1, d_model))
    second = _SecondPass(first, len(places), seq_len)
    for (rows,) in blocks([read], [places]):
        second.add(rows)
    return second.statistics()


def _median_positive(values: FloatArray) -> float:
    """Return the median of the positive values, or 0 if there are none."""
    above = values[values > 0]
    return float(np.median(above)) if len(above) else 0.0


class _FirstPass:
    """Sums, extremes and counts."""

    def __init__(self, d_model: int) -> None:
        self.n_tokens = self.n_non_finite = 0
        self.sum, self.squares = np.zeros(d_model), np.zeros(d_model)
        self.smallest, self.largest = np.full(d_model, np.inf), np.full(d_model, -np.inf)

    def add(self, tokens_ND: FloatArray) -> None:
        finite = np.isfinite(tokens_ND)
        self.n_non_finite += int((~finite).sum())
        kept = tokens_ND[finite.all(1)]
        self.n_tokens += len(kept)
        self.sum += kept.sum(0)
        self.squares += (kept**2).sum(0)
        self.smallest = np.minimum(self.smallest, kept.min(0, initial=np.inf))
        self.largest = np.maximum(self.largest, kept.max(0, initial=-np.inf))

    @property
    def count(self) -> float:
        """The divisor of the sums: N, or NaN if it is 0."""
        return self.n_tokens or np.nan

    def bin_edges(self) -> FloatArray:
        """Return the edges of the histogram, which leaves out the far tails."""
        if not self.n_tokens:
            return np.linspace(0, 1, _BINS + 1)
        bound = _HISTOGRAM_RANGE * _median_positive(np.sqrt(self.squares / self.count)) or 1.0
        low, high = max(self.smallest.min(), -bound), min(self.largest.max(), bound)
        return np.linspace(low, high if high > low else low + 1.0, _BINS + 1)


class _SecondPass:
    """Central moments, norms and angles."""

    def __init__(self, first: _FirstPass, n_rows: int, seq_len: int) -> None:
        d_model = len(first.sum)
        self.first, self.mean = first, first.sum / first.count
        self.second, self.fourth = np.zeros(d_model), np.zeros(d_model)
        self.gram = np.zeros((d_model, d_model))
        self.norms = np.full((n_rows, seq_len), np.nan, np.float32)
        self.units, self.cosines = np.zeros(d_model), 0.0
        self.n_rows = self.n_units = self.n_cosines = 0
        self.edges, self.counts = first.bin_edges(), np.zeros(_BINS, np.int64)

    def add(self, rows_BTD: FloatArray) -> None:
        finite_BT = np.asarray(np.isfinite(rows_BTD).all(2))
        norms_BT = np.sqrt((np.where(finite_BT[..., None], rows_BTD, 0.0) ** 2).sum(2))
        self.norms[self.n_rows : self.n_rows + len(rows_BTD)] = np.where(finite_BT, norms_BT, np.nan)
        self.n_rows += len(rows_BTD)
        has_angle_BT = finite_BT & (norms_BT > 0)
        units_BTD = np.where(has_angle_BT[..., None], rows_BTD, 0.0) / np.where(norms_BT > 0, norms_BT, 1.0)[..., None]
        self.units += units_BTD.sum((0, 1))
        self.n_units += int(has_angle_BT.sum())
        self.cosines += float((units_BTD[:, 1:] * units_BTD[:, :-1]).sum())
        self.n_cosines += int((has_angle_BT[:, 1:] & has_angle_BT[:, :-1]).sum())
        kept_ND = rows_BTD[finite_BT]
        self.counts += np.histogram(kept_ND, self.edges)[0]
        centred_ND = kept_ND - self.mean if len(kept_ND) else kept_ND
        squares_ND = centred_ND**2
        self.second += squares_ND.sum(0)
        self.fourth += (squares_ND**2).sum(0)
        self.gram += centred_ND.T @ centred_ND

    def statistics(self) -> Statistics:
        first, variance = self.first, self.second / self.first.count
        none = np.full_like(variance, np.nan)
        channels = Channels(
            mean=self.mean,
            std=np.sqrt(variance),
            rms=np.sqrt(first.squares / first.count),
            smallest=first.smallest if first.n_tokens else none,
            largest=first.largest if first.n_tokens else none,
            kurtosis=np.divide(self.fourth / first.count, variance**2, out=none.copy(), where=variance > 0),
        )
        pairs = self.n_units * (self.n_units - 1)
        eigenvalues = np.linalg.eigvalsh(self.gram / max(first.n_tokens, 1))[::-1]
        return Statistics(
            n_rows=self.n_rows,
            n_tokens=first.n_tokens,
            n_non_finite=first.n_non_finite,
            mean=float(self.mean.mean()),
            std=float(np.sqrt(variance.mean() + self.mean.var())),
            channels=channels,
            norm_quantiles=_quantiles(self.norms, TOKEN_QUANTILES),
            norm_by_position=np.array([_mean(column) for column in self.norms.T]),
            norm_quantiles_by_position=np.stack([_quantiles(column, POSITION_QUANTILES) for column in self.norms.T], 1),
            neighbour_cosine=self.cosines / self.n_cosines if self.n_cosines else np.nan,
            pair_cosine=float(self.units @ self.units - self.n_units) / pairs if pairs else np.nan,
            spectrum=Spectrum(np.sqrt(np.maximum(eigenvalues, 0.0))),  # tiny negative ones are rounding errors
            bin_edges=self.edges,
            bin_counts=self.counts,
            n_beyond=int(first.n_tokens * len(self.mean) - self.counts.sum()),
        )


def _mean(values: NDArray[np.float32]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else np.nan


def _quantiles(values: NDArray[np.float32], at: tuple[float, ...]) -> FloatArray:
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(finite, at) if len(finite) else np.full(len(at), np.nan)
