"""The loss of a batch, summed over its loss positions. Letters: V vocabulary, P loss positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.blocks import Head
from stackwise_core.objectives.chunked_loss import chunked_cross_entropy
from stackwise_core.stages.memory import MOST_LOGITS

Batch = dict[str, Any]
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""From logits [P, V] and targets [P] to a loss per position [P]."""


def batch_rows(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch."""
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}


def input_time_step(batch: Batch) -> Tensor | None:
    """Return the steps that the embedding takes [B]; None unless time is an input.

    With time as depth the batch holds the stack's own step, a number that no layer reads.
    """
    steps = batch.get("time_step")
    return steps if isinstance(steps, Tensor) else None


def several(documents_BT: Tensor | None) -> Tensor | None:
    """Return the numbers of documents [B, T], or None if no sequence has more than one: attention is faster then."""
    if documents_BT is None or bool((documents_BT == documents_BT[:, :1]).all()):
        return None
    return documents_BT


def loss_positions(batch: Batch) -> Tensor:
    """Return the positions that carry the loss: [B, T]."""
    return batch["combined_masks"] if "combined_masks" in batch else batch["masks"]


def loss_normaliser(batch: Batch) -> int:
    """Return what a batch's summed loss is divided by: its loss positions P, or for the diffusion bound B * T.

    In the bound a masked position stands, by its weight, for the 1 / ratio positions it was drawn from; where some
    are never masked, only the `maskable` [B, T] count.
    """
    if "loss_weights" not in batch:
        return int(loss_positions(batch).sum())
    return int(batch["maskable"].sum()) if "maskable" in batch else batch["masks"].numel()


def summed_loss(
    hidden_BTD: Tensor,
    head: Head,
    batch: Batch,
    loss_function: LossFunction | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, int]:
    """Return the loss (by default cross-entropy [nats]) summed over the loss positions, and `loss_normaliser(batch)`.

    `loss_weights` [B] of the batch, if present, multiply a sequence's losses. Without a loss position the sum is 0
    and its gradient zero. Cross-entropy on CUDA has its products in `compute`.
    """
    normaliser, device = loss_normaliser(batch), hidden_BTD.device
    positions = loss_positions(batch)
    # Counted where the batch lies, which is host memory: asking a GPU would wait for all that it still computes.
    at_P = positions.flatten().nonzero().squeeze(1)
    if not len(at_P):
        return hidden_BTD.sum() * 0.0, normaliser
    targets_P = _taken(batch["targets"], at_P, device)
    scale_P = None
    if "loss_weights" in batch:
        scale_P = _taken(batch["loss_weights"][:, None].expand(positions.shape), at_P, device)
    hidden_PD = head.norm(hidden_BTD.flatten(0, 1).index_select(0, _sent(at_P, device)))
    weight_VD = head.projection.weight
    if loss_function is None and (device.type == "cuda" or len(targets_P) * len(weight_VD) > MOST_LOGITS):
        return chunked_cross_entropy(hidden_PD, weight_VD, targets_P, scale_P, compute), normaliser
    if loss_function is None:
        reduction = "sum" if scale_P is None else "none"
        losses = F.cross_entropy(F.linear(hidden_PD, weight_VD), targets_P, reduction=reduction)
    else:
        losses = _checked(loss_function(head.projection(hidden_PD), targets_P), len(targets_P))
    return (losses if scale_P is None else losses * scale_P).sum(), normaliser


def _taken(values_BT: Tensor, at_P: Tensor, device: torch.device) -> Tensor:
    """Return the values at some positions of the batch, on a device: [P]."""
    return _sent(values_BT.flatten().index_select(0, at_P.to(values_BT.device)), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the copy to a GPU is queued there, and nobody waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _checked(losses: Any, n_positions: int) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == (n_positions,):
        return losses
    received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    allowed = f"the loss must return one number for each of the {n_positions} positions, unreduced: a tensor [P]"
    raise ConfigError([Fault("training.custom_loss", received, allowed)])
