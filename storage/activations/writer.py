"""Write a store shard by shard, so that a kill at any moment costs one shard at most."""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from storage.activations.durable import (
    TEMPORARY_SUFFIX,
    explain_full_disk,
    remove_temporaries,
    sync,
    sync_tree,
    write_durably,
)
from storage.activations.format import GROUPS, RECORDS, ZARR, Group, GroupSpec, record_path, shard_path
from storage.activations.metadata import GroupMetadata, write_metadata
from storage.activations.rows import RowIndex
from storage.activations.shard import encode_shard
from storage.activations.verify import checksum_file
from storage.errors import ArtifactUnsealedError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRange:
    """The rows of one shard: the unit of work, of loss and of record."""

    group: Group
    index: int
    first_row: int
    n_rows: int


class StoreWriter:
    """Writes an unsealed store folder (work/<id>) and resumes it.

    One process, the holder of the folder's lock, makes the writer: that clears away what a killed run left
    half-written. The writer pickles; other processes are handed a copy and write disjoint shards.

    What is durable when: the metadata before the constructor returns, a shard before its record, both before
    `write_shard` returns. A shard without a record does not count, so no order of crashes lets half of one in.
    """

    def __init__(
        self,
        folder: Path,
        train: GroupSpec,
        validation: GroupSpec,
        attributes: dict[str, Any],
        train_index: tuple[np.ndarray, np.ndarray],
        validation_index: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Create the store, or find the same one there and keep its shards.

        The folder is named after its content: if other metadata lies there it is damaged, and is replaced.

        Args:
            folder: Where to write; made if need be.
            train: Layout of the training rows.
            validation: Layout of the validation rows.
            attributes: JSON that describes the store, kept as attributes of the Zarr group.
            train_index: (sequence id int64, view int32) of every training row, each `[rows]`.
            validation_index: The same of the validation rows, whose view is `VALIDATION_VIEW`.

        Raises:
            ValueError: An index does not fit its spec or names a row twice.
            StoreSpaceError: The disk is full.
        """
        self.folder = folder
        self.specs: dict[Group, GroupSpec] = {"train": train, "validation": validation}
        groups: dict[Group, GroupMetadata] = {
            "train": _checked(train, train_index),
            "validation": _checked(validation, validation_index),
        }
        with explain_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder)
            self._settle_metadata(attributes, groups)

    def missing_shards(self) -> list[ShardRange]:
        """Shards still to be written, in order. Reads every byte that is recorded, to trust none unseen."""
        shards = (
            ShardRange(group, index, rows.start, len(rows))
            for group in GROUPS
            for index in range(self.specs[group].n_shards)
            for rows in [self.specs[group].shard_range(index)]
        )
        return [shard for shard in shards if not self._is_written(shard)]

    def write_shard(self, shard: ShardRange, rows: torch.Tensor) -> None:
        """Write one shard, then its record; both are on the disk on return.

        Args:
            shard: One of `missing_shards`. Writing it again replaces it.
            rows: `[n_rows, T, D]` in the dtype of the store, on the CPU.

        Raises:
            ValueError: The rows have another shape, dtype or device.
            StoreSpaceError: The disk is full. What was written before is intact.
        """
        spec = self.specs[shard.group]
        shape = (shard.n_rows, spec.seq_len, spec.d_model)
        if tuple(rows.shape) != shape or rows.dtype != spec.torch_dtype or rows.device.type != "cpu":
            raise ValueError(
                f"{shard} needs {shape} {spec.torch_dtype} on the cpu, "
                f"got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
            )
        data = encode_shard(spec, rows.detach().contiguous())
        record = _rows_of(shard) | {"size": data.nbytes, "crc32c": f"{google_crc32c.value(data):08x}"}
        write_durably(self.folder / shard_path(shard.group, shard.index), data)
        text = np.frombuffer(json.dumps(record).encode(), np.uint8)
        write_durably(self.folder / record_path(shard.group, shard.index), text)

    def files(self) -> dict[str, tuple[int, str]]:
        """List every file of the finished folder, for its manifest.

        Returns:
            Posix path relative to the folder -> (size in bytes, `crc32c:<hex>`). The checksums of shards come
            from their records, computed from memory before the bytes went to the disk; others are computed.

        Raises:
            ArtifactUnsealedError: A shard has not been written.
        """
        listed: dict[str, tuple[int, str]] = {}
        for group in GROUPS:
            for index in range(self.specs[group].n_shards):
                record = self._record(group, index)
                path = shard_path(group, index)
                if record is None:
                    raise ArtifactUnsealedError(
                        self.folder / path, "this shard has no record", "write the missing shards first"
                    )
                listed[path] = record["size"], f"crc32c:{record['crc32c']}"
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in listed:
                listed[name] = path.stat().st_size, checksum_file(path)
        return listed

    def _settle_metadata(self, attributes: dict[str, Any], groups: dict[Group, GroupMetadata]) -> None:
        """Write the metadata beside; keep the store that is there if it has the same, else replace it."""
        store, records = self.folder / ZARR, self.folder / RECORDS
        fresh = self.folder / (ZARR + TEMPORARY_SUFFIX)
        write_metadata(fresh, attributes, groups)
        if _holds(store, fresh):
            shutil.rmtree(fresh)
        else:
            # The records go first: from here on nothing vouches for a shard of the old store.
            for old in (records, store):
                if old.exists():
                    _log.warning("%s: its metadata is damaged; it is removed and made afresh", old)
                    shutil.rmtree(old)
                    sync(self.folder)
            sync_tree(fresh)
            fresh.rename(store)
        records.mkdir(exist_ok=True)
        sync(self.folder)

    def _is_written(self, shard: ShardRange) -> bool:
        """Whether a shard is there as its record says, to the last bit."""
        record = self._record(shard.group, shard.index)
        path = self.folder / shard_path(shard.group, shard.index)
        return (
            record is not None
            and record["rows"] == _rows_of(shard)["rows"]
            and path.is_file()
            and path.stat().st_size == record["size"]
            and checksum_file(path) == f"crc32c:{record['crc32c']}"
        )

    def _record(self, group: Group, index: int) -> dict[str, Any] | None:
        """Read a shard's record, or None if there is none that can be read."""
        try:
            record = json.loads((self.folder / record_path(group, index)).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(record, dict) and record.keys() == {"rows", "size", "crc32c"}
        return record if whole else None


def _rows_of(shard: ShardRange) -> dict[str, Any]:
    return {"rows": [shard.first_row, shard.n_rows]}


def _checked(spec: GroupSpec, index: tuple[np.ndarray, np.ndarray]) -> GroupMetadata:
    """Refuse an index that could not be read back."""
    if len(index[0]) != spec.rows:
        raise ValueError(f"{len(index[0])} sequence ids for {spec.rows} rows")
    return GroupMetadata(spec, RowIndex(*index))


def _holds(store: Path, fresh: Path) -> bool:
    """Whether every file of `fresh` is in `store` with the same bytes."""
    names = (path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
    return all(
        (store / name).is_file() and filecmp.cmp(fresh / name, store / name, shallow=False) for name in names
    )
