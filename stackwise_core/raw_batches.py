"""What a loader of anyone yields, read and checked: tokens, ids, targets and masks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.masking import BoolArray, IntArray, content_ids
from stackwise_core.objectives import Batch

Objective = Literal["mlm", "clm", "custom"]


def raw_fields(raw: Any) -> Batch:
    """Return a batch as a dict, whatever of the three forms it has."""
    if isinstance(raw, dict):
        return raw
    return {"input_ids": raw[0] if isinstance(raw, (tuple, list)) and len(raw) else raw}


def tokens_and_ids(fields: Batch) -> tuple[IntArray, IntArray]:
    """Return tokens [B, T] and sequence ids [B], by default content hashes of the rows."""
    if "input_ids" not in fields:
        raise _bad_batch(f"a batch with {sorted(fields)}", "each batch needs input_ids [B, T]")
    tokens = _integers("input_ids", fields["input_ids"], n_dimensions=2)
    if not tokens.size:
        raise _bad_batch(f"input_ids of shape {tokens.shape}", "each batch needs at least one token")
    ids = fields.get("sequence_ids")
    sequence_ids = content_ids(tokens) if ids is None else _integers("sequence_ids", ids, n_dimensions=1)
    if len(sequence_ids) != len(tokens):
        raise _bad_batch(f"{len(sequence_ids)} sequence_ids for {len(tokens)} rows", "one id for every row")
    return tokens, sequence_ids


def targets_and_masks(fields: Batch) -> tuple[IntArray, BoolArray | None]:
    """Return targets [B, T] and, if given, loss positions [B, T] of the custom objective."""
    name = "targets" if "targets" in fields else "labels"
    if name not in fields:
        allowed = "the custom objective needs targets [B, T] in each batch, under 'targets' or 'labels'"
        raise _bad_batch(f"a batch with {sorted(fields)}", allowed)
    targets = _integers(name, fields[name], n_dimensions=2)
    if fields.get("masks") is None:
        return targets, None
    masks = np.asarray(fields["masks"])
    if masks.dtype != np.bool_:
        raise _bad_batch(f"masks of {masks.dtype}", "booleans [B, T] are expected, True at the loss positions")
    return targets, masks


def refuse_own_targets(fields: Batch, objective: Objective) -> None:
    """Refuse a batch that brings what the objective makes itself."""
    own = [name for name in ("targets", "masks") if name in fields]
    if own:
        allowed = f"{objective} makes its own targets and masks; use objective='custom', or leave these out"
        raise _bad_batch(f"a batch with {own}", allowed)


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
