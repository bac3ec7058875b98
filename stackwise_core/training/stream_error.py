"""What storing the stream costs: the distance of stored rows from what the stack computed, overall and by channel.

A channel's error is measured against how much that channel varies, for that is what a later stack can use of it. The
overall error is dominated by the channels with the largest values: it stays small while they hide the rest.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from stackwise_core.objectives.batches import RowSource

_WORST = 5
_VARIES = 1e-12
"""A variance of less, against the square of the values, is rounding."""


class StoredError(TypedDict):
    """Relative root mean square errors; 0.01 is one percent."""

    rows: int
    """Over so many rows."""
    overall: float
    """Of all values, against their size."""
    channel_median: float
    """Of each channel, against its standard deviation; 0 where it does not vary."""
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
    count, error, size = 0, torch.zeros(()).double(), torch.zeros(()).double()
    total = torch.zeros(()).double()
    for sequence_id, view in sample:
        ids = np.array([sequence_id], dtype=np.int64)
        was_TD, is_TD = (source.rows(ids, view)[0].cpu().double() for source in (computed, stored))
        count += len(was_TD)
        error = error + (is_TD - was_TD).square().sum(0)
        size = size + was_TD.square().sum(0)
        total = total + was_TD.sum(0)
    variance = size / count - (total / count).square()
    varies = variance > _VARIES * size / count
    by_channel = torch.where(varies, (error / count / variance).sqrt(), 0.0)
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
    """Return three digits."""
    return float(f"{value.item():.3g}")
