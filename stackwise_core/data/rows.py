"""The sequences of a source, one after the other, without packing it into an artifact. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from stackwise_core.data.content import chunks_of
from stackwise_core.data.masks import IntArray
from stackwise_core.data.sources import check_tokens, documents_of, tokens_in
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import CorpusError, shortened


def rows_of(
    source: str, tokenizer: Tokenizer, seq_len: int, token_type: str = "auto", *, begin: bool = False
) -> Iterator[IntArray]:
    """Yield the tokens of a source in sequences of `seq_len`, the last as long as it comes: [T] each.

    Texts are followed by the end token, if there is one, as when they are packed, and with `begin` the tokenizer's
    start tokens stand before them. Raises CorpusError.
    """
    waiting, n = list[IntArray](), 0
    for tokens in _tokens_of(source, tokenizer, token_type, begin):
        waiting.append(tokens)
        n += len(tokens)
        if n >= seq_len:
            joined = np.concatenate(waiting)
            for first in range(0, n - n % seq_len, seq_len):
                yield joined[first : first + seq_len]
            waiting, n = [joined[n - n % seq_len :]], n % seq_len
    if n:
        yield np.concatenate(waiting)


def _tokens_of(source: str, tokenizer: Tokenizer, token_type: str, begin: bool) -> Iterator[IntArray]:
    head = tokenizer.start_tokens if begin else []
    there, end = False, [] if tokenizer.end_token is None else [tokenizer.end_token]
    for document in documents_of(source, examples=False, token_type=token_type):
        there = there or len(document.content) > 0
        if document.is_tokens:
            check_tokens(document, tokenizer.vocab_size, "they are not of the tokenizer of this run")
            yield from (part.astype(np.int64) for part in tokens_in(document.content, document.token_width))
        elif len(document.content):
            yield np.asarray(head, dtype=np.int64)
            for piece in tokenizer.pieces(chunks_of(document.content)):
                yield tokenizer.encode(piece).astype(np.int64)
            yield np.asarray(end, dtype=np.int64)
    if not there:
        raise CorpusError(f"data.source: got {shortened(source)}; every file it names is empty")


def in_batches(rows: Iterable[IntArray], size: int) -> Iterator[IntArray]:
    """Yield sequences of one length together: [B, T], at most `size` at a time; those of one token are left out."""
    batch = list[IntArray]()
    for row in rows:
        if len(row) < 2:
            continue
        if batch and (len(batch) == size or len(row) != len(batch[0])):
            yield np.stack(batch)
            batch = []
        batch.append(row)
    if batch:
        yield np.stack(batch)
