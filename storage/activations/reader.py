"""Read rows of a sealed store: the bytes that were written, or an error that names the file."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
import torch

from stackwise_core.masking import VALIDATION_VIEW
from storage.activations.buffers import bytes_of, destination
from storage.activations.format import Group, corrupt, shard_path
from storage.activations.opening import open_sealed
from storage.activations.shard import CRC_BYTES, ShardDamageError, ShardFile, ShardIndex
from storage.errors import ArtifactError

Check = Literal["first_touch", "always", "never"]
Indices = torch.Tensor | np.ndarray | Sequence[int]

MAX_OPEN_SHARDS: Final = 128


class RowMissingError(ArtifactError, KeyError):
    """The store holds no such row."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class StoreReader:
    """Rows of a sealed store, by (sequence id, view).

    Every chunk carries a checksum. `first_touch` compares it when a chunk is first read, `always` at every
    read, `never` trusts the disk; the index of a shard is compared in all three. Whole files put in each
    other's place are beyond this; `verify_files` finds them.

    Several threads may read at once. A reader is a context manager; a read after `close` opens files anew.

    Attributes:
        folder: The artifact.
        attributes: What the writer was given.
        train: Layout of the training rows.
        validation: Layout of the validation rows.
        dtype: Of the training rows.
    """

    def __init__(self, folder: Path, files: Mapping[str, tuple[int, str]], check: Check = "first_touch") -> None:
        """Open a store: the sizes of all its files and the content of the small ones are compared here.

        Args:
            folder: The sealed artifact.
            files: Its sealed list: posix path relative to `folder` -> (size in bytes, `<algorithm>:<hex>`).
            check: When to compare checksums of chunks.

        Raises:
            ArtifactMissingError: There is no such folder.
            ArtifactError: A newer version of this program wrote the store.
            ArtifactCorruptError: A file is missing, or is not what was sealed, or the list lacks one.
        """
        self.folder = folder
        self.attributes, groups = open_sealed(folder, files)
        self._groups = groups
        self.train, self.validation = groups["train"].spec, groups["validation"].spec
        self.dtype = self.train.torch_dtype
        self._files = files
        self._check = check
        self._shard_indices: dict[tuple[Group, int], ShardIndex] = {}
        self._indexing = threading.Lock()
        # Not a bound method: without a cycle the files close as soon as the reader is dropped.
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(functools.partial(_open_shard, folder))

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of some sequences in one view, in the order asked for.

        Args:
            sequence_ids: int64 `[B]`.
            view: 0 or more for training rows, `VALIDATION_VIEW` for validation rows.
            out: As for `read`.

        Returns:
            `[B, T, D]` in the dtype of the store.

        Raises:
            RowMissingError: The store holds no such row.
            ArtifactCorruptError: The bytes are not what was sealed.
        """
        group: Group = "validation" if view == VALIDATION_VIEW else "train"
        try:
            rows = self._groups[group].rows.find(np.asarray(sequence_ids, np.int64), view)
        except KeyError as error:
            remedy = "ask for rows that the stage's steps visit, or make a store that holds them"
            raise RowMissingError(self.folder, f"no {group} row of {error.args[0]}", remedy) from None
        return self.read(group, rows, out)

    def read(self, group: Group, row_indices: Indices, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows by their place in the store.

        Args:
            group: Which rows.
            row_indices: int64 `[B]`, in any order; a row may be asked for twice.
            out: `[B, T, D]`, contiguous, on the CPU, of the store's dtype, to be filled and returned; best
                page-aligned (`empty_aligned`). Without it a new tensor is made. Undefined after an error.

        Returns:
            `[B, T, D]` in the dtype of the group.

        Raises:
            IndexError: A row is outside the group.
            ValueError: `out` does not fit.
            ArtifactCorruptError: The bytes are not what was sealed.
        """
        spec = self._groups[group].spec
        rows = np.asarray(row_indices, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < spec.rows:
            raise IndexError(f"{group} rows {rows.min()}..{rows.max()} of {spec.rows}")
        out = destination(out, (len(rows), spec.seq_len, spec.d_model), spec.torch_dtype)
        data = bytes_of(out)
        chunks: list[int] = (rows // spec.rows_per_chunk).tolist()
        within: list[int] = (rows % spec.rows_per_chunk).tolist()
        # In the order of the file, so that rows of one chunk are read together.
        order: list[int] = np.argsort(rows, kind="stable").tolist()
        for chunk, places in groupby(order, key=chunks.__getitem__):
            wanted = [(place, within[place]) for place in places]
            shard, slot = divmod(chunk, spec.chunks_per_shard)
            self._read_chunk(group, shard, slot, wanted, data)
        return out

    def close(self) -> None:
        """Close all files."""
        self._open.cache_clear()

    def __enter__(self) -> Self:
        """Give the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()

    def _read_chunk(self, group: Group, shard: int, slot: int, wanted: list[tuple[int, int]], data: np.ndarray) -> None:
        """Copy rows of one chunk, given as (place in `data`, row within the chunk), checking it if due."""
        spec, what = self._groups[group].spec, f"chunk {slot}"
        try:
            file, index = self._open(group, shard), self._index(group, shard)
            offset = index.offsets[slot]
            if self._check == "never" or (self._check == "first_touch" and index.verified[slot]):
                for place, row in wanted:
                    file.read(data[place], offset + row * spec.row_bytes, what)
                return
            # A chunk of one row is read to where it belongs, and only copied if it was asked for twice.
            alone = spec.rows_per_chunk == 1
            chunk = data[wanted[0][0]] if alone else np.empty(spec.chunk_bytes, np.uint8)
            file.read_checked(chunk, np.empty(CRC_BYTES, np.uint8), offset, what)
            index.verified[slot] = True
            for place, row in wanted[1:] if alone else wanted:
                data[place] = chunk[row * spec.row_bytes : (row + 1) * spec.row_bytes]
        except ShardDamageError as damage:
            raise corrupt(self.folder, self.folder / shard_path(group, shard), str(damage)) from None

    def _index(self, group: Group, shard: int) -> ShardIndex:
        """The index of a shard, read at its first touch and kept for as long as the reader."""
        with self._indexing:
            if (group, shard) not in self._shard_indices:
                size, _ = self._files[shard_path(group, shard)]
                spec = self._groups[group].spec
                index = ShardIndex(self._open(group, shard), size, spec, spec.chunks_in_shard(shard))
                self._shard_indices[group, shard] = index
            return self._shard_indices[group, shard]


def _open_shard(folder: Path, group: Group, shard: int) -> ShardFile:
    path = folder / shard_path(group, shard)
    try:
        return ShardFile(path)
    except FileNotFoundError:
        raise corrupt(folder, path, "missing") from None
