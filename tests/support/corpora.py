"""Corpora that tests hold in memory, and what documents hold."""

from __future__ import annotations

import hashlib

from stackwise_core.data.content import chunks_of
from stackwise_core.data.packing import Corpus
from stackwise_core.data.sources import Document


def corpus_of(*texts: bytes, name: str = "here", ending: str = "txt") -> Corpus:
    """A corpus whose documents stand in the given order."""
    documents = [Document(f"{n}.{ending}", text, hashlib.sha256(text).hexdigest()) for n, text in enumerate(texts)]
    return Corpus(name, documents, "")


def text_of(document: Document) -> bytes:
    """All that a document holds."""
    return b"".join(chunks_of(document.content))


def texts_of(corpus: Corpus) -> list[bytes]:
    """All that the documents of a corpus hold, in their order."""
    return [text_of(document) for document in corpus.documents]
