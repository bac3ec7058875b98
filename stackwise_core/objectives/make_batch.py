"""One batch: tokens as any loader yields them become the inputs, targets and loss positions of an objective."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stackwise_core.config.arguments import check_integer
from stackwise_core.data.masks import VALIDATION_VIEW, IntArray, MaskSpec, content_ids
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch

Objective = Literal["mlm", "clm", "custom"]
_NO_TARGET = -100
"""What other tools write where there is no target."""


def make_batch(fields: Batch, mask_spec: MaskSpec | None, objective: Objective | None = None) -> Batch:
    """Return input_ids, targets, masks and sequence_ids of some sequences.

    For clm also `clm_mask` and `combined_masks`; where time is an input `time_step` [B], and for the diffusion
    bound `loss_weights` [B].

    Args:
        fields: `input_ids` [B, T]; optionally `sequence_ids` [B] (content hashes by default) and `view` (0). Where
            time steps are drawn per batch also `batch` (one number, or one per row), `slots` [B] and `batch_rows`:
            where the rows stand in their view. For the custom objective `targets` or `labels`, and `masks`.
        mask_spec: how inputs are corrupted (mlm), else None.
        objective: None is mlm with a mask spec, else clm. Custom takes the targets from the fields.
    """
    tokens, ids = tokens_and_ids(fields)
    if objective == "custom":
        batch = _custom_fields(tokens, fields)
    else:
        _check_no_targets(fields, objective or ("mlm" if mask_spec else "clm"))
        batch = _clm_fields(tokens) if mask_spec is None else _mlm_fields(tokens, ids, mask_spec, fields)
    return {**batch, "sequence_ids": torch.from_numpy(ids)}


def validation_batch(raw: Any, mask_spec: MaskSpec | None, objective: Objective | None = None) -> Batch:
    """Return a raw batch of validation sequences, corrupted by the seed and view that every run validates with."""
    fields = {**raw_fields(raw), "view": VALIDATION_VIEW}
    return make_batch(fields, mask_spec and mask_spec.for_validation(), objective)


def _clm_fields(tokens: IntArray) -> Batch:
    """Return clean inputs and the inputs shifted left; the last position has no successor and carries no loss."""
    targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    clm_mask = np.ones(tokens.shape, dtype=bool)
    clm_mask[:, -1] = False
    masks = np.ones(tokens.shape, dtype=bool)
    return _tensors(input_ids=tokens, targets=targets, masks=masks, clm_mask=clm_mask, combined_masks=masks & clm_mask)


def _mlm_fields(tokens: IntArray, ids: IntArray, mask_spec: MaskSpec, fields: Batch) -> Batch:
    """Return corrupted inputs, clean targets, the masked positions, and the time steps where time is an input."""
    view, time = fields.get("view", 0), mask_spec.time
    steps = None
    if time is not None:
        slots = fields.get("slots", np.arange(len(ids), dtype=np.int64))
        batches = np.full_like(slots, fields["batch"]) if "batch" in fields else None
        steps = time.steps(mask_spec.seed, ids, view, batches, slots, fields.get("batch_rows", len(ids)))
    masks = mask_spec.masks(ids, view, tokens.shape[1], steps)
    batch = _tensors(input_ids=mask_spec.corrupt(tokens, masks, ids, view), targets=tokens, masks=masks)
    if time is not None and steps is not None:
        batch["time_step"] = torch.from_numpy(steps)
        if time.elbo:
            batch["loss_weights"] = torch.from_numpy(1.0 / time.ratios(steps)).float()
    return batch


def _custom_fields(tokens: IntArray, fields: Batch) -> Batch:
    """Return clean inputs with the targets and loss positions that the loader gives; by default all positions."""
    name = "targets" if "targets" in fields else "labels"
    if name not in fields:
        allowed = "the custom objective needs targets [B, T] in each batch, under 'targets' or 'labels'"
        raise _bad_batch(f"a batch with {sorted(fields.keys() - {'view', 'batch'})}", allowed)
    targets, given = _integers(name, fields[name], 2), fields.get("masks")
    masks = np.ones(tokens.shape, dtype=bool) if given is None else np.asarray(given)
    if masks.dtype != np.bool_:
        raise _bad_batch(f"masks of {masks.dtype}", "booleans [B, T] are expected, True at the loss positions")
    for name, shape in (("targets", targets.shape), ("masks", masks.shape)):
        if shape != tokens.shape:
            raise ConfigError([Fault(name, str(shape), f"the shape of input_ids, {tokens.shape}, is expected")])
    if (targets[masks] == _NO_TARGET).any():  # it would count as a position without having a loss
        allowed = "no target at a loss position; give masks, False where there is no target"
        raise ConfigError([Fault("targets", str(_NO_TARGET), allowed)])
    return _tensors(input_ids=tokens, targets=targets, masks=masks)


def _tensors(**arrays: NDArray[Any]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def raw_fields(raw: Any) -> Batch:
    """Return a batch as a dict, whichever of the three forms it has: a dict, a tuple of tensors, or a tensor."""
    if not isinstance(raw, dict):
        return {"input_ids": raw[0] if isinstance(raw, (tuple, list)) and len(raw) else raw}
    for name in ("view", "batch"):
        if name in raw:
            what = "one integer for the whole batch"
            check_integer(f"base_dataloader: {name}", raw[name], VALIDATION_VIEW, what=what)
    return raw


def tokens_and_ids(fields: Batch, source: str = "base_dataloader") -> tuple[IntArray, IntArray]:
    """Return tokens [B, T] and sequence ids [B], by default content hashes; messages name the argument `source`."""
    if "input_ids" not in fields:
        raise _bad_batch(
            f"a batch with {sorted(fields.keys() - {'view', 'batch'})}", "each batch needs input_ids [B, T]", source
        )
    tokens = _integers("input_ids", fields["input_ids"], 2, source)
    if not tokens.size:
        raise _bad_batch(f"input_ids of shape {tokens.shape}", "each batch needs at least one token", source)
    ids = fields.get("sequence_ids")
    sequence_ids = content_ids(tokens) if ids is None else _integers("sequence_ids", ids, 1, source)
    if len(sequence_ids) != len(tokens):
        raise _bad_batch(f"{len(sequence_ids)} sequence_ids for {len(tokens)} rows", "one id for every row", source)
    return tokens, sequence_ids


def _check_no_targets(fields: Batch, objective: Objective) -> None:
    """Reject targets and masks where the objective makes both itself; `labels`, which many loaders add, are ignored."""
    given = [name for name in ("targets", "masks") if name in fields]
    if given:
        allowed = f"{objective} makes its own targets and masks; use objective='custom', or leave these out"
        raise _bad_batch(f"a batch with {given}", allowed)


def _integers(name: str, value: Any, n_dimensions: int, source: str = "base_dataloader") -> IntArray:
    try:
        array = np.asarray(value)
    except ValueError:
        received = f"{name} of rows that differ in length"
        raise _bad_batch(received, "a rectangle of integers is expected", source) from None
    if array.dtype.kind not in "iu" or array.ndim != n_dimensions:
        allowed = f"integers {'[B, T]' if n_dimensions == 2 else '[B]'} are expected"
        if array.dtype.kind in "iu" and array.ndim == 1:
            allowed += "; this is one row: group rows into batches, as DataLoader(..., batch_size=...) does"
        raise _bad_batch(f"{name} of {array.dtype} and shape {array.shape}", allowed, source)
    return array.astype(np.int64)


def _bad_batch(received: str, allowed: str, source: str = "base_dataloader") -> ConfigError:
    return ConfigError([Fault(source, received, allowed)])
