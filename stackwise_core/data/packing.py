"""Corpora and their packed sequences: text and tokens are cut to one length, examples are padded. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.masks import SALT_ORDER, BoolArray, IntArray, hash_bits
from stackwise_core.data.sources import Content, Document, Row, documents_of, parse_object, tokens_in
from stackwise_core.data.tokenizer import TokenArray, Tokenizer, token_dtype
from stackwise_core.errors import CorpusError, shortened

FIRST_VALIDATION_ID = 1 << 40
"""Validation sequences are numbered from here, so that an id shows its split."""
_LEAST_VALIDATION = 32
_SAMPLE_SEED = 20_260_102
"""Of the hashes that choose a sample, the same in every run."""
_EXAMPLE_COLUMNS = ("input_ids", "targets", "masks")


@dataclass(frozen=True)
class Corpus:
    """Documents ordered by content hash, so that names and folders do not matter."""

    source: str
    documents: tuple[Document, ...]
    digest: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all texts, or number of all tokens."""
        return sum(document.n_bytes for document in self.documents)

    @property
    def token_width(self) -> int:
        """Bytes of a token; 0 if the documents are text."""
        return self.documents[0].token_width

    @property
    def is_tokens(self) -> bool:
        """Whether the documents are tokens rather than text."""
        return self.documents[0].is_tokens


@dataclass(frozen=True)
class PackedSequences:
    """One split: tokens [N, T] (unsigned) and stable ids [N] (int64)."""

    tokens: TokenArray
    sequence_ids: IntArray
    targets: IntArray | None = None
    """For a custom objective: [N, T]."""
    masks: BoolArray | None = None
    """For a custom objective, True at the loss positions: [N, T]."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def take(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return tokens [B, T] and sequence ids [B] of some rows."""
        return self.tokens[rows].astype(np.int64), self.sequence_ids[rows]

    def fields(self, rows: IntArray) -> dict[str, NDArray[Any]]:
        """Return a batch of some rows: input_ids [B, T], sequence_ids [B], and targets and masks if there are any."""
        tokens, ids = self.take(rows)
        own = {"targets": self.targets, "masks": self.masks}
        given = {name: array[rows] for name, array in own.items() if array is not None}
        return {"input_ids": tokens, "sequence_ids": ids, **given}

    def rows_of(self, sequence_ids: IntArray) -> IntArray:
        """Return the row numbers of sequence ids; ids are consecutive within a split."""
        return sequence_ids - self.sequence_ids[0]


def read_corpus(source: str, *, examples: bool = False, token_type: str = "auto") -> Corpus:
    """Read every document of a source (see `documents_of`); files of tokens are memory-mapped."""
    read = documents_of(source, examples=examples, token_type=token_type)
    found = (document for document in read if document.content)
    documents = tuple(sorted(found, key=lambda document: document.digest))
    return Corpus(source, documents, _digest(source, [document.digest for document in documents]))


def corpus_facts(source: str, *, examples: bool = False, token_type: str = "auto") -> tuple[str, int]:
    """Return the content hash of a source and its size, holding one document in memory at a time."""
    found = documents_of(source, examples=examples, token_type=token_type)
    facts = sorted((document.digest, document.n_bytes) for document in found if document.content)
    return _digest(source, [digest for digest, _ in facts]), sum(n_bytes for _, n_bytes in facts)


def _digest(source: str, digests: list[str]) -> str:
    if not digests:
        raise CorpusError(f"data.source: got {shortened(source)}; every file it names is empty")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def pack(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_sequences: int, validation_fraction: float
) -> tuple[PackedSequences, PackedSequences]:
    """Split documents into train and validation, then cut each split into sequences of `seq_len` tokens.

    Each text is followed by the tokenizer's end token, if it has one. Tokens that do not fill the last sequence are
    dropped. `max_sequences` limits the training sequences; 0 takes all. Raises CorpusError if a split is empty.
    """
    width = corpus.token_width
    cut = functools.partial(_cut_tokens, width) if width else functools.partial(_cut_text, tokenizer)
    train_parts, validation_parts = _split(corpus, validation_fraction)
    train = cut(train_parts, seq_len, max_sequences)
    validation = cut(validation_parts, seq_len, 0)
    for name, tokens in (("train", train), ("validation", validation)):
        if not len(tokens):
            what = "tokens" if corpus.is_tokens else "bytes"
            raise CorpusError(
                f"data.source: got {shortened(corpus.source)}; its {corpus.n_bytes:,} {what} fill no {name} sequence "
                f"of data.seq_len = {seq_len} tokens; give more text, a smaller seq_len or another "
                "data.validation_fraction"
            )
    validation_ids = FIRST_VALIDATION_ID + np.arange(len(validation), dtype=np.int64)
    return PackedSequences(train, np.arange(len(train), dtype=np.int64)), PackedSequences(validation, validation_ids)


def spread_sample(
    train: PackedSequences, validation: PackedSequences, most: int
) -> tuple[PackedSequences, PackedSequences]:
    """Return `most` training sequences, and the same share of the validation sequences, but at least 32 if there are.

    Each is chosen by a hash from one of as many equal parts of its split, so that the sample is of the whole corpus.
    """
    if len(train) <= most:
        return train, validation
    n_validation = max(_LEAST_VALIDATION, math.ceil(len(validation) * most / len(train)))
    return _sample(train, most), _sample(validation, min(n_validation, len(validation)))


