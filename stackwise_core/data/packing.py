"""Corpora, and how they become packed sequences: documents in the order of their hashes, cut to one length.

Needs no torch.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from stackwise_core.data.content import Content, OnRead, chunks_of, nobody
from stackwise_core.data.masks import SALT_ORDER, IntArray, hash_bits
from stackwise_core.data.ordering import OrderedDocuments
from stackwise_core.data.sequences import ArrayWriter, PackedSequences, array_path, load_split, write_ids, write_split
from stackwise_core.data.sources import Document, documents_of, tokens_in
from stackwise_core.data.tokenizer import Tokenizer, token_dtype
from stackwise_core.errors import CorpusError, shortened

_LEAST_VALIDATION = 32
_SAMPLE_SEED = 20_260_102
"""Of the hashes that choose a sample, the same in every run."""
_BATCH_BYTES = min(32, max(8, os.cpu_count() or 1)) << 18
"""Text that is tokenised at once: a piece of a long text for each CPU, so that all have work, and not much more."""
_BATCH_TEXTS = 1 << 13
_AT_ONCE = 1 << 8
"""Short texts that are added at once."""
_SHORT = 1 << 16
"""Bytes of a text that no tokenizer cuts."""
_BYTES_BETWEEN_NOTES = 1 << 26
"""Text that a killed packing may have to tokenise again."""


class Documents(Protocol):
    """Documents that can be gone through again and again, always in the same order."""

    def __iter__(self) -> Iterator[Document]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Corpus:
    """Documents ordered by content hash, so that names and folders do not matter."""

    source: str
    documents: Documents
    digest: str

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of all texts, or number of all tokens."""
        if isinstance(self.documents, OrderedDocuments):
            return self.documents.n_bytes
        return sum(document.n_bytes for document in self.documents)

    @cached_property
    def token_width(self) -> int:
        """Bytes of a token; 0 if the documents are text."""
        return next(iter(self.documents)).token_width

    @property
    def is_tokens(self) -> bool:
        """Whether the documents are tokens rather than text."""
        return self.token_width > 0


def read_corpus(
    source: str,
    *,
    examples: bool = False,
    token_type: str = "auto",
    folder: Path | None = None,
    on_read: OnRead = nobody,
) -> Corpus:
    """Read every document of a source (see `documents_of`) once, and note where each one is.

    Texts of rows are written to a file without a name in `folder`, by default that of temporary files; others stay
    where they are.
    """
    documents = _ordered(source, examples, token_type, on_read, OrderedDocuments(folder))
    return Corpus(source, documents, documents.digest())


def corpus_facts(
    source: str, *, examples: bool = False, token_type: str = "auto", on_read: OnRead = nobody
) -> tuple[str, int]:
    """Return the content hash of a source and its size, holding one text of a row in memory at a time."""
    documents = _ordered(source, examples, token_type, on_read, OrderedDocuments(keep_texts=False))
    return documents.digest(), documents.n_bytes


def _ordered(
    source: str, examples: bool, token_type: str, on_read: OnRead, documents: OrderedDocuments
) -> OrderedDocuments:
    for document in documents_of(source, examples=examples, token_type=token_type, on_read=on_read):
        if len(document.content):
            documents.add(document)
    documents.close()
    if not len(documents):
        raise CorpusError(f"data.source: got {shortened(source)}; every file it names is empty")
    return documents


# ---------------------------------------------------------------- text and tokens


@dataclass(frozen=True)
class Progress:
    """How far packing is: after so many documents, as many tokens are written of each split."""

    documents: int = 0
    train: int = 0
    validation: int = 0

    @property
    def tokens(self) -> list[int]:
        """The tokens of both splits."""
        return [self.train, self.validation]


