"""The documents that `data.source` names. Needs no torch."""

from __future__ import annotations

import codecs
import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.tables import HUB, TEXT, NumberedRow, hub_rows, jsonl_of, jsonl_rows, parquet_rows, text_of
from stackwise_core.errors import CorpusError

_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".bin": "uint16 token"}
"""By suffix; all other files are text."""

_CHUNK = 1 << 20

Content = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a file of tokens, with the hash that documents are ordered by."""

    name: str
    """For messages."""
    content: Content
    """UTF-8 text, or memory-mapped tokens, uint16 little-endian."""
    digest: str
    is_tokens: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of the text, or number of tokens: in either case the most tokens it can give."""
        return len(self.content) // (2 if self.is_tokens else 1)


def documents_of(source: str, *, examples: bool) -> Iterator[Document]:
    """Yield every document of a source, in no particular order.

    Args:
        source: 'stdlib', the path or glob of text, jsonl, parquet or uint16 .bin files, or 'hf:owner/name'.
        examples: whether tables hold examples for a custom objective (each table is then one document of jsonl),
            rather than one text per row.

    Raises:
        CorpusError: no file matches, their kinds are mixed, or a file or row cannot be read as its kind.
    """
    column = None if examples else TEXT
    if source.startswith(HUB):
        yield from _of_rows(source, hub_rows(source, column), examples)
        return
    paths = _paths(source)
    kind = _common_kind(source, paths)
    for path in paths:
        if kind == "parquet":
            yield from _of_rows(str(path), parquet_rows(path, column), examples)
        elif kind == "jsonl" and not examples:
            yield from _of_rows(str(path), jsonl_rows(path), examples)
        elif kind == "uint16 token":
            yield _token_document(path, examples)
        else:
            yield _document(str(path), _read_text(path))


def _of_rows(name: str, rows: Iterable[NumberedRow], examples: bool) -> Iterator[Document]:
    if examples:
        yield _document(name, jsonl_of(rows))
        return
    for number, row in rows:
        try:
            text = text_of(row)
        except ValueError as error:
            raise CorpusError(f"data.source: {name}:{number}: {error}") from None
        yield _document(f"{name}:{number}", text)


def _document(name: str, text: bytes) -> Document:
    return Document(name, text, hashlib.sha256(text).hexdigest())


# ---------------------------------------------------------------- files


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
    """Return the source files of the running Python's library, without its tests: some of them are not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    paths = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    if not paths:
        raise CorpusError(f"data.source: got 'stdlib'; {root} holds no sources, give data.source a text file")
    return sorted(paths)


def _common_kind(source: str, paths: list[Path]) -> str:
    first = {_KINDS.get(path.suffix.lower(), "text"): path for path in reversed(paths)}
    if len(first) > 1:
        found = " and ".join(f"{kind} files ({path})" for kind, path in sorted(first.items()))
        raise CorpusError(f"data.source: got {source!r}; it names {found}; name files of one kind, as by *.txt")
    return next(iter(first))


def _read_text(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    wrong = _first_non_utf8(text)
    if wrong is not None:
        raise CorpusError(f"data.source: {path} is not UTF-8 text (byte {wrong}); give text files")
    if b"\0" in text:
        raise CorpusError(f"data.source: {path} is binary (byte {text.index(0)} is NUL); give text files")
    return text


def _first_non_utf8(text: bytes) -> int | None:
    """Return where a text stops being UTF-8. Decoded in chunks, since the decoded text may be four times as large."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _CHUNK):
        n_pending = len(decoder.getstate()[0])
        try:
            decoder.decode(text[start : start + _CHUNK], final=start + _CHUNK >= len(text))
        except UnicodeDecodeError as error:
            return start - n_pending + error.start
    return None


# ---------------------------------------------------------------- tokens


def _token_document(path: Path, examples: bool) -> Document:
    if examples:
        allowed = "the custom objective reads jsonl or parquet, with targets"
        raise CorpusError(f"data.source: {path} holds tokens and no targets; {allowed}")
    try:
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, mode="r").data if size else b""
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    if size % 2:
        allowed = "a .bin holds uint16 tokens, two bytes each, and no header"
        raise CorpusError(f"data.source: {path} has {size:,} bytes, an odd number; {allowed}")
    # The prefix tells the digest from that of a text of the same bytes.
    digest = hashlib.sha256(b"uint16 tokens\0")
    digest.update(content)
    return Document(str(path), content, digest.hexdigest(), is_tokens=True)


def tokens_in(content: Content) -> NDArray[np.uint16]:
    """Return a view of the content of a .bin as token ids: [n]."""
    return np.frombuffer(content, "<u2")


def check_tokens(document: Document, n_tokens: int, remedy: str, forbidden: int | None = None) -> None:
    """Check every token of a .bin, one chunk at a time.

    Args:
        document: of a .bin.
        n_tokens: tokens must be below this.
        remedy: what to do about a wrong token.
        forbidden: a token that must not occur: [MASK], if inputs are masked.

    Raises:
        CorpusError: names the first wrong token with its file and position.
    """
    tokens = tokens_in(document.content)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        wrong = chunk >= n_tokens
        if forbidden is not None:
            wrong |= chunk == forbidden
        if wrong.any():
            at = start + int(wrong.argmax())
            token = int(tokens[at])
            what = "is [MASK], a hole in the text" if token == forbidden else f"is outside 0 to {n_tokens - 1}"
            where = f"{document.name}: token {at:,} (at byte {2 * at:,}) is {token}"
            raise CorpusError(f"data.source: {where}, which {what}; {remedy}")
