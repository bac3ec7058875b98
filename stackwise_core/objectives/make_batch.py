"""One batch: tokens as any loader yields them become the inputs, targets and loss positions of an objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise_core.config.schema import Objective
from stackwise_core.data.masks import VALIDATION_VIEW, BoolArray, IntArray, MaskSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.raw_batch import (
    NO_TARGET,
    as_array,
    attended_positions,
    bad_batch,
    integers,
    labelled_tokens,
    maskable_positions,
    named,
    raw_fields,
    tokens_and_ids,
)


def make_batch(fields: Batch, mask_spec: MaskSpec | None, objective: Objective | None = None) -> Batch:
    """Return input_ids, targets, masks and sequence_ids of some sequences.

    For clm also `clm_mask` and `combined_masks`; where time is an input `time_step` [B], and for the diffusion
    bound `loss_weights` [B]. Of padded sequences also `attention_mask` [B, T]: see `check_padding`.

    Args:
        fields: `input_ids` [B, T]; optionally `sequence_ids` [B] (content hashes by default) and `view` (0). Where
            time steps are drawn per batch also `batch` (one number, or one per row), `slots` [B] and `batch_rows`:
            where the rows stand in their view. For the custom objective `targets` or `labels`, and `masks`. Padding
            (0 in `attention_mask` [B, T]) and labels of -100 carry no loss, and mlm masks no special token (1 in
            `special_tokens_mask` [B, T]). Tokens of different numbers in `documents` [B, T] do not see each other, and
            none is predicted from another document.
        mask_spec: how inputs are corrupted (mlm), else None.
        objective: None is mlm with a mask spec, else clm. Custom takes the targets from the fields.
    """
    tokens, ids = tokens_and_ids(fields)
    attended = attended_positions(fields, tokens.shape)
    if objective == "custom":
        batch = _custom_fields(tokens, fields, attended)
    else:
        _check_no_targets(fields, objective or ("mlm" if mask_spec else "clm"))
        batch = (
            _clm_fields(tokens, fields, attended) if mask_spec is None else _mlm_fields(tokens, ids, mask_spec, fields)
        )
    if (documents := _documents(fields, tokens)) is not None:
        batch["documents"] = torch.from_numpy(documents)
    if attended is not None:
        batch["attention_mask"] = torch.from_numpy(attended)
    return {**batch, "sequence_ids": torch.from_numpy(ids)}


def validation_batch(raw: Any, mask_spec: MaskSpec | None, objective: Objective | None = None) -> Batch:
    """Return a raw batch of validation sequences, corrupted by the seed and view that every run validates with."""
    fields = {**raw_fields(raw), "view": VALIDATION_VIEW}
    return make_batch(fields, mask_spec and mask_spec.for_validation(), objective)


def _clm_fields(tokens: IntArray, fields: Batch, attended: BoolArray | None) -> Batch:
    """Return clean inputs and the inputs shifted left; the last position has no successor and carries no loss.

    A loss needs two tokens that are not padding, the second with a label if the batch has labels.
    """
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    clm_mask = np.ones(tokens.shape, dtype=bool)
    clm_mask[:, -1] = False
    masks = np.ones(tokens.shape, dtype=bool)
    if (documents := _documents(fields, tokens)) is not None:
        masks[:, :-1] &= documents[:, 1:] == documents[:, :-1]
    if attended is not None:
        masks &= attended
        masks[:, :-1] &= attended[:, 1:]
    if (labelled := labelled_tokens(fields, tokens, "clm")) is not None:
        masks[:, :-1] &= labelled[:, 1:]
    return _tensors(input_ids=tokens, targets=targets, masks=masks, clm_mask=clm_mask, combined_masks=masks & clm_mask)


def _mlm_fields(tokens: IntArray, ids: IntArray, mask_spec: MaskSpec, fields: Batch) -> Batch:
    """Return corrupted inputs, clean targets, the masked positions, and the time steps where time is an input."""
    view, time = fields.get("view", 0), mask_spec.time
    steps = drawn_steps(mask_spec, ids, fields)
    masks, maskable = mask_spec.masks(ids, view, tokens.shape[1], steps), maskable_positions(fields, tokens)
    if maskable is not None:
        masks &= maskable
    batch = _tensors(input_ids=mask_spec.corrupt(tokens, masks, ids, view), targets=tokens, masks=masks)
    if time is not None and steps is not None:
        batch["time_step"] = torch.from_numpy(steps)
        if time.elbo:
            batch["loss_weights"] = torch.from_numpy(1.0 / time.ratios(steps)).float()
            if maskable is not None:
                batch["maskable"] = torch.from_numpy(maskable)
    return batch


def _documents(fields: Batch, tokens: IntArray) -> IntArray | None:
    """Return the number of each token's document [B, T], if a batch keeps documents apart."""
    if fields.get("documents") is None:
        return None
    documents = integers("documents", fields["documents"], 2)
    if documents.shape != tokens.shape:
        raise _other_shape("documents", documents.shape, tokens.shape)
    return documents


def drawn_steps(mask_spec: MaskSpec, ids: IntArray, fields: Batch) -> IntArray | None:
    """Return the time steps of some sequences [B] as their stage draws them; None unless time is an input."""
    if mask_spec.time is None:
        return None
    slots = fields.get("slots", np.arange(len(ids), dtype=np.int64))
    batches = np.full_like(slots, fields["batch"]) if "batch" in fields else None
    n_rows = fields.get("batch_rows", len(ids))
    return mask_spec.time.steps(mask_spec.seed, ids, fields.get("view", 0), batches, slots, n_rows)


def _custom_fields(tokens: IntArray, fields: Batch, attended: BoolArray | None) -> Batch:
    """Return clean inputs with the targets and loss positions that the loader gives.

    By default these are the positions that have a target; nothing at padding.
    """
    name = next((name for name in ("targets", "labels", "second") if fields.get(name) is not None), None)
    if name is None:
        allowed = "the custom objective needs targets [B, T] in each batch, under 'targets' or 'labels'"
        raise bad_batch(named(fields), allowed)
    targets, given = integers("targets" if name == "second" else name, fields[name], 2), fields.get("masks")
    if targets.shape != tokens.shape:
        raise _other_shape("targets", targets.shape, tokens.shape)
    masks = targets != NO_TARGET if given is None else as_array("masks", given).copy()
    if masks.dtype != np.bool_:
        raise bad_batch(f"masks of {masks.dtype}", "booleans [B, T] are expected, True at the loss positions")
    if masks.shape != tokens.shape:
        raise _other_shape("masks", masks.shape, tokens.shape)
    if attended is not None:
        masks &= attended
    if (targets[masks] == NO_TARGET).any():  # it would count as a position without having a loss
        allowed = "masks says that there is a loss where there is no target; make it False there, or leave it out"
        raise ConfigError([Fault("targets", str(NO_TARGET), allowed)])
    return _tensors(input_ids=tokens, targets=targets, masks=masks)


def _other_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> ConfigError:
    return ConfigError([Fault(name, str(shape), f"the shape of input_ids, {expected}, is expected")])


def _tensors(**arrays: NDArray[Any]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check_no_targets(fields: Batch, objective: Objective) -> None:
    """Reject targets and masks where the objective makes both itself."""
    given = [name for name in ("targets", "masks") if fields.get(name) is not None]
    if given:
        allowed = f"{objective} makes its own targets and masks; use objective='custom', or leave these out"
        raise bad_batch(f"a batch with {given}", allowed)
