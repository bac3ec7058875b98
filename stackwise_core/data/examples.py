"""Examples with targets for a custom objective, each padded to one length. Needs no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.content import Content, chunks_of
from stackwise_core.data.masks import BoolArray, IntArray
from stackwise_core.data.packing import Corpus
from stackwise_core.data.sequences import ArrayWriter, PackedSequences, array_path, load_split, parts_of, write_ids
from stackwise_core.data.sources import Row, parse_object
from stackwise_core.data.tokenizer import token_dtype
from stackwise_core.errors import CorpusError, shortened

_EXAMPLE_COLUMNS = ("input_ids", "targets", "masks")
_ARRAYS = {"tokens": np.uint32, "targets": np.int64, "masks": np.bool_}
_ALL = "all"
"""The split of all examples, before they are held out."""


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


_Example = tuple[IntArray, IntArray, BoolArray]
"""Tokens, targets and loss positions of one line, [length] each."""


def pack_examples(
    corpus: Corpus, form: ExampleFormat, max_sequences: int, validation_fraction: float, folder: Path | None = None
) -> tuple[PackedSequences, PackedSequences]:
    """Pad the examples of jsonl documents to one length and hold out the last of them, at least one, for validation.

    Padding is the pad token, with target 0 and without loss. `max_sequences` limits the training examples; 0 takes
    all. Examples are written into `folder` as they come and mapped; without one, into files that are gone with this
    process. Raises CorpusError if an example is wrong or a split has no loss position.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as passing:
            return pack_examples(corpus, form, max_sequences, validation_fraction, Path(passing))
    n_all, largest = _write_all(corpus, form, folder)
    n_validation = max(1, round(n_all * validation_fraction))
    n_train = max(0, n_all - n_validation)
    dtype = token_dtype(max(form.pad_token, largest) + 1)
    splits = (
        _write_range(folder, "train", 0, min(n_train, max_sequences or n_train), dtype),
        _write_range(folder, "validation", n_train, n_all, dtype),
    )
    for name in _ARRAYS:
        array_path(folder, _ALL, name).unlink()
    for name, split in zip(("training", "validation"), splits, strict=True):
        if split.masks is None or not any(part.any() for part in parts_of(split.masks)):
            raise CorpusError(
                f"data.source: got {shortened(corpus.source)}; none of its {len(split)} {name} examples "
                f"(of {n_all}) has a loss position; give more examples, or masks that are true somewhere"
            )
    return splits


def _write_all(corpus: Corpus, form: ExampleFormat, folder: Path) -> tuple[int, int]:
    """Write all examples into files of one split; return their number and the largest token."""
    writers = [ArrayWriter(array_path(folder, _ALL, name), kind, (form.seq_len,)) for name, kind in _ARRAYS.items()]
    n_all = largest = 0
    try:
        for example in _read_examples(corpus, form):
            for writer, values, filler in zip(writers, example, (form.pad_token, 0, False), strict=True):
                row = np.full(form.seq_len, filler, writer.dtype)
                row[: len(values)] = values
                writer.append(row)
            n_all, largest = n_all + 1, max(largest, int(example[0].max()))
        for writer in writers:
            writer.finish(n_all)
    finally:
        for writer in writers:
            writer.close()
    return n_all, largest


def _write_range(
    folder: Path, split: str, start: int, stop: int, dtype: type[np.uint16] | type[np.uint32]
) -> PackedSequences:
    write_ids(folder, split, stop - start)
    for name in _ARRAYS:
        array = np.load(array_path(folder, _ALL, name), mmap_mode="r", allow_pickle=False)
        kind = dtype if name == "tokens" else array.dtype
        writer = ArrayWriter(array_path(folder, split, name), kind, array.shape[1:])
        for part in parts_of(array[start:stop]):
            writer.append(part)
        writer.finish(stop - start)
    return load_split(folder, split)


def _read_examples(corpus: Corpus, form: ExampleFormat) -> Iterator[_Example]:
    for document in corpus.documents:
        for number, line in enumerate(_lines(document.content), 1):
            if line.strip():
                try:
                    yield _read_example(line, form)
                except ValueError as error:
                    raise CorpusError(f"data.source: {document.name}:{number}: {error}") from None


def _lines(content: Content) -> Iterator[bytes]:
    """Yield the lines of a text. Not by splitlines(), since a JSON string may contain other line breaks."""
    rest = b""
    for chunk in chunks_of(content):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _read_example(line: bytes, form: ExampleFormat) -> _Example:
    """Parse one line; raises ValueError with what is wrong and what to do."""
    try:
        columns = parse_object(line)
    except ValueError as error:
        expected = "one JSON object a line, with input_ids, targets and, where not every position has a loss, masks"
        raise ValueError(f"{error}; the custom objective reads {expected}") from None
    if unknown := [name for name in columns if name not in _EXAMPLE_COLUMNS]:
        raise ValueError(
            f"got the column {shortened(unknown[0])}; only {', '.join(_EXAMPLE_COLUMNS)} are read, leave it out"
        )
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
    return tokens, targets, masks


def _column(columns: Row, name: str, kind: type) -> NDArray[Any]:
    if name not in columns:
        raise ValueError(
            f"the column {name!r} is missing (it has {shortened(list(columns))}); the custom objective needs it"
        )
    values = columns[name]
    # By exact type, since a bool is an int to isinstance.
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        what = "integers" if kind is int else "true and false"
        raise ValueError(f"{name} is {shortened(values, 40)}; a list of {what} is expected")
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
