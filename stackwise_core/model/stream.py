"""The types in which the frozen trunk's stream is held, and the conversion to and from each.

A quantised type standardises each channel, then holds a token as 8-bit values times one scale:

    z = (h - mean) / std        per channel, by statistics that are taken before the first row is stored
    scale = max |z| / largest   per token
    stored = z / scale          int8 (rounded to even) or float8_e4m3fn
    given = stored * scale * std + mean

Without the first line a few channels with large values would set the scale of all others. Every operation is one
unfused float32 operation per value: a row has the same bits alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.errors import ConfigError, Fault

STREAM_DTYPES: Final[dict[StreamDtype, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""The type of the stored values."""

_LARGEST: Final[dict[StreamDtype, float]] = {"int8": 127.0, "fp8": 448.0}
"""The magnitude to which the largest value of a token is scaled."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of a token that equals its channels' means, where it would be zero."""


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of every channel of a stack's output: float32 [D] both, the latter above 0."""

    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> ChannelStatistics:
        """Return the statistics on a device."""
        return ChannelStatistics(self.mean.to(device), self.std.to(device))


class Quantised(NamedTuple):
    """Rows as they are stored: 8-bit values [B, T, D], and float32 scales [B, T, 1]."""

    values: Tensor
    scale: Tensor


def quantise(hidden_BTD: Tensor, dtype: StreamDtype, channels: ChannelStatistics) -> Quantised:
    """Return a stack's output as int8 or fp8; the scale of a token that is not finite is NaN or infinite."""
    mean, std = channels.to(hidden_BTD.device)
    standard_BTD = (hidden_BTD.float() - mean) / std
    scale_BT1 = (standard_BTD.abs().amax(-1, keepdim=True) / _LARGEST[dtype]).clamp_min(_SMALLEST_SCALE)
    scaled_BTD = standard_BTD.div_(scale_BT1).nan_to_num_(0.0)
    if dtype == "int8":
        scaled_BTD.round_()
    return Quantised(scaled_BTD.to(STREAM_DTYPES[dtype]), scale_BT1)


def dequantise(rows: Quantised, channels: ChannelStatistics, out: Tensor | None = None) -> Tensor:
    """Return stored rows as float32 [B, T, D]; `out`, if given, is filled and returned."""
    mean, std = channels.to(rows.values.device)
    out = torch.empty_like(rows.values, dtype=torch.float32) if out is None else out
    return out.copy_(rows.values).mul_(rows.scale).mul_(std).add_(mean)


@dataclass(frozen=True)
class Stream:
    """How a stream is held between stacks: its type, and for a quantised type the statistics of each stack's output."""

    dtype: StreamDtype
    channels: Mapping[int, ChannelStatistics] = field(default_factory=dict)
    """By creation index."""

    @property
    def given(self) -> torch.dtype:
        """The type of the rows that are read: float32 for a quantised type, which cannot be computed with."""
        return torch.float32 if self.dtype in QUANTISED_STREAMS else STREAM_DTYPES[self.dtype]

    def cast(self, hidden_BTD: Tensor, stack: int) -> Tensor:
        """Return the output of a stack, by its creation index, as a store would return it: [B, T, D]."""
        channels = self.channels_of(stack)
        if channels is None:
            return hidden_BTD.to(self.given)
        return dequantise(quantise(hidden_BTD, self.dtype, channels), channels)

    def channels_of(self, stack: int) -> ChannelStatistics | None:
        """Return the statistics of a stack's output; None unless the type is quantised."""
        if self.dtype not in QUANTISED_STREAMS:
            return None
        if stack not in self.channels:
            allowed = f"stack {stack} was trained with a cache.dtype that takes no statistics of its output; use that"
            raise ConfigError([Fault("cache.dtype", repr(self.dtype), allowed)])
        return self.channels[stack]


EXACT: Final = Stream("float32")
"""The stream as the stacks compute it."""