@dataclass(frozen=True)
class Watch:
    """What others want to know of packing, and from where it goes on."""

    start: Progress = Progress()
    note: Callable[[Progress], None] = field(default=lambda progress: None)
    """Called when everything before some document is on the disk."""
    on_read: OnRead = nobody
    """Is told how many bytes of the corpus were packed since it was told last."""


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    seq_len: int,
    max_sequences: int,
    validation_fraction: float,
    folder: Path | None = None,
    watch: Watch | None = None,
    *,
    begin: bool = False,
) -> tuple[PackedSequences, PackedSequences]:
    """Split documents into train and validation, then cut each split into sequences of `seq_len` tokens.

    Each text is followed by the tokenizer's end token, if it has one, and with `begin` its start tokens stand before
    it. Tokens that do not fill the last sequence are dropped. `max_sequences` limits the training sequences; 0 takes
    all. Sequences are written into `folder` as they come and mapped; without one, into files that are gone with this
    process. Raises CorpusError if a split is empty.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as passing:
            return pack(
                corpus, tokenizer, seq_len, max_sequences, validation_fraction, Path(passing), watch, begin=begin
            )
    watch = watch or Watch()
    held, fraction = _held_out(corpus, validation_fraction), validation_fraction
    splits = [
        _Split(corpus, array_path(folder, name, "tokens"), tokenizer, seq_len, most, kept, begin)
        for name, most, kept in (
            ("train", max_sequences, watch.start.train),
            ("validation", 0, watch.start.validation),
        )
    ]
    train, validation = splits
    number = unnoted = 0
    try:
        for contents in _contents(corpus.documents):
            first, number = number, number + len(contents)
            done = min(len(contents), max(0, watch.start.documents - first))
            watch.on_read(sum(map(len, contents[:done])))
            if done == len(contents):
                continue
            if train.is_full and (held is not None and first >= held):
                break
            for content in contents[done:] if held is None else ():
                cut = _cut_before(content, 1 - fraction, corpus.token_width)
                train.add(content, 0, cut, watch.on_read)
                validation.add(content, cut, len(content), watch.on_read)
            if held is not None:
                parts = max(done, min(len(contents), held - first))
                validation.add_all(contents[done:parts], watch.on_read)
                train.add_all(contents[parts:], watch.on_read)
            unnoted += sum(map(len, contents[done:]))
            if unnoted >= _BYTES_BETWEEN_NOTES:
                unnoted = 0
                watch.note(Progress(number, train.flush(), validation.flush()))
        return _finished(corpus, folder, seq_len, train), _finished(corpus, folder, seq_len, validation)
    finally:
        train.writer.close()
        validation.writer.close()


def _contents(documents: Documents) -> Iterator[list[Content]]:
    """Yield what documents hold: some short texts at a time, anything else alone."""
    if not isinstance(documents, OrderedDocuments):
        yield from ([document.content] for document in documents)
        return
    for group in documents.contents():
        for at in range(0, len(group), _AT_ONCE):
            part = group[at : at + _AT_ONCE]
            if all(isinstance(each, bytes) and len(each) <= _SHORT for each in part):
                yield part
            else:
                yield from ([each] for each in part)


def _finished(corpus: Corpus, folder: Path, seq_len: int, split: _Split) -> PackedSequences:
    name, n_rows = split.name, split.finish()
    if not n_rows:
        what = "tokens" if corpus.is_tokens else "bytes"
        raise CorpusError(
            f"data.source: got {shortened(corpus.source)}; its {corpus.n_bytes:,} {what} fill no {name} sequence "
            f"of data.seq_len = {seq_len} tokens; give more text, a smaller seq_len or another "
            "data.validation_fraction"
        )
    write_ids(folder, name, n_rows)
    return load_split(folder, name)


class _Split:
    """The tokens of one split, as they are made and written."""

    def __init__(
        self, corpus: Corpus, path: Path, tokenizer: Tokenizer, seq_len: int, most: int, kept: int, begin: bool
    ) -> None:
        self.name, self._tokenizer, self._width = path.name.partition("_")[0], tokenizer, corpus.token_width
        self._seq_len, self._most = seq_len, most
        dtype = f"<u{self._width}" if self._width else token_dtype(tokenizer.vocab_size)
        self.writer = ArrayWriter(path, dtype, (seq_len,), kept)
        self._begin, self._begun = begin, list[bool]()
        self._texts, self._ended, self._n_bytes = list[bytes](), list[bool](), 0

    @property
    def is_full(self) -> bool:
        """Whether all sequences that are wanted are written."""
        return 0 < self._most * self._seq_len <= self.writer.n_items

    def add_all(self, contents: list[Content], on_read: OnRead) -> None:
        """Add documents: several short texts, or one of any kind."""
        texts = [each for each in contents if isinstance(each, bytes)]
        if len(contents) == 1 or len(texts) < len(contents):
            for content in contents:
                self.add(content, 0, len(content), on_read)
        elif not self.is_full:
            self._texts += texts
            self._ended += [True] * len(texts)
            self._begun += [True] * len(texts)
            self._n_bytes += sum(map(len, texts))
            self._encode_if_many(on_read)

    def add(self, content: Content, start: int, stop: int, on_read: OnRead) -> None:
        """Add the bytes of a document from `start` to `stop`."""
        if self._width:
            for tokens in tokens_in(content, self._width, start, stop):
                if self.is_full:
                    return
                self.writer.append(tokens)
                on_read(tokens.nbytes)
            return
        if isinstance(content, bytes) and len(content) <= _SHORT:
            if not self.is_full:
                self._add_text(content[start:stop], True, start == 0, on_read)
            return
        text, begun, n = b"", start == 0, 0
        for n, piece in enumerate(self._tokenizer.pieces(chunks_of(content, start, stop))):
            if n:
                self._add_text(text, False, begun and n == 1, on_read)
            if self.is_full:
                return
            text = piece
        self._add_text(text, True, begun and n == 0, on_read)

    def _add_text(self, text: bytes, ended: bool, begun: bool, on_read: OnRead) -> None:
        self._texts.append(text)
        self._begun.append(begun)
        self._ended.append(ended)
        self._n_bytes += len(text)
        self._encode_if_many(on_read)

    def _encode_if_many(self, on_read: OnRead) -> None:
        if self._n_bytes >= _BATCH_BYTES or len(self._texts) >= _BATCH_TEXTS:
            on_read(self._n_bytes)
            self._encode()

    def _encode(self) -> None:
        if self._texts and not self.is_full:
            self.writer.append(self._tokenizer.encode_all(self._texts, self._ended, self._begun if self._begin else ()))
        self._texts, self._ended, self._begun, self._n_bytes = [], [], [], 0

    def flush(self) -> int:
        """Write everything to the disk; return the number of tokens that are there."""
        self._encode()
        self.writer.flush()
        return self.writer.n_items

    def finish(self) -> int:
        """Complete the file; return the number of sequences in it."""
        self._encode()
        n_rows = self.writer.n_items // self._seq_len
        n_rows = min(n_rows, self._most or n_rows)
        self.writer.finish(n_rows)
        return n_rows


def _held_out(corpus: Corpus, fraction: float) -> int | None:
    """Return how many documents, the first, are held out; None if these exceed the fraction by over a quarter.

    Then the end of each document is held out instead. Documents of equal content are on one side.
    """
    wanted = fraction * corpus.n_bytes * (corpus.token_width or 1)
    held, size, last = 0, 0, ""
    for document in corpus.documents:
        if size >= wanted and not (held and document.digest == last):
            break
        size += len(document.content)
        held += 1
        last = document.digest
    return held if size <= 1.25 * wanted else None


def _cut_before(content: Content, share: float, token_width: int) -> int:
    """Return where about a share of the bytes ends: at the start of a token, or of a UTF-8 character."""
    cut = round(len(content) * share)
    if token_width:
        return cut - cut % token_width
    first = max(0, cut - 3)  # a character has at most four bytes
    around = b"".join(chunks_of(content, first, min(cut + 1, len(content))))
    while 0 < cut < len(content) and around[cut - first] & 0xC0 == 0x80:
        cut -= 1
    return cut


# ---------------------------------------------------------------- samples


def spread_sample(
    train: PackedSequences, validation: PackedSequences, most: int, folder: Path | None = None
) -> tuple[PackedSequences, PackedSequences]:
    """Return `most` training sequences, and the same share of the validation sequences, but at least 32 if there are.

    Each is chosen by a hash from one of as many equal parts of its split, so that the sample is of the whole corpus.
    They are written into `folder` and mapped; without one, into files that are gone with this process. If there are no
    more, the splits themselves are returned.
    """
    if len(train) <= most:
        return train, validation
    if folder is None:
        with tempfile.TemporaryDirectory() as passing:
            return spread_sample(train, validation, most, Path(passing))
    n_train, n_validation = sample_sizes(len(train), len(validation), most)
    for name, split, n in (("train", train, n_train), ("validation", validation, n_validation)):
        write_split(folder, name, split, sampled_rows(len(split), n, np.arange(n, dtype=np.int64)))
    return load_split(folder, "train"), load_split(folder, "validation")


def sample_sizes(n_train: int, n_validation: int, most: int) -> tuple[int, int]:
    """Return how many training and validation sequences a sample of at most `most` has."""
    if n_train <= most:
        return n_train, n_validation
    return most, min(n_validation, max(_LEAST_VALIDATION, math.ceil(n_validation * most / n_train)))


def sampled_rows(n_rows: int, most: int, numbers: IntArray) -> IntArray:
    """Return the rows of some numbers in a sample of `most`: each is one of its part of all rows, chosen by a hash."""
    first, end = (bound * n_rows // most for bound in (numbers, numbers + 1))
    widths = (end - first).astype(np.uint64)
    return first + (hash_bits(_SAMPLE_SEED, SALT_ORDER, first) % widths).astype(np.int64)
