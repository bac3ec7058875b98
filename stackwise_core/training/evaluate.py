"""Judging a rack and its stream: validation loss, stored rows against computed ones, statistics of every channel.

Channel statistics are taken once, when a stage has ended and its stacks have their final storage type, and are saved
with the stacks: whether the stream is later cast live or into a store, the same statistics are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config.schema import StreamDtype
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.stream import EXACT, ChannelStatistics, Stream
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.objectives.losses import (
    Batch,
    LossFunction,
    batch_rows,
    input_time_step,
    loss_positions,
    summed_loss,
)
from stackwise_core.objectives.raw_batch import check_padding
from stackwise_core.training.boundary import advance, rows_at_once

_SEQUENCES_AT_ONCE = 32

_TOLERANCE: dict[StreamDtype, float] = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2, "fp8": 0.15}
"""Allowed root mean square of the relative differences in a channel, and in a token, where kernels may sum in another
order (CUDA)."""
_TYPICAL = 0.9
"""The quantile over channels that no massive activation reaches."""
_IDLE = 1e-2
"""A channel below this share of the typical one may hold nothing but rounding."""

_FLOOR = 1e-3
"""Smallest deviation, as a share of the mean: a dead channel that later varies must not set the scale of all."""
_LEAST_STD = 1e-12
"""Smallest deviation where no channel varies."""
_WORST = 5
_VARIES = 1e-12
"""A variance below this share of the mean square is rounding."""


@torch.no_grad()
def judge_rack(
    embedding: TokenEmbedding,
    stacks: Iterable[Stack],
    head: Head,
    batches: Sequence[Batch],
    *,
    stream: Stream,
    boundary: int,
    loss_function: LossFunction | None = None,
) -> list[dict[str, float]]:
    """Return the validation losses of a rack [nats per loss position], one entry per batch.

    An entry holds validation_loss on the rounded stream that the stage trained on (of the first batch; the others
    have only one stream), validation_loss_exact on the unrounded one, and the number of loss positions. The batches
    are the same sequences, each under one corruption, the first under the stage's own. The stacks are in data-flow
    order and may be loaded one by one, since none is kept; `stream` holds the output of those below the boundary.
    Between stacks the streams of all batches lie in host memory.
    """
    exact = [_embedded(embedding, batch) for batch in batches]
    rounded = exact[0]
    for n, stack in enumerate(stacks):
        stack.eval()
        for batch in batches if n == 0 else ():
            if "attention_mask" in batch:
                check_padding(batch["attention_mask"], causal=stack.shape.causal)
        if boundary:
            rounded = advance([stack], rounded, stream if n < boundary else EXACT, batches[0].get("documents"))
        exact = [
            advance([stack], hidden, EXACT, batch.get("documents"))
            for hidden, batch in zip(exact, batches, strict=True)
        ]
    losses: list[dict[str, float]] = []
    for n, (hidden, batch) in enumerate(zip(exact, batches, strict=True)):
        loss_exact = _mean_loss(hidden, head, batch, loss_function)
        positions = int(loss_positions(batch).sum())
        loss = _mean_loss(rounded, head, batch, loss_function) if n == 0 and boundary else loss_exact
        losses.append({"validation_loss": loss, "validation_loss_exact": loss_exact, "loss_positions": positions})
    return losses


def _embedded(embedding: TokenEmbedding, batch: Batch) -> Tensor:
    """Return the stream below the first stack in host memory: [B, T, D]."""
    device, parts = embedding.weight.device, list[Tensor]()
    for first in range(0, len(batch["input_ids"]), _SEQUENCES_AT_ONCE):
        part = batch_rows(batch, slice(first, first + _SEQUENCES_AT_ONCE))
        parts.append(embedding(part["input_ids"].to(device), input_time_step(part)).cpu())
    return torch.cat(parts)


def judged_at_once(device: torch.device, positions: int) -> int:
    """Return of how many sequences of `positions` the loss is computed together: the logits of 32 may fill a GPU."""
    return _SEQUENCES_AT_ONCE if device.type == "cpu" else rows_at_once(device, positions)


def _mean_loss(hidden_BTD: Tensor, head: Head, batch: Batch, loss_function: LossFunction | None) -> float:
    """Return the mean loss over all loss positions; the head runs on some sequences at a time."""
    total, normaliser, device = 0.0, 0, head.norm.weight.device
    at_once = judged_at_once(device, hidden_BTD.shape[1])
    for first in range(0, len(hidden_BTD), at_once):
        rows = slice(first, first + at_once)
        loss, count = summed_loss(hidden_BTD[rows].to(device), head, batch_rows(batch, rows), loss_function)
        total, normaliser = total + loss.item(), normaliser + count
    return total / max(1, normaliser)


def differing_rows(
    stored: RowSource, live: RowSource, sample: Iterable[tuple[int, int]], dtype: StreamDtype, *, exact: bool
) -> list[tuple[int, int]]:
    """Return the (sequence id, view) pairs of a sample whose stored row differs from the row derived from tokens.

    Rows are compared bit for bit if `exact` (on a CPU), else within a tolerance of the stream's type.
    """
    differing: list[tuple[int, int]] = []
    for sequence_id, view in sample:
        ids = np.array([sequence_id], dtype=np.int64)
        row, derived = stored.rows(ids, view).cpu()[0], live.rows(ids, view).cpu()[0]
        if not (torch.equal(row, derived) or (not exact and _is_close(row, derived, _TOLERANCE[dtype]))):
            differing.append((sequence_id, view))
    return differing


def _is_close(row_TD: Tensor, derived_TD: Tensor, tolerance: float) -> bool:
    """Whether no channel and no token of a row differs by more than rounding.

    A difference is relative to the value, or to the median of its channel if that is larger: a massive activation
    allows no difference of other values, be they of other channels or of other tokens.
    """
    derived_TD = derived_TD.float()
    size_D = derived_TD.abs().median(0).values
    size_D = size_D.clamp_min(_IDLE * size_D.quantile(_TYPICAL))
    relative_TD = (row_TD.float() - derived_TD) / derived_TD.abs().maximum(size_D)
    return all(relative_TD.square().mean(over).max().sqrt() <= tolerance for over in (0, 1))


# ---------------------------------------------------------------- statistics of the stream


class ChannelMoments:
    """Sums over positions, in float64 where the rows lie; row by row, so that they do not depend on the batch size."""

    def __init__(self) -> None:
        """Start at zero."""
        self.count, self.sum, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, stream_BTD: Tensor) -> None:
        """Add some rows."""
        for row_TD in stream_BTD:
            row_TD = row_TD.double()
            self.count += len(row_TD)
            self.sum = self.sum + row_TD.sum(0)
            self.squares = self.squares + row_TD.square().sum(0)

    def variance(self) -> Tensor:
        """Return the variance of every channel; rounding may make it slightly negative."""
        return self.squares / self.count - (self.sum / self.count).square()


@torch.no_grad()
def output_statistics(
    stacks: Sequence[Stack], entering: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[int, ChannelStatistics]:
    """Return the channel statistics of every stack's output, by creation index; empty if nothing enters.

    `entering` yields the stream [B, T, D] below the first of the stacks, which are in data-flow order, and the numbers
    of the documents [B, T] where they are kept apart.
    """
    moments = {stack.creation_index: ChannelMoments() for stack in stacks}
    for stream_BTD, documents_BT in entering:
        for stack in stacks:
            stream_BTD = advance([stack.eval()], stream_BTD, EXACT, documents_BT)
            moments[stack.creation_index].add(stream_BTD)
    return {index: _statistics(found) for index, found in moments.items() if found.count}


def _statistics(moments: ChannelMoments) -> ChannelStatistics:
    std = moments.variance().clamp_min(0.0).sqrt()
    floor = max(_FLOOR * std.mean().item(), _LEAST_STD)
    found = ChannelStatistics((moments.sum / moments.count).float(), std.clamp_min(floor).float())
    return found.to(torch.device("cpu"))


class StoredError(TypedDict):
    """Relative root mean square errors; 0.01 is one percent.

    A channel's error is measured against how much that channel varies, because only that is useful to a later stack.
    The overall error is dominated by the channels with the largest values: it stays small while the others are lost.
    """

    rows: int
    """How many rows were compared."""
    overall: float
    """The error of all values, relative to their size."""
    channel_median: float
    """The error of a channel, relative to its standard deviation; 0 where it does not vary."""
    channel_p99: float
    channel_max: float
    worst_channels: dict[str, float]
    """The channels with the largest errors."""


def stored_error(stored: RowSource, computed: RowSource, sample: list[tuple[int, int]]) -> StoredError:
    """Compare stored rows with the stack's output before its cast, over a sample of (sequence id, view) pairs."""
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
    return float(f"{value.item():.3g}")
