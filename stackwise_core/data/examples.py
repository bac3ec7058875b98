"""Examples with targets, for a custom objective: one JSON object per line. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.masks import BoolArray, IntArray
from stackwise_core.data.packing import FIRST_VALIDATION_ID, Corpus, PackedSequences
from stackwise_core.data.tables import Row, parse_object, shortened
from stackwise_core.data.tokenizer import TokenArray, token_dtype
from stackwise_core.errors import CorpusError

_COLUMNS = ("input_ids", "targets", "masks")
_EXPECTED = "one JSON object a line, with input_ids, targets and, where not every position has a loss, masks"


@dataclass(frozen=True)
class ExampleFormat:
    """What every example must fit."""

    seq_len: int
    """The longest example allowed, and the length that all are padded to [tokens]."""
    vocab_size: int
    """Tokens must be below this."""
    pad_token: int
    targets_are_tokens: bool
    """Whether targets at loss positions must be tokens; a custom loss may take any integer."""


@dataclass(frozen=True)
class Example:
    """One line: tokens, targets and loss positions, [length] each."""

    tokens: IntArray
    targets: IntArray
    masks: BoolArray


def pack_examples(
    corpus: Corpus, form: ExampleFormat, max_sequences: int, validation_fraction: float
) -> tuple[PackedSequences, PackedSequences]:
    """Pad examples to one length and hold out the last of them, at least one, for validation.

    Files are read in the order of their content hashes. Padding is the pad token, with target 0 and without loss.

    Args:
        corpus: of jsonl files.
        form: what every example must fit.
        max_sequences: at most this many for training; 0 takes all.
        validation_fraction: of the examples.

    Returns:
        The train and the validation sequences, with targets and masks.

    Raises:
        CorpusError: an example is wrong, or a split has no loss position.
    """
    examples = list(_read_examples(corpus, form))
    n_validation = max(1, round(len(examples) * validation_fraction))
    n_train = max(0, len(examples) - n_validation)
    dtype = token_dtype(max([form.pad_token, *(int(example.tokens.max()) for example in examples)]) + 1)
    train = _padded(examples[: min(n_train, max_sequences or n_train)], form, dtype, first_id=0)
    validation = _padded(examples[n_train:], form, dtype, FIRST_VALIDATION_ID)
    for name, split in (("training", train), ("validation", validation)):
        if split.masks is None or not split.masks.any():
            raise CorpusError(
                f"data.source: got {corpus.source!r}; none of its {len(split)} {name} examples (of {len(examples)}) "
                "has a loss position; give more examples, or masks that are true somewhere"
            )
    return train, validation


def _padded(
    examples: list[Example], form: ExampleFormat, dtype: type[np.uint16] | type[np.uint32], first_id: int
) -> PackedSequences:
    shape = (len(examples), form.seq_len)
    tokens: TokenArray = np.full(shape, form.pad_token, dtype=dtype)
    targets, masks = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = example.tokens
        targets[row, :length] = example.targets
        masks[row, :length] = example.masks
    return PackedSequences(tokens, first_id + np.arange(len(examples), dtype=np.int64), targets, masks)


def _read_examples(corpus: Corpus, form: ExampleFormat) -> Iterator[Example]:
    for document in corpus.documents:
        # Not splitlines(), since a JSON string may contain other line breaks.
        for number, line in enumerate(bytes(document.content).split(b"\n"), 1):
            if line.strip():
                try:
                    yield _read_example(line, form)
                except ValueError as error:
                    raise CorpusError(f"data.source: {document.name}:{number}: {error}") from None


def _read_example(line: bytes, form: ExampleFormat) -> Example:
    """Return the example of a line; raises ValueError with what is wrong and what to do."""
    try:
        columns = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{error}; the custom objective reads {_EXPECTED}") from None
    if unknown := [name for name in columns if name not in _COLUMNS]:
        raise ValueError(f"got the column {unknown[0]!r}; only {', '.join(_COLUMNS)} are read, leave it out")
    tokens, targets = _column(columns, "input_ids", int), _column(columns, "targets", int)
    masks = _column(columns, "masks", bool) if "masks" in columns else np.ones(len(tokens), dtype=np.bool_)
    for name, column in (("targets", targets), ("masks", masks)):
        if len(column) != len(tokens):
            raise ValueError(f"got {len(column)} {name} for {len(tokens)} input_ids; give one for each")
    if not 0 < len(tokens) <= form.seq_len:
        raise ValueError(f"got {len(tokens)} input_ids; give 1 to data.seq_len = {form.seq_len}, or raise that")
    _check_vocabulary("input_ids", "token", tokens, form)
    if form.targets_are_tokens:
        _check_vocabulary("targets", "target", targets[masks], form)
    return Example(tokens, targets, masks)


def _column(columns: Row, name: str, kind: type) -> NDArray[Any]:
    if name not in columns:
        raise ValueError(f"the column {name!r} is missing (it has {list(columns)}); the custom objective needs it")
    values = columns[name]
    # By exact type, since a bool is an int to isinstance.
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        what = "integers" if kind is int else "true and false"
        raise ValueError(f"{name} is {shortened(values)}; a list of {what} is expected")
    try:
        return np.array(values, dtype=np.int64 if kind is int else np.bool_)
    except OverflowError:
        raise ValueError(f"{name} holds a number that does not fit into 64 bits; use a smaller one") from None


def _check_vocabulary(name: str, what: str, values: IntArray, form: ExampleFormat) -> None:
    outside = values[(values < 0) | (values >= form.vocab_size)]
    if len(outside):
        remedy = "correct it, or raise model.vocab_size" if outside[0] >= 0 else "correct it"
        if name == "targets":
            remedy += ", or give masks that are false where there is no target"
        raise ValueError(f"{name} hold the {what} {outside[0]}, outside 0 to {form.vocab_size - 1}; {remedy}")
