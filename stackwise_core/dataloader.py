"""Batches: tokens in, the dictionary a stage trains on out.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise_core.data import PackedSequences
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.masking import IntArray, MaskSpec
from stackwise_core.objectives import Batch, batch_fields
from stackwise_core.order import RowOrder
from stackwise_core.trunk import RowSource

TrunkActivations = Tensor | RowSource | Callable[[Tensor], Tensor]


class PackedBatches:
    """The batches of packed sequences from one step to another, in the order all stages share."""

    def __init__(self, sequences: PackedSequences, order: RowOrder, start: int, stop: int) -> None:
        """Remember which steps to yield: start .. stop - 1."""
        self.sequences, self.order, self.start, self.stop = sequences, order, start, stop

    def __iter__(self) -> Iterator[Batch]:
        """Yield input_ids [B, T], sequence_ids [B] and the view."""
        for rows, view in self.order.batches(self.start, self.stop):
            tokens, ids = self.sequences.take(rows)
            yield {"input_ids": tokens, "sequence_ids": ids, "view": view}


class ProgressiveDataLoader:
    """Wraps any iterable of token batches and yields what a stage trains on.

    A batch may be a tensor [B, T], a tuple whose first item is one, or a dict with `input_ids` and, if
    it has them, `sequence_ids` and `view`. Sequence ids default to a content hash of the row, never
    its index; the view defaults to the number of passes made so far, modulo `views`.

    Yields a dict with input_ids, targets, masks, time_step, stack_idx, trunk_activations,
    training_objective, sequence_ids and, for clm, clm_mask and combined_masks.
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: MaskSpec | None = None,
        stack_idx: int = 0,
        trunk_activations: TrunkActivations | None = None,
        cache_activations: bool = False,
        *,
        views: int = 1,
    ) -> None:
        """Wrap a loader.

        Args:
            base_dataloader: yields token batches; iterated once per pass over this loader.
            masking_strategy: how inputs are corrupted (mlm); None is the causal objective.
            stack_idx: the creation index of the stack that trains.
            trunk_activations: the boundary below the new stack: a tensor [N, T, D] in loader order, an
                object with `rows(sequence_ids, view)`, or a callable from input_ids; None has no trunk.
            cache_activations: with a callable, keep each computed row in RAM for later passes.
            views: mask draws per sequence.
        """
        if isinstance(trunk_activations, Tensor) and views > 1:
            allowed = "a tensor holds the activations of one view; give an object with rows() or a callable"
            raise ConfigError([Fault("views", str(views), allowed)])
        self.base_dataloader = base_dataloader
        self.masking_strategy = masking_strategy
        self.stack_idx = stack_idx
        self.trunk_activations = trunk_activations
        self.cache_activations = cache_activations
        self.views = views
        self.passes = 0
        self._recorded: dict[tuple[int, int], Tensor] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        view = self.passes % self.views
        self.passes += 1
        first_row = 0
        for raw in self.base_dataloader:
            tokens, ids, own_view = _tokens_and_ids(raw)
            batch = self._batch(tokens, ids, view if own_view is None else own_view, first_row)
            first_row += len(tokens)
            yield batch

    def _batch(self, tokens: IntArray, ids: IntArray, view: int, first_row: int) -> Batch:
        batch = batch_fields(tokens, ids, view, self.masking_strategy)
        batch["time_step"] = None
        batch["stack_idx"] = self.stack_idx
        batch["training_objective"] = "clm" if self.masking_strategy is None else "mlm"
        batch["sequence_ids"] = torch.from_numpy(ids)
        batch["trunk_activations"] = self._boundary(batch["input_ids"], ids, view, first_row)
        return batch

    def _boundary(self, input_ids: Tensor, ids: IntArray, view: int, first_row: int) -> Tensor | None:
        source = self.trunk_activations
        if source is None:
            return None
        if isinstance(source, Tensor):
            if first_row + len(ids) > len(source):
                received = f"{len(source)} rows"
                raise ConfigError([Fault("trunk_activations", received, "one row for every row of the loader")])
            return source[first_row : first_row + len(ids)]
        if isinstance(source, RowSource):
            return source.rows(ids, view)
        if not callable(source):
            kind = type(source).__name__
            raise ConfigError([Fault("trunk_activations", kind, "a tensor, an object with rows(), or a callable")])
        return self._recording(source, input_ids, ids, view) if self.cache_activations else source(input_ids)

    def _recording(self, live: Callable[[Tensor], Tensor], input_ids: Tensor, ids: IntArray, view: int) -> Tensor:
        keys = [(int(sequence_id), view) for sequence_id in ids]
        new = [n for n, key in enumerate(keys) if key not in self._recorded]
        if new:
            for n, row in zip(new, live(input_ids[new]), strict=True):
                self._recorded[keys[n]] = row
        return torch.stack([self._recorded[key] for key in keys])


def _tokens_and_ids(raw: Any) -> tuple[IntArray, IntArray, int | None]:
    first = raw[0] if isinstance(raw, (tuple, list)) and len(raw) else raw
    fields: dict[str, Any] = raw if isinstance(raw, dict) else {"input_ids": first}
    if "input_ids" not in fields:
        raise _bad_batch(f"a batch with {sorted(fields)}", "each batch needs input_ids [B, T]")
    tokens = _integers("input_ids", fields["input_ids"], n_dimensions=2)
    ids = fields.get("sequence_ids")
    sequence_ids = content_ids(tokens) if ids is None else _integers("sequence_ids", ids, n_dimensions=1)
    if len(sequence_ids) != len(tokens):
        raise _bad_batch(f"{len(sequence_ids)} sequence_ids for {len(tokens)} rows", "one id for every row")
    return tokens, sequence_ids, fields.get("view")


def _integers(name: str, value: Any, n_dimensions: int) -> IntArray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise _bad_batch(f"{name} of rows that differ in length", "a rectangle of integers is expected") from None
    if array.dtype.kind not in "iu" or array.ndim != n_dimensions:
        shape = "[B, T]" if n_dimensions == 2 else "[B]"
        raise _bad_batch(f"{name} of {array.dtype} and shape {array.shape}", f"integers {shape} are expected")
    return array.astype(np.int64)


def _bad_batch(received: str, allowed: str) -> ConfigError:
    return ConfigError([Fault("base_dataloader", received, allowed)])


def content_ids(tokens: IntArray) -> IntArray:
    """Return a 64-bit content hash of each row: [B]."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(tokens)]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
