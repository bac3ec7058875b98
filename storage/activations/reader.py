"""Read rows of a sealed store: the bytes that were written, or an error that names the file."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.model.stream import Quantised, dequantise
from storage.activations.buffers import bytes_of, destination, empty_aligned
from storage.activations.format import GROUPS, Array, Group, corrupt, parse_record, record_path, shard_path
from storage.activations.metadata import open_sealed
from storage.activations.shard import ShardDamageError, ShardObject, ShardObjects
from storage.activations.sharded_array import Check, ShardedArray
from storage.checksums import checksum_bytes
from storage.errors import ArtifactError
from storage.file_systems import is_local

Access = Literal["auto", "map", "read"]
Indices = torch.Tensor | np.ndarray | Sequence[int]


class RowMissingError(ArtifactError, KeyError):
    """The store holds no such row."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class StoreReader:
    """Rows of a sealed store, by (sequence id, view).

    Every chunk carries a checksum. `first_touch` compares it when a chunk is first read, `always` at every
    read, `never` trusts the disk; the index of a shard is compared in all three. What is compared is the sealed
    checksum too: a shard, or a chunk, in another's place is whole, and not the one that was asked for.

    Several threads may read at once. A reader is a context manager; a read after `close` opens files anew.

    Attributes:
        folder: The artifact.
        attributes: What the writer was given.
        train: Layout of the training rows.
        validation: Layout of the validation rows.
        dtype: Of the rows that it gives: of a quantised store float32.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, tuple[int, str]],
        check: Check = "first_touch",
        access: Access = "auto",
        objects: ShardObjects | None = None,
    ) -> None:
        """Open a store: the sizes of all its files and the content of the small ones are compared here.

        Args:
            folder: The sealed artifact.
            files: Its sealed list: posix path relative to `folder` -> (size in bytes, `<algorithm>:<hex>`).
            check: When to compare checksums of chunks.
            access: Through mappings, by `pread`, or mapped if the store is on a local disk and fits into memory.
            objects: Where the shards are, if they are not in the folder; `access` then does not matter. Closed
                with the reader, which after that reads no more.

        Raises:
            ArtifactMissingError: There is no such folder.
            ArtifactError: A newer version of this program wrote the store.
            ArtifactCorruptError: A file is missing, or is not what was sealed, or the list lacks one.
        """
        self.folder, self._objects = folder, objects
        self._place = objects.folder.artifact_uri if objects else folder
        self.attributes, self._groups = open_sealed(folder, files, whole=objects is None)
        self.train, self.validation = (self._groups[group].spec for group in GROUPS)
        self.dtype = torch.float32 if self.train.is_quantised else self.train.torch_dtype
        mapped = objects is None and (access == "map" or (access == "auto" and _can_map(folder, files)))
        self._arrays: dict[tuple[Group, Array], ShardedArray] = {
            (group, array): ShardedArray(
                spec,
                functools.partial(_path_of, folder, group, array),
                [files[shard_path(group, shard, array)][0] for shard in range(spec.n_shards)],
                functools.partial(_chunk_checksums, folder, files, group, array),
                check,
                mapped=mapped,
                object_of=functools.partial(_object_of, objects, group, array) if objects else None,
            )
            for group, metadata in self._groups.items()
            for array, spec in metadata.spec.arrays.items()
        }
        if objects:
            try:
                for array in self._arrays.values():
                    array.read_indices(objects.pool)
            except (ShardDamageError, FileNotFoundError) as error:
                raise self._explained(error) from None

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of some sequences in one view, in the order asked for.

        Args:
            sequence_ids: int64 `[B]`.
            view: 0 or more for training rows, `VALIDATION_VIEW` for validation rows.
            out: As for `read`.

        Returns:
            `[B, T, D]` in `dtype`.

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
            out: `[B, T, D]`, contiguous, on the CPU, in `dtype`, to be filled and returned; best
                page-aligned (`empty_aligned`). Without it a new tensor is made. Undefined after an error.

        Returns:
            `[B, T, D]` in `dtype`; what was quantised is dequantised.

        Raises:
            IndexError: A row is outside the group.
            ValueError: `out` does not fit.
            ArtifactCorruptError: The bytes are not what was sealed.
        """
        spec = self._groups[group].spec
        rows = np.asarray(row_indices, np.int64)
        shape = (len(rows), spec.seq_len, spec.d_model)
        channels, out = self._groups[group].channels, destination(out, shape, self.dtype)
        if channels is None:
            self.read_bytes(group, rows, bytes_of(out))
            return out
        stored = Quantised(empty_aligned(shape, spec.torch_dtype), empty_aligned((*shape[:2], 1), torch.float32))
        self.read_bytes(group, rows, bytes_of(stored.values))
        self.read_bytes(group, rows, bytes_of(stored.scale), "scale")
        return dequantise(stored, channels, out)

    def read_bytes(self, group: Group, rows: np.ndarray, out: np.ndarray, array: Array = "activations") -> None:
        """Rows as they are stored; a tenth of a millisecond less than `read`, which goes through torch.

        Args:
            group: Which rows.
            rows: int64 `[B]`.
            out: uint8 `[B, bytes of a row]`, C-contiguous rows, to be filled.
            array: Of a quantised store, which of the two.

        Raises:
            IndexError: A row is outside the group.
            ArtifactCorruptError: The bytes are not what was sealed.
        """
        n_rows = self._groups[group].spec.rows
        # A negative number is a large one without its sign.
        if rows.size and np.maximum.reduce(rows.view(np.uint64)) >= n_rows:
            raise IndexError(f"{group} rows {rows.min()}..{rows.max()} of {n_rows}")
        try:
            self._arrays[group, array].read(rows, out)
        except (ShardDamageError, FileNotFoundError) as error:
            raise self._explained(error) from None

    def _explained(self, error: ShardDamageError | FileNotFoundError) -> ArtifactError:
        if isinstance(error, ShardDamageError):
            return corrupt(self._place, error.path, error.problem)
        return corrupt(self._place, Path(error.filename), "missing")

    def close(self) -> None:
        """Close all files."""
        for array in self._arrays.values():
            array.close()
        if self._objects:
            self._objects.close()

    def __enter__(self) -> Self:
        """Give the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()


def _can_map(folder: Path, files: Mapping[str, tuple[int, str]]) -> bool:
    """Whether mapping is fast and safe: what does not fit would be fetched a page at a time, again and again."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sum(size for size, _ in files.values()) <= memory // 2 and is_local(folder)


