"""Corpora, and packed sequences with stable ids. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.masks import BoolArray, IntArray
from stackwise_core.data.sources import Content, Document, documents_of, tokens_in
from stackwise_core.data.tokenizer import TokenArray, Tokenizer, token_dtype
from stackwise_core.errors import CorpusError

FIRST_VALIDATION_ID = 1 << 40
"""Validation sequences are numbered from here, so that an id shows its split."""


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


def read_corpus(source: str, *, examples: bool = False) -> Corpus:
    """Read every document of a source; see `documents_of`. Files of tokens are memory-mapped."""
    found = (document for document in documents_of(source, examples=examples) if document.content)
    documents = tuple(sorted(found, key=lambda document: document.digest))
    return Corpus(source, documents, _digest(source, [document.digest for document in documents]))


def corpus_facts(source: str, *, examples: bool = False) -> tuple[str, int]:
    """Return the content hash of a source and its size, with one document in memory at a time; see `documents_of`."""
    found = documents_of(source, examples=examples)
    facts = sorted((document.digest, document.n_bytes) for document in found if document.content)
    return _digest(source, [digest for digest, _ in facts]), sum(n_bytes for _, n_bytes in facts)


def _digest(source: str, digests: list[str]) -> str:
    if not digests:
        raise CorpusError(f"data.source: got {source!r}; every file it names is empty")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def pack(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_sequences: int, validation_fraction: float
) -> tuple[PackedSequences, PackedSequences]:
    """Split documents into train and validation, then cut each into sequences of `seq_len` tokens.

    Each text is followed by the tokenizer's end token, if it has one. Tokens that do not fill the last sequence are
    dropped. Raises CorpusError if a split does not fill one sequence.
    """
    cut = _cut_tokens if corpus.is_tokens else functools.partial(_cut_text, tokenizer)
    train_parts, validation_parts = _split(corpus, validation_fraction)
    train = cut(train_parts, seq_len, max_sequences)
    validation = cut(validation_parts, seq_len, 0)
    for name, tokens in (("train", train), ("validation", validation)):
        if not len(tokens):
            what = "tokens" if corpus.is_tokens else "bytes"
            raise CorpusError(
                f"data.source: got {corpus.source!r}; its {corpus.n_bytes:,} {what} fill no {name} sequence of "
                f"data.seq_len = {seq_len} tokens; give more text, a smaller seq_len or another "
                "data.validation_fraction"
            )
    return (
        PackedSequences(train, np.arange(len(train), dtype=np.int64)),
        PackedSequences(validation, FIRST_VALIDATION_ID + np.arange(len(validation), dtype=np.int64)),
    )


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
    start_of = _token_start if corpus.is_tokens else _character_start
    cuts = [start_of(content, round(len(content) * (1 - fraction))) for content in contents]
    return (
        [content[:cut] for content, cut in zip(contents, cuts, strict=True)],
        [content[cut:] for content, cut in zip(contents, cuts, strict=True)],
    )


def _character_start(text: Content, cut: int) -> int:
    """Move a cut to the left, to the start of a UTF-8 character."""
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _token_start(_: Content, cut: int) -> int:
    """Move a cut to the left, to the start of a token of two bytes."""
    return cut - cut % 2


def _cut_text(tokenizer: Tokenizer, texts: list[Content], seq_len: int, most: int) -> TokenArray:
    """Return at most `most` sequences of texts [N, T]; 0 returns all."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    buffer, wanted = bytearray(), most * seq_len * dtype.itemsize  # not a list, for one copy of the tokens
    for tokens in _with_ends(texts, tokenizer):
        buffer += tokens.data
        if wanted and len(buffer) >= wanted:
            break
    return _rows(np.frombuffer(buffer, dtype), seq_len, most)


def _with_ends(texts: list[Content], tokenizer: Tokenizer) -> Iterator[TokenArray]:
    ends = [] if tokenizer.end_token is None else [tokenizer.end_token]
    end = np.array(ends, dtype=token_dtype(tokenizer.vocab_size))
    for text in texts:
        yield tokenizer.encode(bytes(text))
        yield end


def _cut_tokens(parts: list[Content], seq_len: int, most: int) -> TokenArray:
    """Return at most `most` sequences of .bin files [N, T]; of a single file a view."""
    pieces = [tokens_in(part) for part in parts if len(part)]
    if len(pieces) == 1:
        return _rows(pieces[0], seq_len, most)
    return _rows(np.concatenate([np.empty(0, np.uint16), *pieces]), seq_len, most)


def _rows(tokens: TokenArray, seq_len: int, most: int) -> TokenArray:
    n_rows = len(tokens) // seq_len
    n_rows = min(n_rows, most or n_rows)
    return tokens[: n_rows * seq_len].reshape(n_rows, seq_len)
