"""Mean and deviation of every channel of a stack's output, over the first rows that its stage trained on.

They are taken once, when the stage has ended and its stacks are stored as their precision says, and kept with
them: whoever casts the stream later, live or into a store, uses the same.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from stackwise_core.model.blocks import Stack
from stackwise_core.model.stream import EXACT, ChannelStatistics
from stackwise_core.objectives.losses import Batch
from stackwise_core.training.trunk import advance

_FLOOR = 1e-3
"""Of the mean deviation: a dead channel that comes alive later must not set the scale of all others."""
_LEAST_STD = 1e-12
"""Where no channel varies."""


def first_rows(batches: Iterable[Batch], n_rows: int) -> Iterator[Batch]:
    """Yield batches until there are `n_rows` rows, the last one cut."""
    for batch in batches:
        n_batch = len(batch["input_ids"])
        yield {key: value[:n_rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
        n_rows -= n_batch
        if n_rows <= 0:
            return


def remembering(batches: Iterator[Batch], n_rows: int, first: list[Batch]) -> Iterator[Batch]:
    """Pass batches on, and keep in `first` the inputs of the first `n_rows` rows: no loader need repeat itself."""
    for batch in batches:
        missing = n_rows - sum(len(kept["input_ids"]) for kept in first)
        if missing > 0:
            (kept,) = first_rows([batch], missing)
            first.append({key: kept[key] for key in ("input_ids", "time_step")})
        yield batch


@torch.no_grad()
def output_statistics(stacks: Sequence[Stack], entering: Iterable[Tensor]) -> dict[int, ChannelStatistics]:
    """Return the statistics of every stack's output, by creation index; few rows are in memory at a time.

    Args:
        stacks: in data-flow order, as they will be used from now on.
        entering: the stream [B, T, D] below the first of them, some rows at a time.
    """
    moments = {stack.creation_index: _Moments() for stack in stacks}
    for stream_BTD in entering:
        for stack in stacks:
            stream_BTD = advance([stack.eval()], stream_BTD, EXACT)
            moments[stack.creation_index].add(stream_BTD)
    return {index: of_stack.statistics() for index, of_stack in moments.items()}


class _Moments:
    """Sums over positions, in float64: row by row, so that they depend on no batch size."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, stream_BTD: Tensor) -> None:
        for row_TD in stream_BTD.double().cpu():
            self.count += len(row_TD)
            self.sum = self.sum + row_TD.sum(0)
            self.squares = self.squares + row_TD.square().sum(0)

    def statistics(self) -> ChannelStatistics:
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0.0).sqrt()
        floor = max(_FLOOR * std.mean().item(), _LEAST_STD)
        return ChannelStatistics(mean.float(), std.clamp_min(floor).float())
