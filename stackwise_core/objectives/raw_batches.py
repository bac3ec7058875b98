"""What a loader of anyone yields, read and checked: tokens, ids, targets and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from torch import Tensor

from stackwise_core.config.arguments import check_integer, describe
from stackwise_core.data.masks import VALIDATION_VIEW, BoolArray, IntArray, content_ids
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch

Objective = Literal["mlm", "clm", "custom"]


def check_loader(name: str, loader: Any) -> None:
    """Refuse what cannot be a loader of batches, before the first of them is asked for.

    Raises:
        ConfigError: names the argument, what it is, and what to do.
    """
    allowed = "anything that yields batches is expected: a DataLoader, or a list of tensors [B, T]"
    if isinstance(loader, (str, bytes, dict)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise ConfigError([Fault(name, describe(loader), allowed)])
    if isinstance(loader, (Tensor, np.ndarray)) and loader.ndim != 3:
        allowed = "rows are no batches: wrap it in DataLoader(..., batch_size=...), or cut it into tensors [B, T]"
        raise ConfigError([Fault(name, describe(loader), allowed)])


def one_pass(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one pass over a loader.

    Raises:
        ConfigError: there is none, as in a generator that an earlier pass has used up.
    """
    empty = True
    for raw in loader:
        empty = False
        yield raw
    if empty:
        received = (
            "an iterator that is used up" if isinstance(loader, Iterator) else f"no batch from {describe(loader)}"
        )
        allowed = (
            "every epoch of every stage is a pass of its own over it and needs the batches again: "
            "give a list of them, a DataLoader, or an object whose __iter__ starts anew"
        )
        raise _bad_batch(received, allowed)


def raw_fields(raw: Any) -> Batch:
    """Return a batch as a dict, whatever of the three forms it has."""
    if not isinstance(raw, dict):
        return {"input_ids": raw[0] if isinstance(raw, (tuple, list)) and len(raw) else raw}
    for name in ("view", "batch"):
        if name in raw:
            check_integer(
                f"base_dataloader: {name}", raw[name], VALIDATION_VIEW, what="one integer for the whole batch"
            )
    return raw


def tokens_and_ids(fields: Batch, source: str = "base_dataloader") -> tuple[IntArray, IntArray]:
    """Return tokens [B, T] and sequence ids [B], by default content hashes of the rows.

    Args:
        fields: a batch.
        source: the argument that it came by, for messages.
    """
    if "input_ids" not in fields:
        raise _bad_batch(f"a batch with {sorted(fields)}", "each batch needs input_ids [B, T]", source)
    tokens = _integers("input_ids", fields["input_ids"], 2, source)
    if not tokens.size:
        raise _bad_batch(f"input_ids of shape {tokens.shape}", "each batch needs at least one token", source)
    ids = fields.get("sequence_ids")
    sequence_ids = content_ids(tokens) if ids is None else _integers("sequence_ids", ids, 1, source)
    if len(sequence_ids) != len(tokens):
        raise _bad_batch(f"{len(sequence_ids)} sequence_ids for {len(tokens)} rows", "one id for every row", source)
    return tokens, sequence_ids


def targets_and_masks(fields: Batch) -> tuple[IntArray, BoolArray | None]:
    """Return targets [B, T] and, if given, loss positions [B, T] of the custom objective."""
    name = "targets" if "targets" in fields else "labels"
    if name not in fields:
        allowed = "the custom objective needs targets [B, T] in each batch, under 'targets' or 'labels'"
        raise _bad_batch(f"a batch with {sorted(fields)}", allowed)
    targets = _integers(name, fields[name], 2)
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


def _integers(name: str, value: Any, n_dimensions: int, source: str = "base_dataloader") -> IntArray:
    try:
        array = np.asarray(value)
    except ValueError:
        received = f"{name} of rows that differ in length"
        raise _bad_batch(received, "a rectangle of integers is expected", source) from None
    if array.dtype.kind not in "iu" or array.ndim != n_dimensions:
        shape = "[B, T]" if n_dimensions == 2 else "[B]"
        allowed = f"integers {shape} are expected"
        if array.dtype.kind in "iu" and array.ndim == 1:
            allowed += "; this is one row: group rows into batches, as DataLoader(..., batch_size=...) does"
        raise _bad_batch(f"{name} of {array.dtype} and shape {array.shape}", allowed, source)
    return array.astype(np.int64)


def _bad_batch(received: str, allowed: str, source: str = "base_dataloader") -> ConfigError:
    return ConfigError([Fault(source, received, allowed)])
