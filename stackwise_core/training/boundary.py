"""The frozen trunk's stream: the same bytes whether computed live, advanced from a store, or derived from tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from stackwise_core.data.masks import BoolArray, IntArray, MaskSpec
from stackwise_core.data.order import RowOrder
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.model.blocks import Stack, TokenEmbedding
from stackwise_core.model.precision import compute_dtype, held_dense
from stackwise_core.model.stream import EXACT, Stream
from stackwise_core.objectives.losses import Batch, input_time_step, several
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.objectives.trunk_activations import ReadingSource, RowSource

_POSITIONS_AT_ONCE = 2048
"""On a GPU: enough for its matrix products, and a bound for what they need."""


def rows_at_once(device: torch.device, positions: int) -> int:
    """Return how many rows of `positions` go through a frozen stack together: always so many, on this device.

    See docs/decisions/0001-one-sequence-at-a-time.md.
    """
    return 1 if device.type == "cpu" else max(1, _POSITIONS_AT_ONCE // positions)


@torch.no_grad()
def advance(stacks: Sequence[Stack], stream_BTD: Tensor, stream: Stream, documents_BT: Tensor | None = None) -> Tensor:
    """Move the frozen trunk's stream through some stacks, casting it after each to the type it is held in.

    The stacks compute on their device, on `rows_at_once` rows at a time: the bits of a matrix product can depend on
    its number of rows, and a row must have the same bytes in a training batch, in a cache being filled and in a check
    of sampled rows. What is returned lies where `stream_BTD` does; without stacks it is `stream_BTD` itself.
    """
    for stack in stacks:
        device = next(stack.parameters()).device
        group = rows_at_once(device, stream_BTD.shape[1])
        advanced_BTD = torch.empty(stream_BTD.shape, dtype=stream.given, device=stream_BTD.device)
        with held_dense(stack, compute_dtype(stack.precision, device)):  # dequantise once for all sequences
            for first in range(0, len(stream_BTD), group):
                rows = slice(first, min(first + group, len(stream_BTD)))
                documents = None if documents_BT is None else _padded(documents_BT[rows], group)
                if group == 1:  # of more rows, one must not decide by which kernel the others are computed
                    documents = several(documents)
                entering = _padded(stream_BTD[rows], group).to(device).float()
                advanced = stack(entering, documents_BT=documents)[: rows.stop - first]
                advanced_BTD[rows] = stream.cast(advanced, stack.creation_index)
        stream_BTD = advanced_BTD
    return stream_BTD


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows: those there are, and the last of them as often as one is missing."""
    lacking = count - len(rows)
    return torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])]) if lacking else rows


class LiveTrunk:
    """A frozen trunk that computes its boundary from tokens, the same bytes a store would hold."""

    def __init__(self, embedding: TokenEmbedding, stacks: Sequence[Stack], stream: Stream) -> None:
        """Take the trunk's parts, in data-flow order; nothing is copied."""
        self.embedding = embedding
        self.stacks = [stack.eval() for stack in stacks]
        self.stream = stream

    @property
    def modules(self) -> list[nn.Module]:
        """What is in memory of it."""
        return [self.embedding, *self.stacks]

    @torch.no_grad()
    def __call__(
        self, input_ids_BT: Tensor, time_step: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return the boundary of (corrupted) inputs: [B, T, D] in the type that the stream gives."""
        return advance(self.stacks, self._embedded(input_ids_BT, time_step), self.stream, documents)

    @torch.no_grad()
    def output(self, input_ids_BT: Tensor, time_step: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Return the output of the last stack before it is cast: float32 [B, T, D]."""
        below = advance(self.stacks[:-1], self._embedded(input_ids_BT, time_step), self.stream, documents)
        return advance(self.stacks[-1:], below, EXACT, documents)

    def _embedded(self, input_ids_BT: Tensor, time_step: Tensor | None) -> Tensor:
        return self.embedding(input_ids_BT.to(self.embedding.weight.device), time_step)


@dataclass(frozen=True)
class InputsFromTokens:
    """The inputs of the trunk: sequences of both splits, corrupted as for the stage that reads the boundary."""

    train: PackedSequences
    validation: PackedSequences
    mask_spec: MaskSpec | None
    order: RowOrder | None = None
    """Gives the batch of a row, where time steps are drawn per batch."""

    def batch(self, sequence_ids: IntArray, view: int) -> Batch:
        """Return a batch of some sequences; a negative view is the validation split's."""
        sequences, mask_spec = self.train, self.mask_spec
        if view < 0:
            sequences, mask_spec = self.validation, self.mask_spec and self.mask_spec.for_validation()
        row_numbers = sequences.rows_of(sequence_ids)
        fields: Batch = {**sequences.inputs(row_numbers), "view": view}
        if mask_spec and mask_spec.time and mask_spec.time.by_batch and self.order and view >= 0:
            batches, slots = self.order.places(row_numbers, view)
            fields |= {"batch": batches, "slots": slots, "batch_rows": self.order.batch_size}
        return make_batch(fields, mask_spec)


class _ReadThenComputed(ABC):
    """Rows that are read and computed, one after the other."""

    @abstractmethod
    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        """Read what the rows of some sequences need, and return what computes them."""

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        """Return the boundary of some sequences: [B, T, D]; a negative view is the validation split's."""
        return self.read(sequence_ids, view)()


@dataclass(frozen=True)
class RowsFromTokens(_ReadThenComputed):
    """A boundary derived from tokens through the whole trunk: it refills a store, and checks one."""

    inputs: InputsFromTokens
    trunk: Callable[..., Tensor]
    """Of the stage that reads the boundary: a `LiveTrunk`, or its `output`."""

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        """Corrupt the inputs of some sequences, and return what derives their boundary."""
        batch = self.inputs.batch(sequence_ids, view)
        return partial(self.trunk, batch["input_ids"], input_time_step(batch), batch.get("documents"))


@dataclass(frozen=True)
class RowsFromEither(_ReadThenComputed):
    """A boundary of which some rows are advanced from the one below, and the others derived from tokens."""

    below: ReadingSource
    tokens: ReadingSource
    is_below: Callable[[IntArray, int], BoolArray]
    """Which sequences [B] of a view are rows of the boundary below: [B]."""

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        """Read what is below some sequences, or their inputs, and return what computes their boundary."""
        is_below = self.is_below(sequence_ids, view)
        parts = [
            (np.flatnonzero(which), source.read(sequence_ids[which], view))
            for which, source in ((is_below, self.below), (~is_below, self.tokens))
            if which.any()
        ]
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return lambda: torch.cat([compute() for _, compute in parts])[torch.from_numpy(order)]


@dataclass(frozen=True)
class RowsFromBoundary(_ReadThenComputed):
    """The output of the next stack on the rows of a boundary, before it is cast: float32."""

    below: RowSource
    stack: Stack
    device: torch.device
    inputs: InputsFromTokens | None = None
    """Where documents are kept apart: which tokens are whose."""

    def read(self, sequence_ids: IntArray, view: int) -> Callable[[], Tensor]:
        """Read the rows below some sequences, and return what gives the stack's output: [B, T, D]."""
        stream_BTD = self.below.rows(sequence_ids, view)
        documents = self.inputs.batch(sequence_ids, view).get("documents") if self.inputs else None
        return lambda: advance([self.stack.eval()], stream_BTD.to(self.device), EXACT, documents)
