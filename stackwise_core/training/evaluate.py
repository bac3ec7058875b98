"""Evaluating a rack: its validation loss, and whether cached rows are what the live rack computes.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config.schema import StreamDtype
from stackwise_core.model.blocks import Head, Stack, TokenEmbedding
from stackwise_core.model.stream import EXACT, Stream
from stackwise_core.objectives.dataloader import RowSource
from stackwise_core.objectives.losses import (
    Batch,
    LossFunction,
    batch_rows,
    input_time_step,
    loss_positions,
    summed_loss,
)
from stackwise_core.training.boundary import advance

_SEQUENCES_AT_ONCE = 32

_TOLERANCE: dict[StreamDtype, float] = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2, "fp8": 0.15}
"""Some rounding steps, relative to the row's largest value, where kernels may sum in another order (CUDA)."""


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
        stream: how the frozen trunk's stream is held after every stack below the boundary.
        boundary: how many stacks lie below what the stage trained.
        loss_function: of a custom objective.

    Returns:
        validation_loss on the rounded stream that the stage trained on, validation_loss_exact on the
        unrounded one, and the number of loss positions.
    """
    exact = [embedding(batch["input_ids"].to(embedding.weight.device), input_time_step(batch)) for batch in batches]
    rounded = exact[0]
    for n, stack in enumerate(stacks):
        stack.eval()
        if boundary:
            rounded = advance([stack], rounded, stream if n < boundary else EXACT)
        exact = [advance([stack], hidden, EXACT) for hidden in exact]
    losses: list[dict[str, float]] = []
    for n, (hidden, batch) in enumerate(zip(exact, batches, strict=True)):
        loss_exact = _mean_loss(hidden, head, batch, loss_function)
        positions = int(loss_positions(batch).sum())
        loss = _mean_loss(rounded, head, batch, loss_function) if n == 0 and boundary else loss_exact
        losses.append({"validation_loss": loss, "validation_loss_exact": loss_exact, "loss_positions": positions})
    return losses


def _mean_loss(hidden_BTD: Tensor, head: Head, batch: Batch, loss_function: LossFunction | None) -> float:
    """Return the mean loss over all loss positions; the head runs on some sequences at a time."""
    total, normaliser = 0.0, 0
    for first in range(0, len(hidden_BTD), _SEQUENCES_AT_ONCE):
        rows = slice(first, first + _SEQUENCES_AT_ONCE)
        loss, count = summed_loss(hidden_BTD[rows], head, batch_rows(batch, rows), loss_function)
        total, normaliser = total + loss.item(), normaliser + count
    return total / max(1, normaliser)


def differing_rows(
    stored: RowSource, live: RowSource, sample: list[tuple[int, int]], dtype: StreamDtype, *, exact: bool
) -> list[tuple[int, int]]:
    """Return the (sequence id, view) pairs of a sample whose stored row is not what tokens give.

    Args:
        stored: the store.
        live: the same boundary, derived again.
        sample: (sequence id, view) pairs.
        dtype: of the stream.
        exact: bit for bit (on a CPU), or within the tolerance of the dtype.
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
    return differing
