"""Packed sequences: one file for each array of a split, which is written piece by piece and read through a mapping.

Needs no torch.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from stackwise_core.data.masks import BoolArray, IntArray
from stackwise_core.data.tokenizer import TokenArray

FIRST_VALIDATION_ID = 1 << 40
"""Validation sequences are numbered from here, so that an id shows its split."""
SPLITS = {"train": 0, "validation": FIRST_VALIDATION_ID}
"""The splits, and the id of the first sequence of each."""
_COPIED = 1 << 24
"""Bytes that are copied at a time."""
_MOST_MAPPED = 1 << 27
"""Bytes of a mapped array that may stay in this process's memory after they were read."""
_MAPPED_AT_ONCE = 1 << 16
"""Bytes that Linux maps around one that is read."""


_ARRAYS = ("tokens", "sequence_ids", "targets", "masks")
"""The fields of a split that are files."""


def documents_in(tokens: IntArray, end_token: int) -> IntArray:
    """Return the number of each token's document in its sequence, from 0: [..., T] to [..., T]."""
    ends = (tokens == end_token).astype(np.int64)
    return np.cumsum(ends, axis=-1) - ends


@dataclass(frozen=True)
class PackedSequences:
    """One split: tokens [N, T] (unsigned) and stable ids [N] (int64)."""

    tokens: TokenArray | MixedRows
    sequence_ids: IntArray
    targets: IntArray | MixedRows | None = None
    """For a custom objective: [N, T]."""
    masks: BoolArray | MixedRows | None = None
    """For a custom objective, True at the loss positions: [N, T]."""
    end_token: int | None = None
    """Where documents are kept apart: the token that ends each."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def take(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return tokens [B, T] and sequence ids [B] of some rows."""
        return taken(self.tokens, rows).astype(np.int64), taken(self.sequence_ids, rows)

    def fields(self, rows: IntArray) -> dict[str, NDArray[Any]]:
        """Return a batch of some rows: input_ids [B, T], sequence_ids [B], and targets and masks if there are any."""
        own = {"targets": self.targets, "masks": self.masks}
        given = {name: taken(array, rows) for name, array in own.items() if array is not None}
        return {**self.inputs(rows), **given}

    def inputs(self, rows: IntArray) -> dict[str, NDArray[Any]]:
        """Return input_ids [B, T], sequence_ids [B] and, if documents are kept apart, their numbers [B, T]."""
        tokens, ids = self.take(rows)
        apart = {} if self.end_token is None else {"documents": documents_in(tokens, self.end_token)}
        return {"input_ids": tokens, "sequence_ids": ids, **apart}

    def rows_of(self, sequence_ids: IntArray) -> IntArray:
        """Return the row numbers of sequence ids; ids are consecutive within a split."""
        return sequence_ids - self.sequence_ids[0]


def taken(array: NDArray[Any] | MixedRows, rows: IntArray) -> NDArray[Any]:
    """Return some rows of an array; what a mapping read for them does not pile up in memory."""
    found = array[rows]
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and len(mapping) > _MOST_MAPPED:
        _touched[id(mapping)] = _touched.get(id(mapping), 0) + len(rows) * max(found[:1].nbytes, _MAPPED_AT_ONCE)
        if _touched[id(mapping)] > _MOST_MAPPED:
            mapping.madvise(mmap.MADV_DONTNEED)
            _touched[id(mapping)] = 0
    return found


