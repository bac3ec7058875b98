"""Targets, loss positions and the loss, for masked, causal and custom objectives.

Letters: B sequences, T positions, D channels, V vocabulary, P loss positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.data.masks import BoolArray, IntArray, MaskSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.blocks import Head

Batch = dict[str, Any]
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""From logits [P, V] and targets [P] to a loss per position [P]."""

_IGNORED_TARGET = -100
"""What other tools write where there is no target."""


def clm_fields(tokens: IntArray) -> Batch:
    """Return inputs, targets and masks of the causal objective.

    Targets are the inputs shifted left; the last position has no successor, so its target is its
    own token and `clm_mask` is False there. Inputs are never corrupted.

    Args:
        tokens: [B, T].
    """
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    clm_mask = np.ones(tokens.shape, dtype=bool)
    clm_mask[:, -1] = False
    masks = np.ones(tokens.shape, dtype=bool)
    return {
        "input_ids": torch.from_numpy(tokens),
        "targets": torch.from_numpy(targets),
        "masks": torch.from_numpy(masks),
        "clm_mask": torch.from_numpy(clm_mask),
        "combined_masks": torch.from_numpy(masks & clm_mask),
    }


def mlm_fields(
    tokens: IntArray, sequence_ids: IntArray, view: int, mask_spec: MaskSpec, steps: IntArray | None = None
) -> Batch:
    """Return corrupted inputs, clean targets and masks of the masked objective.

    With time-as-input also `time_step` [B], and for the diffusion bound `loss_weights` [B], 1 / ratio.

    Args:
        tokens: [B, T], clean.
        sequence_ids: [B].
        view: which mask draw.
        mask_spec: how to corrupt.
        steps: with time-as-input, the step of each sequence [B]; None draws them, if they do not go by batch.
    """
    time = mask_spec.time
    if time is not None and steps is None:
        steps = time.steps(mask_spec.seed, sequence_ids, view)
    masks = mask_spec.masks(sequence_ids, view, tokens.shape[1], steps)
    batch: Batch = {
        "input_ids": torch.from_numpy(mask_spec.corrupt(tokens, masks, sequence_ids, view)),
        "targets": torch.from_numpy(tokens),
        "masks": torch.from_numpy(masks),
    }
    if time is not None and steps is not None:
        batch["time_step"] = torch.from_numpy(steps)
        if time.elbo:
            batch["loss_weights"] = torch.from_numpy(1.0 / time.ratios(steps)).float()
    return batch


def custom_fields(tokens: IntArray, targets: IntArray, masks: BoolArray | None) -> Batch:
    """Return inputs as they are, with targets and loss positions as given.

    Args:
        tokens: [B, T].
        targets: [B, T].
        masks: loss positions [B, T]; None takes all.

    Raises:
        ConfigError: shapes differ, or a loss position has the target -100, which would count as one of
            the positions without having a loss.
    """
    masks = np.ones(tokens.shape, dtype=bool) if masks is None else masks
    for name, shape in (("targets", targets.shape), ("masks", masks.shape)):
        if shape != tokens.shape:
            raise ConfigError([Fault(name, str(shape), f"the shape of input_ids, {tokens.shape}, is expected")])
    if (targets[masks] == _IGNORED_TARGET).any():
        allowed = "no target at a loss position; give masks, False where there is no target"
        raise ConfigError([Fault("targets", str(_IGNORED_TARGET), allowed)])
    return {
        "input_ids": torch.from_numpy(tokens),
        "targets": torch.from_numpy(targets),
        "masks": torch.from_numpy(masks),
    }


def batch_fields(
    tokens: IntArray, sequence_ids: IntArray, view: int, mask_spec: MaskSpec | None, steps: IntArray | None = None
) -> Batch:
    """Return the fields of a batch: masked with a mask spec, causal without one."""
    if mask_spec is None:
        return clm_fields(tokens)
    return mlm_fields(tokens, sequence_ids, view, mask_spec, steps)


def input_time_step(batch: Batch) -> Tensor | None:
    """Return the steps that the embedding takes [B]; None unless time is an input.

    A stack's own step, with time-as-depth, is a number in the batch and no input.
    """
    steps = batch.get("time_step")
    return steps if isinstance(steps, Tensor) else None


def loss_positions(batch: Batch) -> Tensor:
    """Return the positions that carry the loss: [B, T]."""
    return batch["combined_masks"] if "combined_masks" in batch else batch["masks"]


def loss_normaliser(batch: Batch) -> int:
    """Return what a batch's summed loss is divided by.

    Its loss positions P; for the diffusion bound all positions B * T, since there a masked one stands,
    by its weight, for the 1 / ratio positions it was drawn from.
    """
    return batch["masks"].numel() if "loss_weights" in batch else int(loss_positions(batch).sum())


def summed_loss(
    hidden_BTD: Tensor, head: Head, batch: Batch, loss_fn: LossFunction | None = None
) -> tuple[Tensor, int]:
    """Sum the loss over the loss positions; the head sees no other position.

    Args:
        hidden_BTD: residual stream after the last stack.
        head: final norm and projection.
        batch: with targets and masks; `loss_weights` [B], if it has them, multiply a sequence's losses.
        loss_fn: loss of each position; None is the cross-entropy [nats].

    Returns:
        The sum, a scalar with gradient, and `loss_normaliser(batch)`. Without a loss position the sum
        is 0 and its gradient zero.

    Raises:
        ConfigError: `loss_fn` does not return one number per position.
    """
    normaliser = loss_normaliser(batch)
    positions = loss_positions(batch).to(hidden_BTD.device)
    targets_P = batch["targets"].to(hidden_BTD.device)[positions]
    if not len(targets_P):
        return hidden_BTD.sum() * 0.0, normaliser
    hidden_PD = head.norm(hidden_BTD[positions])
    weighted = "loss_weights" in batch
    if loss_fn is None:
        reduction = "none" if weighted else "sum"
        losses = F.linear_cross_entropy(hidden_PD, head.projection.weight, targets_P, reduction=reduction)
    else:
        losses = _checked(loss_fn(head.projection(hidden_PD), targets_P), len(targets_P))
    if weighted:
        weights_BT = batch["loss_weights"].to(hidden_BTD.device)[:, None].expand(positions.shape)
        losses = losses * weights_BT[positions]
    return losses.sum(), normaliser


def _checked(losses: Any, n_positions: int) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == (n_positions,):
        return losses
    received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    allowed = f"the loss must return one number for each of the {n_positions} positions, unreduced: a tensor [P]"
    raise ConfigError([Fault("training.custom_loss", received, allowed)])
