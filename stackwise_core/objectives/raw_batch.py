"""A batch as users write it: a tensor, a tuple, or a mapping as Hugging Face's collators make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stackwise_core.config.arguments import check_integer
from stackwise_core.data.masks import VALIDATION_VIEW, BoolArray, IntArray, content_ids
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch

NO_TARGET = -100
"""What Hugging Face and torch write where there is no target."""


def raw_fields(raw: Any) -> Batch:
    """Return a batch as a dict, whichever form it has: a mapping, a named tuple, a tuple of tensors, rows or a tensor.

    The second item of a tuple comes under `second`, since only the custom objective reads it.
    """
    if hasattr(raw, "_asdict") and "input_ids" in (named := raw._asdict()):
        raw = named
    if isinstance(raw, (tuple, list)) and len(raw) and not _is_rows(raw):
        return {"input_ids": raw[0], **({"second": raw[1]} if len(raw) == 2 else {})}
    if not isinstance(raw, Mapping):  # Hugging Face's BatchEncoding is a mapping, and no dict
        return {"input_ids": raw}
    fields = dict(cast("Mapping[str, Any]", raw))
    for name in ("view", "batch"):
        if name in fields:
            what = "one integer for the whole batch"
            check_integer(f"base_dataloader: {name}", fields[name], VALIDATION_VIEW, what=what)
    return fields


def _is_rows(raw: Any) -> bool:
    """Return whether a list holds lists of numbers; a list of tensors is what torch makes of a tuple."""
    first = raw[0] if isinstance(raw, list) else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], int)


def tokens_and_ids(fields: Batch, source: str = "base_dataloader") -> tuple[IntArray, IntArray]:
    """Return tokens [B, T] and sequence ids [B], by default content hashes; messages name the argument `source`."""
    if "input_ids" not in fields:
        raise bad_batch(named(fields), "each batch needs input_ids [B, T]", source)
    tokens = integers("input_ids", fields["input_ids"], 2, source)
    if not tokens.size:
        raise bad_batch(f"input_ids of shape {tokens.shape}", "each batch needs at least one token", source)
    ids = fields.get("sequence_ids")
    sequence_ids = content_ids(tokens) if ids is None else integers("sequence_ids", ids, 1, source)
    if len(sequence_ids) != len(tokens):
        raise bad_batch(f"{len(sequence_ids)} sequence_ids for {len(tokens)} rows", "one id for every row", source)
    return tokens, sequence_ids


def attended_positions(fields: Batch, shape: tuple[int, ...]) -> BoolArray | None:
    """Return where `attention_mask` says that there is a token, not padding [B, T]; None where nothing is padded."""
    attended = _flags(fields, "attention_mask", shape)
    return None if attended is None or attended.all() else attended


def check_padding(attention_mask: Any, *, causal: bool) -> None:
    """Reject padding [B, T] that a token would attend to, since blocks take no padding mask."""
    attended = as_array("attention_mask", attention_mask)
    if not causal and not attended.all():
        allowed = (
            "attention is bidirectional and blocks take no padding mask, so every token would see the padding: pack "
            "sequences to one length, or use training_objective clm with padding on the right"
        )
        raise ConfigError([Fault("attention_mask", "padding", allowed)])
    if (attended[:, 1:] & ~attended[:, :-1]).any():
        allowed = (
            "blocks take no padding mask, so the tokens after it would see the padding: pad on the right "
            "(padding_side='right'), or pack sequences to one length"
        )
        raise ConfigError([Fault("attention_mask", "padding before a token", allowed)])


def labelled_tokens(fields: Batch, tokens: IntArray, objective: str) -> BoolArray | None:
    """Return which tokens [B, T] the `labels` of a batch let a loss be asked for: those whose label is not -100.

    Labels repeat the tokens, in place or shifted left by one. Others are of a loss that the objective does not have,
    or of inputs that a collator has corrupted. None without labels for every token.
    """
    labels = as_array("labels", fields.get("labels"))
    if labels.shape != tokens.shape:  # labels of sequences
        return None
    given = labels != NO_TARGET
    if (labels == tokens)[given].all():
        return given
    if (labels[:, :-1] == tokens[:, 1:])[given[:, :-1]].all():
        return np.concatenate([np.ones_like(given[:, :1]), given[:, :-1]], axis=1)
    allowed = (
        f"{objective} makes its targets from input_ids, which no collator may have masked before: leave labels out, "
        "or use the custom objective"
    )
    raise bad_batch("labels that are not the tokens of input_ids", allowed)


def maskable_positions(fields: Batch, tokens: IntArray) -> BoolArray | None:
    """Return where mlm may mask [B, T]: not at padding, special tokens and labels of -100. None is everywhere."""
    special = _flags(fields, "special_tokens_mask", tokens.shape)
    limits = [
        attended_positions(fields, tokens.shape),
        None if special is None else ~special,
        labelled_tokens(fields, tokens, "mlm"),
    ]
    given = [limit for limit in limits if limit is not None and not limit.all()]
    return np.logical_and.reduce(given) if given else None


def _flags(fields: Batch, name: str, shape: tuple[int, ...]) -> BoolArray | None:
    """Return a field of zeros and ones [B, T] as booleans; None if the batch has none."""
    if (given := fields.get(name)) is None:
        return None
    array = as_array(name, given)
    if array.shape != shape:
        raise ConfigError([Fault(name, str(array.shape), f"the shape of input_ids, {shape}, is expected")])
    if array.dtype.kind not in "biu" or ((array != 0) & (array != 1)).any():
        raise bad_batch(f"{name} of {array.dtype}", "booleans, or zeros and ones, [B, T] are expected")
    return array.astype(bool)


def integers(name: str, value: Any, n_dimensions: int, source: str = "base_dataloader") -> IntArray:
    """Return a field as integers [B, T] or [B]."""
    array = as_array(name, value, source)
    if array.dtype.kind not in "iu" or array.ndim != n_dimensions:
        allowed = f"integers {'[B, T]' if n_dimensions == 2 else '[B]'} are expected"
        if array.dtype.kind in "iu" and array.ndim == 1:
            allowed += "; this is one row: group rows into batches, as DataLoader(..., batch_size=...) does"
        raise bad_batch(f"{name} of {array.dtype} and shape {array.shape}", allowed, source)
    return array.astype(np.int64)


def as_array(name: str, value: Any, source: str = "base_dataloader") -> NDArray[Any]:
    """Return a field as an array; a tensor may be on any device."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError:
        received, allowed = f"{name} of rows that differ in length", "rows of one length are expected: pad or pack them"
        raise bad_batch(received, allowed, source) from None


def named(fields: Batch) -> str:
    """Return what a message calls a batch: the keys that its loader gave it."""
    return f"a batch with {sorted(map(str, fields.keys() - {'view', 'batch', 'second'}))}"


def bad_batch(received: str, allowed: str, source: str = "base_dataloader") -> ConfigError:
    """Return the error of a batch that cannot be used."""
    return ConfigError([Fault(source, received, allowed)])
