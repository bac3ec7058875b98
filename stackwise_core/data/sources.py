"""The documents that `data.source` names. Needs no torch."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.content import (
    CHUNK,
    Content,
    FileContent,
    MadeContent,
    OnRead,
    Stamp,
    chunks_of,
    nobody,
    unchanged,
)
from stackwise_core.data.files import READ_ERRORS, common_kind, ending, is_packed, opened, paths_of, unreadable
from stackwise_core.data.tokens import read_tokens
from stackwise_core.errors import CorpusError, shortened

_TEXT = "text"
"""The column of documents in a table."""
_HUB = "hf:"
_HUB_NAME = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")
_MOST_TOKENS = 2**24
"""The largest `model.vocab_size`."""

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Row = dict[str, Any]
NumberedRow = tuple[int, Row]
"""The number of a line in its file or of a record in its table, from 1, and the row."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a file of tokens, with the hash that documents are ordered by."""

    name: str
    """The file, or the file and the row, for messages."""
    content: Content
    """UTF-8 text, or tokens."""
    digest: str
    token_width: int = 0
    """Bytes of a token, little-endian; 0 if it is a text."""
    start: int = 0
    """Bytes of the file before the content."""
    stored_width: int = 0
    """Bytes of a token in the file, if not `token_width`."""

    @property
    def is_tokens(self) -> bool:
        """Whether it holds tokens rather than text."""
        return self.token_width > 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the text, or number of tokens: in either case the most tokens it can give."""
        return len(self.content) // (self.token_width or 1)


def documents_of(
    source: str, *, examples: bool, token_type: str = "auto", on_read: OnRead = nobody
) -> Iterator[Document]:
    """Yield every document of a source, in no particular order, with one text of a row in memory at a time.

    Args:
        source: 'stdlib', the path or glob of text, jsonl, parquet, .bin or .npy files, or 'hf:owner/name'.
        examples: whether tables hold examples for a custom objective, so that each table is one document of jsonl;
            otherwise each row is one text.
        token_type: of .bin files, see `read_tokens`.
        on_read: is told of the bytes of documents as they are hashed.

    Raises:
        CorpusError: no file matches, their kinds are mixed, a file or row cannot be read as its kind, or a file changed
            while it was being read.
    """
    if source.startswith(_HUB):
        yield from _of_rows(source, functools.partial(_hub_rows, source, examples), examples, on_read)
        return
    paths = paths_of(source)
    kind = common_kind(source, paths)
    if kind == "token":
        if examples:
            allowed = "the custom objective reads jsonl or parquet, with targets"
            raise CorpusError(f"data.source: {paths[0]} holds tokens and no targets; {allowed}")
        yield from _token_documents(source, paths, token_type, on_read)
        return
    for path in paths:
        with unchanged(path) as stamp:
            if kind == "parquet":
                yield from _of_rows(str(path), functools.partial(_parquet_rows, path, examples), examples, on_read)
            elif kind == "jsonl" and (not examples or _is_array(path)):
                yield from _of_rows(str(path), functools.partial(_jsonl_rows, path), examples, on_read)
            else:
                yield _text_document(path, stamp, kind == "jsonl", on_read)


def _of_rows(
    name: str, rows: Callable[[], Iterable[NumberedRow]], examples: bool, on_read: OnRead
) -> Iterator[Document]:
    if examples:
        make = functools.partial(_jsonl_of, name, rows)
        size, digest = _hashed(make(), on_read)
        yield Document(name, MadeContent(make, size), digest)
        return
    for number, row in rows():
        try:
            text = _text_of(row)
        except ValueError as error:
            raise CorpusError(f"data.source: {name}:{number}: {error}") from None
        yield Document(f"{name}:{number}", text, hashlib.sha256(text).hexdigest())
        on_read(len(text))


def _hashed(pieces: Iterable[bytes], on_read: OnRead) -> tuple[int, str]:
    """Return the size and the hash of pieces, one after the other."""
    size, digest = 0, hashlib.sha256()
    for piece in pieces:
        size += len(piece)
        digest.update(piece)
        on_read(len(piece))
    return size, digest.hexdigest()


def beginning_of(source: str, *, examples: bool, n_bytes: int) -> Iterator[bytes]:
    """Yield the first texts of a source that holds no tokens, about so many bytes together.

    They are the first of the files as they come, so that only the beginning is read.
    """
    paths = [] if source.startswith(_HUB) else paths_of(source)
    kind = common_kind(source, paths) if paths else "rows"
    for path in paths or [Path(source)]:
        rows = {
            "rows": functools.partial(_hub_rows, source, examples),
            "parquet": functools.partial(_parquet_rows, path, examples),
            "jsonl": functools.partial(_jsonl_rows, path),
        }.get(kind)
        if rows is None:
            texts = iter([next(_pieces(path), b"").decode("utf-8", "ignore").encode()])
        elif examples:
            texts = _jsonl_of(str(path), rows)
        else:
            texts = (_text_of(row) for _, row in rows())
        for text in texts:
            yield text
            n_bytes -= len(text)
            if n_bytes <= 0:
                return


# ---------------------------------------------------------------- files


def _text_document(path: Path, stamp: Stamp, may_be_lines: bool, on_read: OnRead) -> Document:
    """Read a text once, to see that it is one and to hash it; it stays in its file."""
    size, digest = _hashed(_checked_text(path, may_be_lines), on_read)
    if is_packed(path):
        return Document(str(path), MadeContent(functools.partial(_pieces, path), size), digest)
    return Document(str(path), FileContent(path, 0, size, stamp), digest)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with opened(path) as file:
            while piece := file.read(CHUNK):
                yield piece
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _checked_text(path: Path, may_be_lines: bool) -> Iterator[bytes]:
    """Yield the pieces of a text file, and raise CorpusError unless it is UTF-8 without NUL, or if it is jsonl."""
    decoder, at, nul, begins_as_jsonl = codecs.getincrementaldecoder("utf-8")(), 0, None, False
    for piece in _pieces(path):
        _check_utf8(path, decoder, piece, at)
        if nul is None and b"\0" in piece:
            nul = at + piece.index(0)
        if at == 0 and not may_be_lines and ending(path) != ".txt":
            begins_as_jsonl = _is_jsonl(piece)
        at += len(piece)
        yield piece
    _check_utf8(path, decoder, b"", at, final=True)
    if nul is not None:
        raise CorpusError(f"data.source: {path} is binary (byte {nul} is NUL); give text files")
    if begins_as_jsonl:
        remedy = "name it .jsonl to train on its texts, or .txt to train on it as it stands"
        raise CorpusError(f"data.source: {path} holds a JSON object on each line; {remedy}")


def _check_utf8(path: Path, decoder: codecs.IncrementalDecoder, piece: bytes, at: int, *, final: bool = False) -> None:
    n_pending = len(decoder.getstate()[0])
    try:
        decoder.decode(piece, final=final)
    except UnicodeDecodeError as error:
        where = at - n_pending + error.start
        raise CorpusError(f"data.source: {path} is not UTF-8 text (byte {where}); give text files") from None


def _is_jsonl(text: bytes) -> bool:
    """Return whether the first two lines are JSON objects."""
    if not text.startswith(b"{"):
        return False
    lines = text.split(b"\n", 2)[:2]
    with contextlib.suppress(ValueError):
        return len([parse_object(line) for line in lines]) == 2
    return False


# ---------------------------------------------------------------- tokens


def _token_documents(source: str, paths: list[Path], token_type: str, on_read: OnRead) -> Iterator[Document]:
    first: tuple[int, Path] | None = None
    for path in paths:
        read = read_tokens(path, token_type, on_read)
        if not len(read.content):
            continue
        if first and read.width != first[0]:
            found = f"tokens of {8 * first[0]} bits ({first[1]}) and of {8 * read.width} ({path})"
            raise CorpusError(f"data.source: got {shortened(source)}; it names {found}; name files of one kind")
        first = first or (read.width, path)
        yield Document(str(path), read.content, read.digest, read.width, read.start, read.stored_width)


def tokens_in(content: Content, width: int, start: int = 0, stop: int | None = None) -> Iterator[Tokens]:
    """Yield the token ids of a file of tokens, or of its bytes from `start` to `stop`, in pieces [n]."""
    for chunk in chunks_of(content, start, stop):
        yield np.frombuffer(chunk, f"<u{width}")


def check_tokens(document: Document, n_tokens: int, remedy: str, forbidden: int | None = None) -> None:
    """Check that every token of a .bin is below `n_tokens` and is not `forbidden` ([MASK], if inputs are masked).

    Raises CorpusError, which names the first wrong token with its file and position, and the remedy.
    """
    first, width = 0, document.stored_width or document.token_width
    for tokens in tokens_in(document.content, document.token_width):
        wrong = tokens >= n_tokens
        if forbidden is not None:
            wrong |= tokens == forbidden
        if wrong.any():
            n = int(wrong.argmax())
            at, token = first + n, int(tokens[n])
            what = "is [MASK], a hole in the text" if token == forbidden else f"is outside 0 to {n_tokens - 1}"
            where = f"{document.name}: token {at:,} (at byte {document.start + width * at:,}) is {token}"
            if token >= _MOST_TOKENS and width > 2:
                remedy = "no vocabulary is so large; if these are uint16 tokens, set data.token_type: uint16"
            raise CorpusError(f"data.source: {where}, which {what}; {remedy}")
        first += len(tokens)


# ---------------------------------------------------------------- rows of tables


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    if _is_array(path):
        yield from _array_rows(path)
        return
    number, expected = 0, "one JSON object a line is expected"
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_object(line)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        also = ", or a file that is one list of them" if ending(path) == ".json" else ""
        raise CorpusError(f"data.source: {path}:{number}: {error}; {expected}{also}") from None


def _is_array(path: Path) -> bool:
    """Return whether a .json file is one JSON list, rather than an object a line."""
    if ending(path) != ".json":
        return False
    try:
        with opened(path) as file:
            return file.read(CHUNK).lstrip().startswith(b"[")
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def _array_rows(path: Path) -> Iterator[NumberedRow]:
    try:
        text = b"".join(_checked_text(path, may_be_lines=True))
        rows: Any = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"data.source: {path} is not JSON ({_first_line(error)})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CorpusError(f"data.source: {path}:{number}: {shortened(row, 40)} is not a JSON object")
        yield number, row


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
        raise ValueError(f"has the key {shortened(doubled)} twice; leave one out")
    return row


def _parquet_rows(path: Path, examples: bool) -> Iterator[NumberedRow]:
    """Yield the rows of a parquet file, a thousand in memory at a time."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"data.source: {path} needs pyarrow to be read: pip install 'stackwise[parquet]'") from None
    first = 1
    try:
        with parquet.ParquetFile(path) as file:
            names = _columns_to_read(str(path), file.schema_arrow.names, examples)
            for batch in file.iter_batches(batch_size=1000, columns=names):
                yield from enumerate(_decoded(str(path), batch, first), first)
                first += len(batch)
    except CorpusError:
        raise
    except Exception as error:  # of a damaged file the library may raise anything
        where = f" after row {first - 1:,}" if first > 1 else ""
        raise CorpusError(f"data.source: {path} cannot be read as parquet{where} ({_first_line(error)})") from None


