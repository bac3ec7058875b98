"""Statistics of the stream: mean and deviation of every channel, and how far stored rows are from computed ones.

Channel statistics are taken once, when a stage has ended and its stacks have their final storage type, and are saved
with the stacks: whether the stream is later cast live or into a store, the same statistics are used.

A channel's error is measured against how much that channel varies, because only that is useful to a later stack. The
overall error is dominated by the channels with the largest values: it stays small while the others are lost.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from stackwise_core.model.blocks import Stack
from stackwise_core.model.stream import EXACT, ChannelStatistics
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.training.boundary import advance

_FLOOR = 1e-3
"""Of the mean deviation: a dead channel that comes alive later must not set the scale of all others."""
_LEAST_STD = 1e-12
"""Where no channel varies."""
_WORST = 5
_VARIES = 1e-12
"""A variance below this share of the mean square is rounding."""


class ChannelMoments:
    """Sums over positions, in float64; row by row, so that they do not depend on the batch size."""

    def __init__(self) -> None:
        """Start at zero."""
        self.count, self.sum, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, stream_BTD: Tensor) -> None:
        """Add some rows."""
        for row_TD in stream_BTD.double().cpu():
            self.count += len(row_TD)
            self.sum = self.sum + row_TD.sum(0)
            self.squares = self.squares + row_TD.square().sum(0)

    def variance(self) -> Tensor:
        """Return the variance of every channel; rounding may make it slightly negative."""
        return self.squares / self.count - (self.sum / self.count).square()


@torch.no_grad()
def output_statistics(stacks: Sequence[Stack], entering: Iterable[Tensor]) -> dict[int, ChannelStatistics]:
    """Return the channel statistics of every stack's output, by creation index; empty if nothing enters.

    Args:
        stacks: in data-flow order, as they will be used from now on.
        entering: the stream [B, T, D] below the first of them, some rows at a time.
    """
    moments = {stack.creation_index: ChannelMoments() for stack in stacks}
    for stream_BTD in entering:
        for stack in stacks:
            stream_BTD = advance([stack.eval()], stream_BTD, EXACT)
            moments[stack.creation_index].add(stream_BTD)
    return {index: _statistics(found) for index, found in moments.items() if found.count}


def _statistics(moments: ChannelMoments) -> ChannelStatistics:
    std = moments.variance().clamp_min(0.0).sqrt()
    floor = max(_FLOOR * std.mean().item(), _LEAST_STD)
    return ChannelStatistics((moments.sum / moments.count).float(), std.clamp_min(floor).float())


class StoredError(TypedDict):
    """Relative root mean square errors; 0.01 is one percent."""

    rows: int
    """How many rows were compared."""
    overall: float
    """Of all values, relative to their size."""
    channel_median: float
    """Of each channel, relative to its standard deviation; 0 where it does not vary."""
    channel_p99: float
    channel_max: float
    worst_channels: dict[str, float]
    """The channels with the largest errors."""


def stored_error(stored: RowSource, computed: RowSource, sample: list[tuple[int, int]]) -> StoredError:
    """Compare stored rows with what the stack computed; one row is in memory at a time.

    Args:
        stored: the store.
        computed: the stack's output, before it is cast.
        sample: (sequence id, view) pairs, at least one.
    """
    values, errors = ChannelMoments(), ChannelMoments()
    for sequence_id, view in sample:
        ids = np.array([sequence_id], dtype=np.int64)
        computed_BTD, stored_BTD = (source.rows(ids, view).cpu().double() for source in (computed, stored))
        values.add(computed_BTD)
        errors.add(stored_BTD - computed_BTD)
    error, size, variance = errors.squares, values.squares, values.variance()
    varies = variance > _VARIES * size / values.count
    by_channel = torch.where(varies, (error / values.count / variance).sqrt(), 0.0)
    worst = by_channel.argsort(descending=True)[:_WORST].tolist()
    return {
        "rows": len(sample),
        "overall": _rounded((error.sum() / size.sum().clamp_min(torch.finfo(torch.double).tiny)).sqrt()),
        "channel_median": _rounded(by_channel.quantile(0.5)),
        "channel_p99": _rounded(by_channel.quantile(0.99)),
        "channel_max": _rounded(by_channel.max()),
        "worst_channels": {str(channel): _rounded(by_channel[channel]) for channel in worst},
    }


def _rounded(value: Tensor) -> float:
    """Return three significant digits."""
    return float(f"{value.item():.3g}")
