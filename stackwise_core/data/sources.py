"""The documents that `data.source` names. Needs no torch."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.errors import CorpusError

_TEXT = "text"
"""The column of documents in a table."""
_HUB = "hf:"
_HUB_NAME = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")
_KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".bin": "uint16 token"}
"""The kind of a file by its suffix; all others are text."""
_CHUNK = 1 << 20

Content = bytes | memoryview
Row = dict[str, Any]
NumberedRow = tuple[int, Row]
"""The number of a line in its file or of a record in its table, from 1, and the row."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a file of tokens, with the hash that documents are ordered by."""

    name: str
    """The file, or the file and the row, for messages."""
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
        examples: whether tables hold examples for a custom objective, so that each table is one document of jsonl;
            otherwise each row is one text.

    Raises:
        CorpusError: no file matches, their kinds are mixed, or a file or row cannot be read as its kind.
    """
    if source.startswith(_HUB):
        yield from _of_rows(source, _hub_rows(source, examples), examples)
        return
    paths = _paths(source)
    kind = _common_kind(source, paths)
    for path in paths:
        if kind == "parquet":
            yield from _of_rows(str(path), _parquet_rows(path, examples), examples)
        elif kind == "jsonl" and not examples:
            yield from _of_rows(str(path), _jsonl_rows(path), examples)
        elif kind == "uint16 token":
            yield _token_document(path, examples)
        else:
            yield _document(str(path), _read_text(path))


def _of_rows(name: str, rows: Iterable[NumberedRow], examples: bool) -> Iterator[Document]:
    if examples:
        yield _document(name, _jsonl_of(rows))
        return
    for number, row in rows:
        try:
            text = _text_of(row)
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
    """Check that every token of a .bin is below `n_tokens` and is not `forbidden` ([MASK], if inputs are masked).

    Raises CorpusError, which names the first wrong token with its file and position, and the remedy.
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


# ---------------------------------------------------------------- rows of tables


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_object(line)
    except OSError as error:
        raise CorpusError(f"data.source: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CorpusError(f"data.source: {path}:{number}: {error}; one JSON object a line is expected") from None


def parse_object(line: bytes) -> Row:
    """Return the JSON object of a line; raises ValueError if it is something else."""
    try:
        row: Any = json.loads(line, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the key {doubled!r} twice; leave one out")
    return row


def _parquet_rows(path: Path, examples: bool) -> Iterator[NumberedRow]:
    """Yield the rows of a parquet file, a thousand in memory at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"data.source: {path} needs pyarrow to be read: pip install 'stackwise[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = _columns_to_read(str(path), file.schema_arrow.names, examples)
            batches = file.iter_batches(batch_size=1000, columns=names)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"data.source: {path} cannot be read as parquet ({_first_line(error)})") from None


def _hub_rows(source: str, examples: bool) -> Iterator[NumberedRow]:
    """Yield the rows of a Hugging Face dataset, which the library `datasets` downloads once into its own cache."""
    named = _HUB_NAME.fullmatch(source)
    if named is None:
        allowed = "write hf:owner/name or hf:owner/name/configuration, and :split after it if it is not train"
        raise CorpusError(f"data.source: got {source!r}; {allowed}")
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"data.source: got {source!r}; it needs datasets: pip install 'stackwise[hub]'") from None
    try:
        dataset: Any = datasets.load_dataset(named["name"], named["config"], split=named["split"] or "train")
    except Exception as error:  # the library may raise anything
        remedy = "check owner, name, configuration and split, and the connection to the hub"
        raise CorpusError(f"data.source: got {source!r}; cannot be loaded ({_first_line(error)}); {remedy}") from None
    names = _columns_to_read(source, dataset.column_names, examples)
    yield from enumerate(dataset.select_columns(names), 1)


def _columns_to_read(where: str, names: list[str], examples: bool) -> list[str]:
    if not examples and _TEXT not in names:
        raise CorpusError(f"data.source: {where}: {_no_text(names)}")
    return names if examples else [_TEXT]


def _text_of(row: Row) -> bytes:
    """Return the text of a row as UTF-8; raises ValueError if the row has none."""
    if _TEXT not in row:
        raise ValueError(_no_text(list(row)))
    text = row[_TEXT]
    if not isinstance(text, str):
        raise ValueError(f"{_TEXT} is {shortened(text)}; a string is expected")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_TEXT} holds half a surrogate pair at character {error.start}, which is not text") from None


def _jsonl_of(rows: Iterable[NumberedRow]) -> bytes:
    """Return rows as jsonl; a value that JSON cannot hold becomes the string of its Python repr."""
    return b"".join(json.dumps(row, default=repr).encode() + b"\n" for _, row in rows)


def shortened(value: Any) -> str:
    """Return the repr of a value, cut for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _no_text(names: list[str]) -> str:
    return f"the column {_TEXT!r} is missing (it has {names}); documents are read from it"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
