"""Read rows of a sealed store, verified against the checksums of the manifest."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

import numpy as np
import torch

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.errors import size
from stackwise_core.model.stream import ChannelStatistics, Quantised, dequantise
from stackwise_core.notebook import table
from storage.activations.format import GROUPS, Array, Group, corrupt, parse_record, record_path, shard_path
from storage.activations.metadata import open_sealed
from storage.activations.shard import ShardDamageError, ShardObject, bytes_of
from storage.activations.sharded_array import Check, ShardedArray
from storage.errors import ArtifactError
from storage.files import Files, checksum_bytes, is_local

if TYPE_CHECKING:
    from storage.place import RangeReader

Access = Literal["auto", "map", "read"]
"""How shards are read: mapped, by `pread`, or mapped if they are on a local disk and fit into memory (auto)."""
MakeTensor = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
Indices = torch.Tensor | np.ndarray | Sequence[int]
PAGE_BYTES: Final = 4096
_REQUESTS_AT_ONCE: Final = 32


class RowMissingError(ArtifactError, KeyError):
    """The store does not have a row that was asked for."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class StoreReader:
    """Reads the rows of a sealed store by (sequence id, view) or by index.

    Every chunk has a checksum, which `first_touch` verifies when a chunk is first read, `always` at every read, and
    `never` not at all; the index of a shard is always verified. Because the checksum is also compared with the one in
    the shard's record, a shard or chunk that was swapped with another is noticed.

    Several threads may read at once. A reader is a context manager; a read after `close` opens files again.

    `attributes` are those that the writer was given, `train` and `validation` the layouts of the two groups, and
    `dtype` is the type of the rows that are returned: float32 if the store is quantised.
    """

    def __init__(
        self,
        folder: Path,
        files: Files,
        check: Check = "first_touch",
        access: Access = "auto",
        remote: RangeReader | None = None,
    ) -> None:
        """Opening one compares the sizes of all its files and the content of the small ones.

        Args:
            folder: The sealed artifact.
            files: The files of its manifest.
            check: When to verify the checksums of chunks.
            access: Map the shards, read them by `pread`, or map them if they are on a local disk and fit into memory.
            remote: Where the shards are, if not in the folder. Then `access` has no effect, and nothing can be read
                after `close`.

        Raises:
            ArtifactMissingError: The folder does not exist.
            ArtifactError: A newer version of this program wrote the store.
            ArtifactCorruptError: A file is missing, differs from what was sealed, or is not listed.
        """
        self.folder = folder
        self._place = remote.artifact_uri if remote else folder
        self.attributes, self._groups = open_sealed(folder, files, complete=remote is None)
        self.train, self.validation = (self._groups[group].spec for group in GROUPS)
        self.dtype = torch.float32 if self.train.is_quantised else self.train.torch_dtype
        mapped = remote is None and (access == "map" or (access == "auto" and _can_map(folder, files)))
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "ranges") if remote else None
        object_of = functools.partial(ShardObject, remote, self._pool) if remote and self._pool else None
        self._arrays: dict[tuple[Group, Array], ShardedArray] = {}
        for group, metadata in self._groups.items():
            for array, spec in metadata.spec.arrays.items():
                names = [shard_path(group, shard, array) for shard in range(spec.n_shards)]
                shards = {name: files[name][0] for name in names}
                checksums_of = functools.partial(_chunk_checksums, folder, files, group, array)
                self._arrays[group, array] = ShardedArray(
                    spec, folder, shards, checksums_of, check, mapped=mapped, object_of=object_of
                )
        if self._pool:
            try:
                for array in self._arrays.values():
                    array.read_indices(self._pool)
            except (ShardDamageError, FileNotFoundError) as error:
                raise self._explained(error) from None

    def _repr_html_(self) -> str:
        spec, recipe = self.train, self.attributes.get("recipe", {})
        boundary = f" of boundary {recipe['boundary']}" if "boundary" in recipe else ""
        rows = [
            ("training rows", self.train.rows),
            ("validation rows", self.validation.rows),
            ("a row", f"{spec.seq_len:,} positions of {spec.d_model:,} channels, {spec.dtype}"),
            ("bytes", size((self.train.rows + self.validation.rows) * spec.row_bytes)),
            ("chunk", f"{spec.chunk_bytes // spec.row_bytes:,} rows, each with a checksum"),
            ("shards", spec.n_shards),
            ("folder", str(self._place)),
        ]
        return table(f"Activation store{boundary}", ("property", "value"), rows)

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows of some sequences in one view, by `read`; view -1 means validation rows.

        Raises:
            RowMissingError: The store does not have such a row.
            ArtifactCorruptError: The bytes differ from what was sealed.
        """
        return self.read(*self._found(sequence_ids, view), out)

    def stored_rows(
        self, sequence_ids: torch.Tensor | np.ndarray, view: int, make: MakeTensor
    ) -> tuple[tuple[torch.Tensor, ...], ChannelStatistics | None]:
        """Return the rows that `rows` returns as they are stored, in tensors that `make` returns.

        Returns:
            Values `[B, T, D]`; and of a quantised store, float32 scales `[B, T, 1]` and the statistics of its channels.
        """
        group, rows = self._found(sequence_ids, view)
        return self._stored(group, rows, make), self._groups[group].channels

    def _found(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> tuple[Group, np.ndarray]:
        """Return the group of some rows, and their indices in it."""
        group: Group = "validation" if view == VALIDATION_VIEW else "train"
        try:
            return group, self._groups[group].rows.find(np.asarray(sequence_ids, np.int64), view)
        except KeyError as error:
            remedy = "ask for rows that the stage's steps visit, or make a store that holds them"
            raise RowMissingError(self.folder, f"no {group} row of {error.args[0]}", remedy) from None

    def _stored(self, group: Group, rows: np.ndarray, make: MakeTensor) -> tuple[torch.Tensor, ...]:
        stored: list[torch.Tensor] = []
        for array, spec in self._groups[group].spec.arrays.items():
            stored.append(make((len(rows), spec.seq_len, spec.d_model), spec.torch_dtype))
            self.read_bytes(group, rows, bytes_of(stored[-1]), array)
        return tuple(stored)

    def has(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> np.ndarray:
        """Return which sequences have a row in one view, as `rows` takes it: bool `[B]`."""
        group: Group = "validation" if view == VALIDATION_VIEW else "train"
        return self._groups[group].rows.has(np.asarray(sequence_ids, np.int64), view)

    def read(self, group: Group, row_indices: Indices, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows of these indices, in any order, in a group: `[B, T, D]` in `dtype`, dequantised.

        They are written to `out` if it is given, best a page-aligned tensor (`empty_aligned`); its content is undefined
        after an error.

        Raises:
            IndexError: The group does not have such a row.
            ValueError: `out` has another shape or dtype, is not contiguous, or is not on the CPU.
            ArtifactCorruptError: The bytes differ from what was sealed.
        """
        spec = self._groups[group].spec
        rows = np.asarray(row_indices, np.int64)
        shape = (len(rows), spec.seq_len, spec.d_model)
        channels = self._groups[group].channels
        out = empty_aligned(shape, self.dtype) if out is None else _checked_out(out, shape, self.dtype)
        if channels is None:
            self.read_bytes(group, rows, bytes_of(out))
            return out
        return dequantise(Quantised(*self._stored(group, rows, empty_aligned)), channels, out)

    def read_bytes(self, group: Group, rows: np.ndarray, out: np.ndarray, array: Array = "activations") -> None:
        """Copy rows int64 `[B]` as stored into uint8 `[B, row bytes]`; saves the 0.1 ms of `read`'s tensors.

        Raises:
            IndexError: The group does not have such a row.
            ArtifactCorruptError: The bytes differ from what was sealed.
        """
        n_rows = self._groups[group].spec.rows
        # Viewed as unsigned, a negative number is a large one.
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
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _can_map(folder: Path, files: Files) -> bool:
    """Whether mapping is safe (a local disk) and fast: what does not fit into memory is fetched again page by page."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sum(size for size, _ in files.values()) <= memory // 2 and is_local(folder)


def _chunk_checksums(folder: Path, files: Files, group: Group, array: Array, shard: int) -> np.ndarray:
    """Read the sealed checksums of a shard's chunks from its record."""
    name = record_path(group, shard, array)
    data = np.fromfile(folder / name, np.uint8)
    if checksum_bytes(data) != files[name][1]:
        raise corrupt(folder, folder / name, "the record of a shard differs from what was sealed")
    try:
        return parse_record(data.tobytes()).chunks
    except ValueError as error:
        raise corrupt(folder, folder / name, str(error)) from None


