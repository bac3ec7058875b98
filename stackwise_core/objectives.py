"""Targets, loss positions and the loss, for masked and causal objectives.

Letters: B sequences, T positions, D channels, V vocabulary, P loss positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.masking import IntArray, MaskSpec
from stackwise_core.model import Head

Batch = dict[str, Any]


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


def mlm_fields(tokens: IntArray, sequence_ids: IntArray, view: int, mask_spec: MaskSpec) -> Batch:
    """Return corrupted inputs, clean targets and masks of the masked objective.

    Args:
        tokens: [B, T], clean.
        sequence_ids: [B].
        view: which mask draw.
        mask_spec: how to corrupt.
    """
    masks = mask_spec.masks(sequence_ids, view, tokens.shape[1])
    return {
        "input_ids": torch.from_numpy(mask_spec.corrupt(tokens, masks, sequence_ids, view)),
        "targets": torch.from_numpy(tokens),
        "masks": torch.from_numpy(masks),
    }


def batch_fields(tokens: IntArray, sequence_ids: IntArray, view: int, mask_spec: MaskSpec | None) -> Batch:
    """Return the fields of a batch: masked with a mask spec, causal without one."""
    if mask_spec is None:
        return clm_fields(tokens)
    return mlm_fields(tokens, sequence_ids, view, mask_spec)


def loss_positions(batch: Batch) -> Tensor:
    """Return the positions that carry the loss: [B, T]."""
    return batch["combined_masks"] if "combined_masks" in batch else batch["masks"]


def summed_loss(hidden_BTD: Tensor, head: Head, batch: Batch) -> tuple[Tensor, int]:
    """Sum the cross-entropy over the loss positions; the head sees no other position.

    Args:
        hidden_BTD: residual stream after the last stack.
        head: final norm and projection.
        batch: with targets and masks.

    Returns:
        The sum [nats], a scalar with gradient, and P. With P = 0 the sum is 0 and its gradient zero.
    """
    positions = loss_positions(batch).to(hidden_BTD.device)
    targets_P = batch["targets"].to(hidden_BTD.device)[positions]
    if not len(targets_P):
        return hidden_BTD.sum() * 0.0, 0
    hidden_PD = head.norm(hidden_BTD[positions])
    loss = F.linear_cross_entropy(hidden_PD, head.projection.weight, targets_P, reduction="sum")
    return loss, len(targets_P)
