"""Write a store shard by shard, so that a process killed at any moment loses one shard at most."""

from __future__ import annotations

import contextlib
import filecmp
import logging
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.files import sync, sync_tree
from stackwise_core.model.stream import ChannelStatistics, Quantised
from storage.activations.format import (
    RECORDS,
    ZARR,
    Array,
    Group,
    GroupSpec,
    Record,
    parse_record,
    record_path,
    shard_path,
)
from storage.activations.metadata import GroupMetadata, RowIndex, write_metadata
from storage.activations.shard import encode_shard, shard_file_bytes
from storage.errors import ArtifactUnsealedError
from storage.files import (
    TEMPORARY_SUFFIX,
    checksum_bytes,
    checksum_file,
    explain_full_disk,
    remove_temporaries,
    write_bytes,
    write_durably,
)

_log = logging.getLogger(__name__)

RowKeys = tuple[np.ndarray, np.ndarray]
"""The (sequence id, view) of every row of a group: int64 `[rows]` and int32 `[rows]`."""


@dataclass(frozen=True)
class ShardRange:
    """The rows of one shard."""

    group: Group
    index: int
    first_row: int
    n_rows: int


class StoreWriter:
    """Writes or resumes an unsealed store in a folder.

    The process that holds the folder's lock creates the writer, which removes what a killed run left half-written.
    Other processes get a pickled copy and write different shards.

    The metadata is on the disk before the constructor returns, a shard before its record, and both before
    `write_shard` returns. A shard without a record does not count, so no crash can leave half a shard that counts.
    """

    def __init__(
        self,
        folder: Path,
        specs: dict[Group, GroupSpec],
        attributes: dict[str, Any],
        indices: dict[Group, RowKeys],
        channels: ChannelStatistics | None = None,
    ) -> None:
        """Create the store, or keep the shards of an equal one that is already there.

        The folder is named after its content, so other metadata in it is damaged, and is replaced.

        Args:
            folder: Where to write; created if missing.
            specs: Layout of each group.
            attributes: JSON that describes the store, kept as attributes of the Zarr group.
            indices: The keys of the rows of each group.
            channels: For a quantised store, the statistics that standardise its channels.

        Raises:
            ValueError: An index does not fit its spec or names a row twice, or `channels` do not fit the dtype.
            StoreSpaceError: The disk is full.
        """
        self.folder, self.specs = folder, specs
        self._spare: list[np.ndarray] = []
        groups: dict[Group, GroupMetadata] = {
            group: _checked(group, spec, indices[group], channels) for group, spec in specs.items()
        }
        with explain_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder)
            self._install_metadata(attributes, groups)

    def missing_shards(self) -> list[ShardRange]:
        """Return the shards still to be written, in order, after verifying every byte of those with a record."""
        return [shard for shard in self._shards() if not self._is_written(shard)]

    def write_shard(self, shard: ShardRange, rows: torch.Tensor | Quantised) -> None:
        """Write one shard of each array, each with its record; all are on the disk on return.

        Args:
            shard: One of `missing_shards`. Writing it again replaces it.
            rows: `[n_rows, T, D]` in the dtype of the store, on the CPU; if that is quantised, values and scales.

        Raises:
            ValueError: The rows have another shape, dtype or device.
            StoreSpaceError: The disk is full. Shards written before are intact.
        """
        spec = self.specs[shard.group]
        assert spec.shard_range(shard.index) == range(shard.first_row, shard.first_row + shard.n_rows), shard
        tensors = rows if isinstance(rows, Quantised) else (rows,)
        if len(tensors) != len(spec.arrays):
            raise ValueError(f"{shard} needs {' and '.join(spec.arrays)}, got {len(tensors)} tensors")
        for of_array, tensor in zip(spec.arrays.values(), tensors, strict=True):
            _check_rows(shard, of_array, tensor)
        for (array, of_array), tensor in zip(spec.arrays.items(), tensors, strict=True):
            with self._memory(shard_file_bytes(of_array, shard.n_rows)) as data:
                chunks = encode_shard(of_array, tensor.detach().contiguous(), data)
                self._write_file(shard, array, data, chunks)

    @contextlib.contextmanager
    def _memory(self, n_bytes: int) -> Generator[np.ndarray]:
        """Lend uint8 `[n_bytes]` of a buffer that is kept for reuse; each thread in here has another one."""
        try:
            memory = self._spare.pop()
        except IndexError:  # not `if self._spare`: another thread may take the last one in between
            memory = np.empty(0, np.uint8)
        if memory.size < n_bytes:
            memory = np.empty(n_bytes, np.uint8)
        try:
            yield memory[:n_bytes]
        finally:
            self._spare.append(memory)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the buffers."""
        return self.__dict__ | {"_spare": []}

    def _write_file(self, shard: ShardRange, array: Array, data: np.ndarray, chunks: np.ndarray) -> None:
        # Hashing takes as long as writing and needs no disk, so the two go side by side.
        with ThreadPoolExecutor(1) as pool:
            checksum = pool.submit(checksum_bytes, data)
            write_durably(self.folder / shard_path(shard.group, shard.index, array), data)
        record = Record(shard.first_row, shard.n_rows, data.nbytes, checksum.result(), chunks)
        write_bytes(self.folder / record_path(shard.group, shard.index, array), record.dump())

    def files(self) -> dict[str, tuple[int, str]]:
        """List every file of the finished folder for its manifest: relative POSIX path -> (size, `sha256:<hex>`).

        The checksums of shards come from their records, which were computed from memory before writing.

        Raises:
            ArtifactUnsealedError: A shard has not been written.
        """
        listed: dict[str, tuple[int, str]] = {}
        for shard in self._shards():
            for array in self.specs[shard.group].arrays:
                name = shard_path(shard.group, shard.index, array)
                recorded = self._recorded(shard, array)
                if recorded is None:
                    problem = "this shard has not been written"
                    raise ArtifactUnsealedError(self.folder / name, problem, "write the missing shards first")
                listed[name] = recorded
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in listed:
                listed[name] = path.stat().st_size, checksum_file(path)
        return listed

    def _install_metadata(self, attributes: dict[str, Any], groups: dict[Group, GroupMetadata]) -> None:
        """Write the metadata to a temporary folder, and replace the existing store unless its metadata is equal."""
        store, records = self.folder / ZARR, self.folder / RECORDS
        fresh = self.folder / (ZARR + TEMPORARY_SUFFIX)
        try:
            write_metadata(fresh, attributes, groups)
            if not _holds(store, fresh):
                # Records first: without a record, a shard of the old store does not count.
                for old in (records, store):
                    if old.exists():
                        _log.warning("%s: the metadata is damaged or of another store; removed, to be made afresh", old)
                        shutil.rmtree(old)
                        sync(self.folder)
                sync_tree(fresh)
                fresh.rename(store)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        records.mkdir(exist_ok=True)
        sync(self.folder)

    def _shards(self) -> Iterator[ShardRange]:
        """Yield all shards of the store, in order."""
        for group, spec in self.specs.items():
            for index in range(spec.n_shards):
                rows = spec.shard_range(index)
                yield ShardRange(group, index, rows.start, len(rows))

    def _is_written(self, shard: ShardRange) -> bool:
        """Whether the file of a shard has the checksum of its record, in every array."""
        for array in self.specs[shard.group].arrays:
            recorded = self._recorded(shard, array)
            path = self.folder / shard_path(shard.group, shard.index, array)
            if recorded is None or checksum_file(path) != recorded[1]:
                return False
        return True

    def _recorded(self, shard: ShardRange, array: Array) -> tuple[int, str] | None:
        """Return size and checksum of a shard by its record, or None if either is missing or the size differs."""
        path = self.folder / shard_path(shard.group, shard.index, array)
        try:
            record = parse_record((self.folder / record_path(shard.group, shard.index, array)).read_bytes())
            rows_of_shard = (record.first_row, record.n_rows) == (shard.first_row, shard.n_rows)
            n_chunks = self.specs[shard.group].arrays[array].chunks_in_shard(shard.index)
            as_recorded = rows_of_shard and len(record.chunks) == n_chunks and path.stat().st_size == record.size
        except (FileNotFoundError, ValueError):
            return None
        return (record.size, record.checksum) if as_recorded else None


def _check_rows(shard: ShardRange, spec: GroupSpec, rows: torch.Tensor) -> None:
    shape = (shard.n_rows, spec.seq_len, spec.d_model)
    if tuple(rows.shape) != shape or rows.dtype != spec.torch_dtype or rows.device.type != "cpu":
        raise ValueError(
            f"{shard} needs {shape} {spec.torch_dtype} on the cpu, "
            f"got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )


def _checked(group: Group, spec: GroupSpec, index: RowKeys, channels: ChannelStatistics | None) -> GroupMetadata:
    """Refuse an index by which rows could not be found, and statistics that do not fit the rows."""
    rows = RowIndex(*index)
    shapes = [(tuple(part.shape), part.dtype) for part in channels or ()]
    if shapes != [((spec.d_model,), torch.float32)] * (2 if spec.is_quantised else 0):
        raise ValueError(f"{group}: statistics of channels {shapes} do not go with {spec.dtype} and {spec.d_model}")
    if len(rows.view) != spec.rows:
        raise ValueError(f"{group}: {len(rows.view)} sequence ids for {spec.rows} rows")
    if ((rows.view == VALIDATION_VIEW) != (group == "validation")).any():
        raise ValueError(f"{group}: view {VALIDATION_VIEW} means validation rows, and only they have it")
    return GroupMetadata(spec, rows, channels)


def _holds(store: Path, fresh: Path) -> bool:
    """Whether every file of `fresh` has the same bytes in `store`."""
    names = (path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
    return all((store / name).is_file() and filecmp.cmp(fresh / name, store / name, shallow=False) for name in names)