def empty_aligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor that begins at a page boundary.

    Large allocations otherwise begin 16 bytes or more into a page, and reads into them were several times slower.
    """
    n_bytes = prod(shape) * dtype.itemsize
    raw = torch.empty(n_bytes + PAGE_BYTES, dtype=torch.uint8)
    first = -raw.data_ptr() % PAGE_BYTES
    return raw[first : first + n_bytes].view(dtype).view(shape)


def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor in page-locked memory, which a CUDA device reads and writes by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _checked_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
        found = f"{tuple(out.shape)} {out.dtype} {out.stride()} on {out.device}"
        raise ValueError(f"out must be {shape} {dtype}, contiguous, on the cpu; got {found}")
    return out


def rows_for(device: torch.device, reader: StoreReader, n_buffers: int) -> ReusedRows | DeviceRows:
    """Return the rows of a store where a device computes, valid until `n_buffers` further batches have been read.

    Only one thread may read them.
    """
    return DeviceRows(reader, device) if device.type == "cuda" else ReusedRows(reader, n_buffers)


class ReusedRows:
    """Reads the rows of a store into a few buffers, which are used in turn."""

    def __init__(self, reader: StoreReader, n_buffers: int) -> None:
        """Read from `reader`."""
        self.reader = reader
        self._buffers: list[torch.Tensor | None] = [None] * n_buffers
        self._turn = cycle(range(n_buffers))

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> torch.Tensor:
        """Return what `StoreReader.rows` does, valid until `n_buffers` further batches have been read."""
        turn, n_rows = next(self._turn), len(sequence_ids)
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < n_rows:
            buffer = empty_aligned((n_rows, self.reader.train.seq_len, self.reader.train.d_model), self.reader.dtype)
            self._buffers[turn] = buffer
        return self.reader.rows(sequence_ids, view, out=buffer[:n_rows])


class DeviceRows:
    """Brings the rows of a store to a CUDA device, from the thread that reads them, while the device computes.

    They cross the bus as they are stored, from pinned memory and on a stream of their own; quantised ones are
    dequantised on the device, which gives the same bits. Only one thread may read.
    """

    def __init__(self, reader: StoreReader, device: torch.device) -> None:
        """Bring rows for the stream that is the device's current one now."""
        self.reader, self.device = reader, device
        self._own, self._users = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        self._pinned: dict[torch.dtype, torch.Tensor] = {}

    def rows(self, sequence_ids: torch.Tensor | np.ndarray, view: int) -> torch.Tensor:
        """Return what `StoreReader.rows` does, on the device."""
        stored, channels = self.reader.stored_rows(sequence_ids, view, self._buffer)
        with torch.cuda.stream(self._own):
            moved = [part.to(self.device, non_blocking=True) for part in stored]
            rows = moved[0] if channels is None else dequantise(Quantised(*moved), channels)
            arrived = self._own.record_event()
        arrived.synchronize()  # the buffers are free for the next rows, and any stream may read these
        rows.record_stream(self._users)  # their memory is not given away while that stream still needs it
        return rows

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._pinned or len(self._pinned[dtype]) < shape[0]:
            self._pinned[dtype] = empty_pinned(shape, dtype)
        return self._pinned[dtype][: shape[0]]