def _chunk_checksums(
    folder: Path, files: Mapping[str, tuple[int, str]], group: Group, array: Array, shard: int
) -> np.ndarray:
    """The sealed checksums of a shard's chunks, by its record."""
    name = record_path(group, shard, array)
    data = np.fromfile(folder / name, np.uint8)
    if checksum_bytes(data) != files[name][1]:
        raise corrupt(folder, folder / name, "the record of a shard is not what was sealed")
    return parse_record(data.tobytes()).chunks


def _path_of(folder: Path, group: Group, array: Array, shard: int) -> Path:
    return folder / shard_path(group, shard, array)


def _object_of(objects: ShardObjects, group: Group, array: Array, shard: int) -> ShardObject:
    return objects.open(shard_path(group, shard, array))


class ReusedRows:
    """The rows of a reader, each batch in the buffer of the one that was read `n_buffers` before it."""

    def __init__(self, reader: StoreReader, n_buffers: int, *, pinned: bool = False) -> None:
        """Make no buffer yet: the first batches say how large.

        Args:
            reader: of a sealed store.
            n_buffers: batches that are valid at once.
            pinned: whether a CUDA device copies out of them: from pinned memory it does so by itself.
        """
        self.reader, self.pinned = reader, pinned
        self._buffers: list[torch.Tensor | None] = [None] * n_buffers
        self._turn = cycle(range(n_buffers))

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> torch.Tensor:
        """Return what `StoreReader.rows` does, valid until `n_buffers` further batches were asked for."""
        turn, n_rows = next(self._turn), len(sequence_ids)
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < n_rows:
            buffer = self._buffers[turn] = self._new_buffer(n_rows)
        return self.reader.rows(sequence_ids, view, out=buffer[:n_rows])

    def _new_buffer(self, n_rows: int) -> torch.Tensor:
        spec = self.reader.train
        shape = (n_rows, spec.seq_len, spec.d_model)
        if self.pinned:
            return torch.empty(shape, dtype=self.reader.dtype, pin_memory=True)
        return empty_aligned(shape, self.reader.dtype)
