"""Corpora, and packed sequences with stable ids. Needs no torch."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.errors import CorpusError
from stackwise_core.masking import BoolArray, IntArray
from stackwise_core.tokenizer import TokenArray, Tokenizer, token_dtype

FIRST_VALIDATION_ID = 1 << 40
"""Validation sequences are numbered from here, so that an id tells its split."""


@dataclass(frozen=True)
class Document:
    """One text: its bytes and their sha256, by which documents are ordered."""

    name: str
    text: bytes
    digest: str


@dataclass(frozen=True)
class Corpus:
    """Documents ordered by content hash, so that neither names nor folders matter."""

    source: str
    documents: tuple[Document, ...]
    digest: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(len(document.text) for document in self.documents)


@dataclass(frozen=True)
class PackedSequences:
    """One split: tokens [N, T] (unsigned) and stable ids [N] (int64)."""

    tokens: TokenArray
    sequence_ids: IntArray
    targets: IntArray | None = None
    """Of a custom objective: [N, T]."""
    masks: BoolArray | None = None
    """Of a custom objective, True at the loss positions: [N, T]."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def take(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return tokens [B, T] and sequence ids [B] of some rows."""
        return self.tokens[rows].astype(np.int64), self.sequence_ids[rows]

    def fields(self, rows: IntArray) -> dict[str, NDArray[Any]]:
        """Return what a batch of some rows holds: input_ids [B, T], sequence_ids [B], and targets and masks if any."""
        tokens, ids = self.take(rows)
        own = {"targets": self.targets, "masks": self.masks}
        given = {name: array[rows] for name, array in own.items() if array is not None}
        return {"input_ids": tokens, "sequence_ids": ids, **given}

    def rows_of(self, sequence_ids: IntArray) -> IntArray:
        """Return the row numbers of sequence ids; ids are consecutive within a split."""
        return sequence_ids - self.sequence_ids[0]


def read_corpus(source: str) -> Corpus:
    """Read every document of a source.

    Args:
        source: 'stdlib', or the path or glob of UTF-8 text files.

    Raises:
        CorpusError: nothing matches, a file cannot be read, is empty or is no text.
    """
    documents = [_document(path) for path in _paths(source)]
    documents = [document for document in documents if document.text]
    if not documents:
        raise CorpusError(f"data.source: got {source!r}; every file it names is empty")
    documents.sort(key=lambda document: document.digest)
    joined = "\n".join(document.digest for document in documents)
    return Corpus(source, tuple(documents), hashlib.sha256(joined.encode()).hexdigest())


def corpus_facts(source: str) -> tuple[str, int]:
    """Return the content hash of a source, and its bytes."""
    corpus = read_corpus(source)
    return corpus.digest, corpus.n_bytes


def _paths(source: str) -> list[Path]:
    if source == "stdlib":
        return _standard_library()
    try:
        if Path(source).is_file():
            return [Path(source)]
        files = [path for path in map(Path, sorted(glob.glob(source, recursive=True))) if path.is_file()]
    except (OSError, ValueError) as error:
        raise CorpusError(f"data.source: got {source[:80]!r}; it cannot be looked up ({error})") from None
    if not files:
        what = "it is a folder; add /**/*.txt" if Path(source).is_dir() else "no file matches"
        raise CorpusError(f"data.source: got {source!r}; {what} (seen from {Path.cwd()})")
    return files


def _standard_library() -> list[Path]:
    """Return the sources of the running Python's library, without its tests, some of which are not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    paths = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    if not paths:
        raise CorpusError(f"data.source: got 'stdlib'; {root} holds no sources, give data.source a text file")
    return sorted(paths)


def _document(path: Path) -> Document:
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"data.source: {path} is no UTF-8 text (byte {error.start}); give text files") from None
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    if b"\0" in text:
        raise CorpusError(f"data.source: {path} is binary (byte {text.index(0)} is NUL); give text files")
    return Document(path.name, text, hashlib.sha256(text).hexdigest())


def pack(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_sequences: int, validation_fraction: float
) -> tuple[PackedSequences, PackedSequences]:
    """Split documents into train and validation, then cut each into sequences of `seq_len` tokens.

    Each document is followed by the tokenizer's end token, if it has one; what does not fill the last
    sequence is dropped.

    Returns:
        The train and the validation sequences.

    Raises:
        CorpusError: a split does not fill one sequence.
    """
    train_texts, validation_texts = _split(corpus, validation_fraction)
    train = _cut(train_texts, tokenizer, seq_len)
    validation = _cut(validation_texts, tokenizer, seq_len)
    if max_sequences:
        train = train[:max_sequences]
    for name, tokens in (("train", train), ("validation", validation)):
        if not len(tokens):
            size = sum(len(document.text) for document in corpus.documents)
            raise CorpusError(
                f"data.source: got {corpus.source!r}; its {size:,} bytes fill no {name} sequence of data.seq_len = "
                f"{seq_len} tokens; give more text, a smaller seq_len or another data.validation_fraction"
            )
    return (
        PackedSequences(train, np.arange(len(train), dtype=np.int64)),
        PackedSequences(validation, FIRST_VALIDATION_ID + np.arange(len(validation), dtype=np.int64)),
    )


def _split(corpus: Corpus, fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Hold out whole documents; where they are too few or too uneven for that, the end of each.

    Held-out documents must come within a quarter of the asked fraction; equal ones stay on one side.
    """
    texts = [document.text for document in corpus.documents]
    wanted = fraction * sum(map(len, texts))
    held, size = 0, 0
    while size < wanted or (0 < held < len(texts) and texts[held] == texts[held - 1]):
        size += len(texts[held])
        held += 1
    if size <= 1.25 * wanted:
        return texts[held:], texts[:held]
    cuts = [_character_start(text, round(len(text) * (1 - fraction))) for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def _character_start(text: bytes, cut: int) -> int:
    """Move a cut to the left until it splits no UTF-8 character."""
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _cut(texts: list[bytes], tokenizer: Tokenizer, seq_len: int) -> TokenArray:
    nothing = np.empty(0, token_dtype(tokenizer.vocab_size))
    tokens = np.concatenate([nothing, *_with_ends(texts, tokenizer)])
    n_sequences = len(tokens) // seq_len
    return tokens[: n_sequences * seq_len].reshape(n_sequences, seq_len)


def _with_ends(texts: list[bytes], tokenizer: Tokenizer) -> Iterator[TokenArray]:
    ends = [] if tokenizer.end_token is None else [tokenizer.end_token]
    end = np.array(ends, dtype=token_dtype(tokenizer.vocab_size))
    for text in texts:
        yield tokenizer.encode(text)
        yield end