def _decoded(name: str, batch: Any, first: int) -> list[Row]:
    """Return the rows of a batch whose first one has the number `first`."""
    try:
        return batch.to_pylist()
    except Exception as error:  # the library and its conversions raise many kinds
        for number in range(len(batch)):
            for column in batch.schema.names:
                try:
                    batch.column(column)[number].as_py()
                except Exception as wrong:
                    raise _undecodable(name, first + number, column, wrong) from None
        raise _undecodable(name, first, "", error) from None


def _undecodable(name: str, number: int, column: str, error: Exception) -> CorpusError:
    what = f"{shortened(column, 40)} cannot be decoded" if column else "cannot be decoded"
    return CorpusError(f"data.source: {name}:{number}: {what} ({_first_line(error)}); correct or drop this row")


def _hub_rows(source: str, examples: bool) -> Iterator[NumberedRow]:
    """Yield the rows of a Hugging Face dataset, which the library `datasets` downloads once into its own cache."""
    got, named = shortened(source), _HUB_NAME.fullmatch(source)
    if named is None:
        allowed = "write hf:owner/name or hf:owner/name/configuration, and :split after it if it is not train"
        raise CorpusError(f"data.source: got {got}; {allowed}")
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"data.source: got {got}; it needs datasets: pip install 'stackwise[hub]'") from None
    try:
        dataset: Any = datasets.load_dataset(named["name"], named["config"], split=named["split"] or "train")
    except Exception as error:  # the library may raise anything
        remedy = "check owner, name, configuration and split, and the connection to the hub"
        raise CorpusError(f"data.source: got {got}; cannot be loaded ({_first_line(error)}); {remedy}") from None
    names, number = _columns_to_read(source, dataset.column_names, examples), 0
    try:
        for number, row in enumerate(dataset.select_columns(names), 1):
            yield number, row
    except Exception as error:  # the library may raise anything
        raise _undecodable(source, number + 1, ", ".join(names), error) from None


def hub_revision(source: str) -> str:
    """Return the commit of the Hugging Face dataset that a source names; '' if the hub cannot be asked for it."""
    named = _HUB_NAME.fullmatch(source)
    if named is None or Path(named["name"]).exists():  # the library prefers such a folder
        return ""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(named["name"], timeout=10).sha or ""
    except Exception:  # the library may raise anything; whoever loads it says why
        return ""


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
        raise ValueError(f"{_TEXT} is {shortened(text, 40)}; a string is expected")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_TEXT} holds half a surrogate pair at character {error.start}, which is not text") from None


def _jsonl_of(name: str, rows: Callable[[], Iterable[NumberedRow]]) -> Iterator[bytes]:
    """Yield rows as lines of jsonl; a value that JSON cannot hold becomes the string of its Python repr."""
    for number, row in rows():
        try:
            yield json.dumps(row, default=repr).encode() + b"\n"
        except (ValueError, TypeError, RecursionError) as error:
            raise _undecodable(name, number, "", error) from None


def _no_text(names: list[str]) -> str:
    return f"the column {_TEXT!r} is missing (it has {shortened(names)}); documents are read from it"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
