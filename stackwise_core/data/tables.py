"""Rows of jsonl and parquet files and of Hugging Face datasets. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stackwise_core.errors import CorpusError

Row = dict[str, Any]
NumberedRow = tuple[int, Row]
"""The number of a line in its file or of a record in its table, from 1, and the row."""

TEXT = "text"
"""The column of documents."""

HUB = "hf:"
_HUB_NAME = re.compile(r"hf:(?P<name>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")


# ---------------------------------------------------------------- rows


def jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the objects of a jsonl file, skipping blank lines."""
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


def parquet_rows(path: Path, column: str | None) -> Iterator[NumberedRow]:
    """Yield the rows of a parquet file, with a thousand in memory at a time; `column` is the only one to read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"data.source: {path} needs pyarrow to be read: pip install 'stackwise[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = _checked_names(str(path), file.schema_arrow.names, column)
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"data.source: {path} cannot be read as parquet ({_first_line(error)})") from None


def hub_rows(source: str, column: str | None) -> Iterator[NumberedRow]:
    """Yield the rows of a Hugging Face dataset, which the library `datasets` downloads once into its own cache.

    Args:
        source: 'hf:owner/name' or 'hf:owner/name/config', and ':split' after either; the split is 'train' by default.
        column: the only one to read; None reads all.
    """
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
    names = _checked_names(source, dataset.column_names, column)
    yield from enumerate(dataset.select_columns(names), 1)


def _checked_names(where: str, names: list[str], column: str | None) -> list[str]:
    if column is not None and column not in names:
        raise CorpusError(f"data.source: {where}: {_missing(column, names)}")
    return names if column is None else [column]


# ---------------------------------------------------------------- what rows hold


def text_of(row: Row) -> bytes:
    """Return the text of a row as UTF-8; raises ValueError if it has none."""
    if TEXT not in row:
        raise ValueError(_missing(TEXT, list(row)))
    text = row[TEXT]
    if not isinstance(text, str):
        raise ValueError(f"{TEXT} is {shortened(text)}; a string is expected")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{TEXT} holds half a surrogate pair at character {error.start}, which is not text") from None


def jsonl_of(rows: Iterable[NumberedRow]) -> bytes:
    """Return rows as jsonl, which examples are read from; values that JSON lacks as their Python repr."""
    return b"".join(json.dumps(row, default=repr).encode() + b"\n" for _, row in rows)


def shortened(value: Any) -> str:
    """Return the repr of a value, cut for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _missing(column: str, names: list[str]) -> str:
    return f"the column {column!r} is missing (it has {names}); documents are read from it"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
