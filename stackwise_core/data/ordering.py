"""Documents in the order of their hashes, in memory that does not grow with their number. Needs no torch.

What is known of a document is a record of fixed size. Records are sorted a run at a time, and runs lie one after the
other in a file without a name, which is gone when its process is. In a sorted run the documents whose hashes begin with
the same byte stand together, so the order of all is that of 256 short ranges.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise_core.data.content import Content, SpooledContent
from stackwise_core.data.sources import Document

_RECORD = np.dtype([("digest", "S32"), ("kept", "<i4"), ("start", "<i8"), ("size", "<i8")])
"""`kept`: which of the documents that stay in their files; -1 for the text of a row, which lies in the spool."""
_RUN_RECORDS = 1 << 17
_RUN_BYTES = 1 << 25
_SHORT = 1 << 16
"""Bytes of a text that is read together with others."""
_BLOCK_BYTES = 1 << 21
_TEXT_NAME = "a row"

Records = NDArray[Any]


class OrderedDocuments:
    """The documents that were added, whenever and as often as they are asked for, in the order of their hashes.

    Texts of files stay there; those of rows are written to the spool, unless only hashes and sizes are wanted.
    """

    def __init__(self, folder: Path | None = None, *, keep_texts: bool = True) -> None:
        """Keep what does not fit into memory in a folder; by default in that of temporary files."""
        self._index = self._spool = -1
        self._folder, self._keep_texts = folder, keep_texts
        self._runs: list[tuple[int, NDArray[np.int64]]] = []
        """Of each run in the file: where it begins [records], and the bounds of each first byte in it [257]."""
        self._kept: list[Document] = []
        self._rows: list[tuple[bytes, int, int, int]] = []
        self._texts: list[bytes] = []
        self._texts_bytes = 0
        self._spooled = 0
        self._n = self.n_bytes = 0
        self._single: Records | None = None
        """The records, if they are one run, which then stays in memory."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._n

    def __del__(self) -> None:
        """Give back the files."""
        for fd in (self._index, self._spool):
            if fd >= 0:
                os.close(fd)

    def add(self, document: Document) -> None:
        """Add a document that is not empty."""
        content, kept, start = document.content, -1, 0
        if self._keep_texts and isinstance(content, bytes):
            start = len(self._texts)
            self._texts.append(content)
            self._texts_bytes += len(content)
        elif self._keep_texts:
            kept = len(self._kept)
            self._kept.append(document)
        self._rows.append((bytes.fromhex(document.digest), kept, start, len(content)))
        self._n += 1
        self.n_bytes += document.n_bytes
        if len(self._rows) >= _RUN_RECORDS or self._texts_bytes >= _RUN_BYTES:
            self._end_run()

    def close(self) -> None:
        """Say that all documents are there."""
        if self._runs:
            self._end_run()
            return
        if self._rows:
            self._single = self._sorted_run()

    def records(self) -> Iterator[Records]:
        """Yield the records of all documents, in the order of their hashes."""
        if self._single is not None:
            yield self._single
        for first in range(256 if self._runs else 0):
            parts = [self._read(at + bounds[first], bounds[first + 1] - bounds[first]) for at, bounds in self._runs]
            group = np.concatenate(parts)
            yield group[np.argsort(group["digest"], kind="stable")]

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents, in the order of their hashes."""
        assert self._keep_texts
        for group in self.records():
            for records in _blocks(group):
                digests, texts = records["digest"].tobytes().hex(), self._texts_of(records)
                columns = (records[name].tolist() for name in ("kept", "start", "size"))
                for n, (kept, start, size) in enumerate(zip(*columns, strict=True)):
                    if kept >= 0:
                        yield self._kept[kept]
                    else:
                        content = texts.get(start) or SpooledContent(self._spool, start, size)
                        yield Document(_TEXT_NAME, content, digests[64 * n : 64 * n + 64])

    def contents(self) -> Iterator[list[Content]]:
        """Yield what all documents hold, in the same order, some of them at a time."""
        assert self._keep_texts
        for group in self.records():
            for records in _blocks(group):
                texts = self._texts_of(records)
                columns = (records[name].tolist() for name in ("kept", "start", "size"))
                yield [
                    self._kept[kept].content
                    if kept >= 0
                    else texts.get(start) or SpooledContent(self._spool, start, size)
                    for kept, start, size in zip(*columns, strict=True)
                ]

    def _texts_of(self, records: Records) -> dict[int, bytes]:
        """Read the short texts of some documents, those that lie side by side at once: where each begins, and it."""
        rows = records[(records["kept"] < 0) & (records["size"] <= _SHORT)]
        rows = rows[np.argsort(rows["start"])]
        starts, ends = rows["start"], rows["start"] + rows["size"]
        found = dict[int, bytes]()
        for part in np.split(np.arange(len(rows)), np.flatnonzero(starts[1:] != ends[:-1]) + 1):
            if len(part):
                first, last = int(starts[part[0]]), int(ends[part[-1]])
                data = os.pread(self._spool, last - first, first)
                for start, end in zip(starts[part].tolist(), ends[part].tolist(), strict=True):
                    found[start] = data[start - first : end - first]
        return found

    def digest(self) -> str:
        """Return the hash of the hashes of all documents."""
        digest, separator = hashlib.sha256(), ""
        for group in self.records():
            digests = group["digest"].tobytes().hex()
            text = "\n".join(digests[at : at + 64] for at in range(0, len(digests), 64))
            if text:
                digest.update(f"{separator}{text}".encode())
                separator = "\n"
        return digest.hexdigest()

    def _end_run(self) -> None:
        if not self._rows:
            return
        records = self._sorted_run()
        if self._index < 0:
            self._index = _unnamed_file(self._folder)
        at = sum(int(bounds[-1]) for _, bounds in self._runs)
        self._write(self._index, records.tobytes(), at * _RECORD.itemsize)
        first_bytes = np.frombuffer(records["digest"].tobytes(), np.uint8)[::32]
        self._runs.append((at, np.searchsorted(first_bytes, np.arange(257)).astype(np.int64)))

    def _sorted_run(self) -> Records:
        """Return the records that were added last, sorted; their texts are written in the same order."""
        records = np.array(self._rows, dtype=_RECORD)
        records = records[np.argsort(records["digest"], kind="stable")]
        if self._texts:
            is_row = records["kept"] < 0
            order, sizes = records["start"][is_row], records["size"][is_row]
            if self._spool < 0:
                self._spool = _unnamed_file(self._folder)
            self._write(self._spool, b"".join([self._texts[n] for n in order]), self._spooled)
            records["start"][is_row] = self._spooled + np.cumsum(sizes) - sizes
            self._spooled += self._texts_bytes
        self._rows, self._texts, self._texts_bytes = [], [], 0
        return records

    def _write(self, fd: int, data: bytes, at: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            error.filename = str(self._folder or tempfile.gettempdir())
            raise

    def _read(self, at: int, count: int) -> Records:
        size = int(count) * _RECORD.itemsize
        return np.frombuffer(os.pread(self._index, size, int(at) * _RECORD.itemsize), _RECORD)


def _blocks(records: Records) -> Iterator[Records]:
    """Cut records into blocks whose short texts are a few megabytes."""
    sizes = np.where(records["size"] <= _SHORT, records["size"], 0)
    numbers = np.cumsum(sizes) // _BLOCK_BYTES
    yield from np.split(records, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)


def _unnamed_file(folder: Path | None) -> int:
    """Return the descriptor of a new file that has no name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())
