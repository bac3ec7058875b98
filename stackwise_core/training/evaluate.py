"""Judging a rack: validation loss, and whether cached rows are what the live rack computes.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config.schema import StreamDtype
from stackwise_core.data.masks import VALIDATION_VIEW, IntArray, MaskSpec
from stackwise_core.model.blocks import Head, Rack, Stack, TokenEmbedding
from stackwise_core.model.stream import EXACT, Stream
from stackwise_core.objectives.batches import RowSource
from stackwise_core.objectives.losses import (
    Batch,
    LossFunction,
    batch_fields,
    input_time_step,
    loss_positions,
    summed_loss,
)
from stackwise_core.training.trunk import advance

_SEQUENCES_AT_ONCE = 32

_TOLERANCE: dict[StreamDtype, float] = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2, "fp8": 0.15}
"""Relative, against the row's largest value, where kernels may sum in another order (CUDA): some rounding steps."""


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

    Args:
        embedding: of the rack.
        stacks: in data-flow order; may be loaded one by one, none is kept.
        head: as the stage that is judged left it.
        batches: validation sequences, each under one corruption; the first is the stage's own.
        stream: what the frozen trunk's stream is cast to after every stack below the boundary.
        boundary: how many stacks lie below what the stage trained.
        loss_function: of a custom objective.

    Returns:
        validation_loss on the rounded stream that the stage trained on, validation_loss_exact on the
        unrounded one, and the number of loss positions.
    """
    exact = [_embed(embedding, batch) for batch in batches]
    rounded = exact[0]
    for n, stack in enumerate(stacks):
        stack.eval()
        below = n < boundary
        if boundary:
            rounded = advance([stack], rounded, stream if below else EXACT)
        exact = [advance([stack], hidden, EXACT) for hidden in exact]
    losses: list[dict[str, float]] = []
    for n, (hidden, batch) in enumerate(zip(exact, batches, strict=True)):
        loss_exact, _ = _mean_loss(hidden, head, batch, loss_function)
        positions = int(loss_positions(batch).sum())
        loss = _mean_loss(rounded, head, batch, loss_function)[0] if n == 0 and boundary else loss_exact
        losses.append({"validation_loss": loss, "validation_loss_exact": loss_exact, "loss_positions": positions})
    return losses


def _embed(embedding: TokenEmbedding, batch: Batch) -> Tensor:
    return embedding(batch["input_ids"].to(embedding.weight.device), input_time_step(batch))


@torch.no_grad()
def evaluate_rack(
    rack: Rack, tokens_BT: IntArray, sequence_ids: IntArray, mask_spec: MaskSpec | None, depth: int | None = None
) -> float:
    """Return the validation loss of a rack in memory, unrounded [nats per loss position].

    Args:
        rack: the whole rack.
        tokens_BT: clean sequences.
        sequence_ids: [B].
        mask_spec: the corruption; None is the causal objective.
        depth: use only the first stacks, with the rack's present head; None uses all.
    """
    was_training = rack.training
    rack.eval()
    batch = batch_fields(tokens_BT, sequence_ids, VALIDATION_VIEW, mask_spec)
    steps = input_time_step(batch)
    hidden: list[Tensor] = []
    for first in range(0, len(tokens_BT), _SEQUENCES_AT_ONCE):
        rows = slice(first, first + _SEQUENCES_AT_ONCE)
        tokens = batch["input_ids"][rows].to(rack.embedding.weight.device)
        hidden.append(rack.hidden(tokens, depth, None if steps is None else steps[rows]))
    rack.train(was_training)
    return _mean_loss(torch.cat(hidden), rack.head, batch)[0]


def _mean_loss(
    hidden_BTD: Tensor, head: Head, batch: Batch, loss_function: LossFunction | None = None
) -> tuple[float, int]:
    """Return the mean loss over all loss positions, and their number; the head runs in parts."""
    total, positions = 0.0, 0
    for first in range(0, len(hidden_BTD), _SEQUENCES_AT_ONCE):
        rows = slice(first, first + _SEQUENCES_AT_ONCE)
        part = {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
        loss, count = summed_loss(hidden_BTD[rows], head, part, loss_function)
        total, positions = total + loss.item(), positions + count
    return total / max(1, positions), positions


def differing_rows(
    stored: RowSource, live: RowSource, sample: list[tuple[int, int]], dtype: StreamDtype, *, exact: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Compare sampled rows of a store with what tokens give.

    Args:
        stored: the store.
        live: the same boundary, derived again.
        sample: (sequence id, view) pairs.
        dtype: of the stream.
        exact: bit for bit (on a CPU), or within the tolerance of the dtype.

    Returns:
        How many were compared, and the pairs that differ.
    """
    differing: list[tuple[int, int]] = []
    for sequence_id, view in sample:
        ids = np.array([sequence_id], dtype=np.int64)
        row, derived = stored.rows(ids, view).cpu(), live.rows(ids, view).cpu()
        same = torch.equal(row, derived)
        if not same and not exact:
            limit = _TOLERANCE[dtype] * derived.float().abs().max()
            same = bool((row.float() - derived.float()).abs().max() <= limit)
        if not same:
            differing.append((sequence_id, view))
    return len(sample), differing