class MixedRows:
    """Rows of several arrays, as if they were one: what `PackedSequences` reads, without a copy."""

    def __init__(self, parts: Sequence[NDArray[Any] | MixedRows], rows: IntArray) -> None:
        """Take the arrays of all sources [N, ...], alike but for N, and the numbers of the rows of the mixture [M]."""
        self._parts, self._rows = parts, rows
        self._ends = np.cumsum([len(part) for part in parts])
        self._row = parts[0][:1].shape[1:]
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Return some rows: of a slice, or of numbers [B]."""
        rows = taken(self._rows, key) if isinstance(key, np.ndarray) else np.asarray(self._rows[key])
        of = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), *self._row), self.dtype)
        for number, part in enumerate(self._parts):
            if (here := of == number).any():
                found[here] = taken(part, rows[here] - (self._ends[number] - len(part)))
        return found


_touched: dict[int, int] = {}
"""About how many bytes of each large mapping were read since it was last let go."""


# ---------------------------------------------------------------- writing


class ArrayWriter:
    """Writes an array of unknown length into an .npy file: the bytes that `numpy.save` would write of the whole."""

    def __init__(self, path: Path, dtype: DTypeLike, row: tuple[int, ...] = (), kept: int = 0) -> None:
        """Begin a file, or go on after the first `kept` items of one that was begun; an error names the file."""
        self.path, self.dtype, self._row = path, np.dtype(dtype), row
        self._header = len(self._header_of(0))
        self.n_items = kept
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o666)
        os.ftruncate(self._fd, self._header + kept * self.dtype.itemsize)
        os.lseek(self._fd, 0, os.SEEK_END)

    def append(self, values: NDArray[Any]) -> None:
        """Append values, in any shape."""
        data = np.ascontiguousarray(values, self.dtype).data.cast("B")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.n_items += values.size

    def flush(self) -> None:
        """See that what was appended is on the disk."""
        os.fdatasync(self._fd)

    def finish(self, n_rows: int) -> None:
        """Complete the file, with its first `n_rows` rows."""
        header = self._header_of(n_rows)
        assert len(header) == self._header  # numpy leaves room in it for any number of rows
        n_items = n_rows * int(np.prod(self._row, dtype=np.int64))
        os.ftruncate(self._fd, self._header + n_items * self.dtype.itemsize)
        os.pwrite(self._fd, header, 0)
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _header_of(self, n_rows: int) -> bytes:
        file = io.BytesIO()
        kind = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (n_rows, *self._row)}
        npy.write_array_header_1_0(file, kind)
        return file.getvalue()


def array_path(folder: Path, split: str, name: str) -> Path:
    """Return the file of an array of a split, such as `train_tokens.npy`."""
    return folder / f"{split}_{name}.npy"


def write_split(folder: Path, split: str, sequences: PackedSequences, rows: IntArray | None = None) -> None:
    """Write a split into a folder, or some of its rows, which are then numbered anew."""
    for name in _ARRAYS:
        array = getattr(sequences, name)
        if array is None:
            continue
        writer = ArrayWriter(array_path(folder, split, name), array.dtype, array.shape[1:])
        of = rows if name != "sequence_ids" or rows is None else np.arange(len(rows), dtype=np.int64)
        for part in parts_of(array, of):
            writer.append(part)
        writer.finish(len(array) if rows is None else len(rows))


def write_ids(folder: Path, split: str, n_rows: int) -> None:
    """Write the ids of the sequences of a split."""
    writer, step = ArrayWriter(array_path(folder, split, "sequence_ids"), np.int64), _COPIED // 8
    for at in range(0, n_rows, step):
        writer.append(SPLITS[split] + np.arange(at, min(at + step, n_rows), dtype=np.int64))
    writer.finish(n_rows)


def load_split(folder: Path, split: str) -> PackedSequences:
    """Map the arrays of a split; raises what numpy raises if they are not there or are no arrays."""
    paths = {name: array_path(folder, split, name) for name in _ARRAYS}
    found = {name: path for name, path in paths.items() if path.exists()}
    return PackedSequences(**{name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in found.items()})


def parts_of(array: NDArray[Any] | MixedRows, rows: IntArray | None = None) -> Iterator[NDArray[Any]]:
    """Yield all rows of an array, or those of some numbers, a few megabytes at a time."""
    n_rows, step = len(array) if rows is None else len(rows), max(1, _COPIED // max(1, array[:1].nbytes))
    for at in range(0, n_rows, step):
        part = np.arange(at, min(at + step, n_rows), dtype=np.int64) if rows is None else rows[at : at + step]
        yield taken(array, part)