def _sample(split: PackedSequences, most: int) -> PackedSequences:
    bounds = np.arange(most + 1, dtype=np.int64) * len(split) // most
    widths = (bounds[1:] - bounds[:-1]).astype(np.uint64)
    rows = bounds[:-1] + (hash_bits(_SAMPLE_SEED, SALT_ORDER, bounds[:-1]) % widths).astype(np.int64)
    targets = None if split.targets is None else split.targets[rows]
    masks = None if split.masks is None else split.masks[rows]
    return PackedSequences(split.tokens[rows], split.sequence_ids[:most], targets, masks)


def _split(corpus: Corpus, fraction: float) -> tuple[list[Content], list[Content]]:
    """Hold out complete documents; if those exceed the fraction by over a quarter, hold out the end of each instead.

    Documents of equal content are never split between the two sides.
    """
    contents = [document.content for document in corpus.documents]
    wanted = fraction * sum(map(len, contents))
    held, size = 0, 0
    while size < wanted or (0 < held < len(contents) and contents[held] == contents[held - 1]):
        size += len(contents[held])
        held += 1
    if size <= 1.25 * wanted:
        return contents[held:], contents[:held]
    cuts = [(content, _cut_before(content, 1 - fraction, corpus.token_width)) for content in contents]
    return [content[:cut] for content, cut in cuts], [content[cut:] for content, cut in cuts]


def _cut_before(content: Content, share: float, token_width: int) -> int:
    """Return where about a share of the bytes ends: at the start of a token, or of a UTF-8 character."""
    cut = round(len(content) * share)
    if token_width:
        return cut - cut % token_width
    while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _cut_text(tokenizer: Tokenizer, texts: list[Content], seq_len: int, most: int) -> TokenArray:
    """Return at most `most` sequences of texts [N, T]; 0 returns all."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    end = np.array([] if tokenizer.end_token is None else [tokenizer.end_token], dtype)
    buffer, wanted = bytearray(), most * seq_len * dtype.itemsize  # not a list, for one copy of the tokens
    for text in texts:
        buffer += tokenizer.encode(bytes(text)).data
        buffer += end.data
        if wanted and len(buffer) >= wanted:
            break
    return _rows(np.frombuffer(buffer, dtype), seq_len, most)


def _cut_tokens(width: int, parts: list[Content], seq_len: int, most: int) -> TokenArray:
    """Return at most `most` sequences of files of tokens [N, T]; a single file is not copied."""
    pieces = [tokens_in(part, width) for part in parts if len(part)]
    if len(pieces) == 1:
        return _rows(pieces[0], seq_len, most)
    return _rows(np.concatenate([np.empty(0, f"<u{width}"), *pieces]), seq_len, most)


def _rows(tokens: TokenArray, seq_len: int, most: int) -> TokenArray:
    n_rows = len(tokens) // seq_len
    n_rows = min(n_rows, most or n_rows)
    return tokens[: n_rows * seq_len].reshape(n_rows, seq_len)


# ---------------------------------------------------------------- examples with targets


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
    corpus: Corpus, form: ExampleFormat, max_sequences: int, validation_fraction: float
) -> tuple[PackedSequences, PackedSequences]:
    """Pad the examples of jsonl documents to one length and hold out the last of them, at least one, for validation.

    Padding is the pad token, with target 0 and without loss. `max_sequences` limits the training examples; 0 takes
    all. Raises CorpusError if an example is wrong or a split has no loss position.
    """
    examples = list(_read_examples(corpus, form))
    n_validation = max(1, round(len(examples) * validation_fraction))
    n_train = max(0, len(examples) - n_validation)
    dtype = token_dtype(max([form.pad_token, *(int(tokens.max()) for tokens, _, _ in examples)]) + 1)
    train = _padded(examples[: min(n_train, max_sequences or n_train)], form, dtype, first_id=0)
    validation = _padded(examples[n_train:], form, dtype, FIRST_VALIDATION_ID)
    for name, split in (("training", train), ("validation", validation)):
        if split.masks is None or not split.masks.any():
            raise CorpusError(
                f"data.source: got {shortened(corpus.source)}; none of its {len(split)} {name} examples "
                f"(of {len(examples)}) has a loss position; give more examples, or masks that are true somewhere"
            )
    return train, validation


def _padded(
    examples: list[_Example], form: ExampleFormat, dtype: type[np.uint16] | type[np.uint32], first_id: int
) -> PackedSequences:
    shape = (len(examples), form.seq_len)
    tokens: TokenArray = np.full(shape, form.pad_token, dtype=dtype)
    targets, masks = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, example in enumerate(examples):
        length = len(example[0])
        tokens[row, :length], targets[row, :length], masks[row, :length] = example
    return PackedSequences(tokens, first_id + np.arange(len(examples), dtype=np.int64), targets, masks)


def _read_examples(corpus: Corpus, form: ExampleFormat) -> Iterator[_Example]:
    for document in corpus.documents:
        # Not splitlines(), since a JSON string may contain other line breaks.
        for number, line in enumerate(bytes(document.content).split(b"\n"), 1):
            if line.strip():
                try:
                    yield _read_example(line, form)
                except ValueError as error:
                    raise CorpusError(f"data.source: {document.name}:{number}: {error}") from None


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
