"""The metadata of a store, which zarr-python writes and reads, and the checks when a store is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

# Imported for its effect: it registers our data types with zarr-python.
import storage.activations.dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]
from stackwise_core.config.schema import StreamDtype
from stackwise_core.model.stream import ChannelStatistics
from storage.activations.format import (
    FORMAT_VERSION,
    GROUP_FOLDERS,
    GROUPS,
    ZARR,
    ZARR_NAMES,
    Array,
    Group,
    GroupSpec,
    corrupt,
    is_metadata,
    metadata_paths,
    record_path,
    shard_path,
)
from storage.errors import ArtifactError, ArtifactMissingError
from storage.files import Files, checksum_file


class RowIndex:
    """Finds rows by binary search in the sorted sequence ids of a view.

    Attributes:
        sequence_id: int64 `[rows]`.
        view: int32 `[rows]`.
    """

    def __init__(self, sequence_id: np.ndarray, view: np.ndarray) -> None:
        """Sort the rows of every view by sequence id.

        Raises:
            ValueError: The lengths differ, or two rows have the same sequence id and view.
        """
        if sequence_id.ndim != 1 or sequence_id.shape != view.shape:
            raise ValueError(f"sequence_id {sequence_id.shape} and view {view.shape} must be [rows] both")
        self.sequence_id = sequence_id = sequence_id.astype(np.int64, copy=False)
        self.view = view = view.astype(np.int32, copy=False)
        # view -> (its sequence ids, ascending; the row of each)
        self._rows_of_view: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for value in np.unique(view).tolist():
            rows = np.flatnonzero(view == value)
            rows = rows[np.argsort(sequence_id[rows], kind="stable")]
            ids = sequence_id[rows]
            if (twice := ids[1:] == ids[:-1]).any():
                raise ValueError(f"sequence {ids[twice.argmax()]}, view {value} has more than one row")
            self._rows_of_view[value] = ids, rows

    def find(self, sequence_ids: np.ndarray, view: int) -> np.ndarray:
        """Return the row indices of some sequences, int64 `[B]`, in one view, in the order of the argument.

        Raises:
            KeyError: A sequence is missing in that view; the message names the first one.
        """
        if view not in self._rows_of_view:
            raise KeyError(f"view {view}; the views are {sorted(self._rows_of_view)}")
        ids, rows = self._rows_of_view[view]
        places = np.searchsorted(ids, sequence_ids)
        # searchsorted puts an id above the last one behind the end; any valid place shows that it is missing.
        found = ids[np.minimum(places, len(ids) - 1)] == sequence_ids
        if not found.all():
            raise KeyError(f"sequence {sequence_ids[found.argmin()]}, view {view}")
        return rows[places]

    def has(self, sequence_ids: np.ndarray, view: int) -> np.ndarray:
        """Return which sequences have a row in one view: bool `[B]`."""
        ids, _ = self._rows_of_view.get(view, (np.empty(0, np.int64), None))
        return np.isin(sequence_ids, ids)


# "." keeps the shards of an array in one folder; "/" would create two folders for each shard.
_CHUNK_KEYS: Any = {"name": "default", "configuration": {"separator": "."}}
_VERSION_KEY = "format_version"


@dataclass(frozen=True)
class GroupMetadata:
    """The layout and the row index of one group, and the channel statistics if it is quantised."""

    spec: GroupSpec
    rows: RowIndex
    channels: ChannelStatistics | None = None


def codec_chain(spec: GroupSpec, array: Array = "activations") -> ShardingCodec:
    """Return the only chain of codecs that this format has."""
    # In zarr-python int8 has no byte order, while our own one-byte type inherits one.
    inner = (BytesCodec(endian=None if spec.dtype == "int8" else "little"), Crc32cCodec())
    index = (BytesCodec(endian="little"), Crc32cCodec())
    chunk_shape = _shape(spec, array, spec.rows_per_chunk)
    return ShardingCodec(chunk_shape=chunk_shape, codecs=inner, index_codecs=index, index_location="end")


def _shape(spec: GroupSpec, array: Array, rows: int) -> tuple[int, ...]:
    """Shape of some rows in Zarr: scales are one number per position, so they have no last axis."""
    return (rows, spec.seq_len, spec.d_model) if array == "activations" else (rows, spec.seq_len)


def write_metadata(zarr_folder: Path, attributes: dict[str, Any], groups: dict[Group, GroupMetadata]) -> None:
    """Create the Zarr group with all its arrays, without the shards; equal attributes in any order give equal bytes."""
    version = groups["train"].spec.format_version
    ordered = json.loads(json.dumps(attributes | {_VERSION_KEY: version}, sort_keys=True))
    root = zarr.create_group(zarr_folder, attributes=ordered)  # pyright: ignore[reportUnknownMemberType]
    _write_group(root, groups["train"])
    _write_group(root.create_group("validation"), groups["validation"])


def _write_group(group: zarr.Group, metadata: GroupMetadata) -> None:
    for array, spec in metadata.spec.arrays.items():
        group.create_array(
            array,
            shape=_shape(spec, array, spec.rows),
            dtype=spec.zarr_name,
            chunks=_shape(spec, array, spec.rows_per_shard),
            serializer=codec_chain(spec, array),
            filters=None,
            compressors=None,
            fill_value=spec.fill_value,
            chunk_key_encoding=_CHUNK_KEYS,
            dimension_names=("row", "position", "channel")[: 3 if array == "activations" else 2],
        )
    _write_small(group, "row", {"sequence_id": metadata.rows.sequence_id, "view": metadata.rows.view})
    if metadata.channels is not None:
        mean, std = (statistic.numpy() for statistic in metadata.channels)
        _write_small(group, "channel", {"channel_mean": mean, "channel_std": std})


def _write_small(group: zarr.Group, dimension: str, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays of one chunk each."""
    for name, values in arrays.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(max(len(values), 1),),
            serializer=BytesCodec(endian="little"),
            filters=None,
            compressors=(Crc32cCodec(),),
            chunk_key_encoding=_CHUNK_KEYS,
            dimension_names=(dimension,),
            # By default a chunk of zeros is left out, and could not be told from a lost one.
            config={"write_empty_chunks": True},
        )
        array[:] = values


def read_metadata(folder: Path) -> tuple[dict[str, Any], dict[Group, GroupMetadata]]:
    """Read the attributes and groups of the artifact in `folder`, as `write_metadata` was given them.

    Raises:
        ArtifactError: The store was written by a newer version of this program.
        ArtifactCorruptError: It is not a store of this format.
    """
    root_path = folder / ZARR
    try:
        root = zarr.open_group(root_path, mode="r", zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
        attributes = dict(root.attrs)
        version = _checked_version(folder, attributes.pop(_VERSION_KEY, None))
        nodes: dict[Group, zarr.Group] = {"train": root, "validation": cast(zarr.Group, root["validation"])}
        groups: dict[Group, GroupMetadata] = {group: _read_group(folder, group, nodes[group]) for group in GROUPS}
        for metadata in groups.values():
            if (needed := metadata.spec.format_version) != version:
                problem = f"format version {version}, but {metadata.spec.dtype} is stored in version {needed}"
                raise corrupt(folder, root_path / "zarr.json", problem)
        return attributes, groups
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise corrupt(folder, root_path, f"not an activation store: {error}") from error


def _checked_version(folder: Path, version: object) -> int:
    if not isinstance(version, int) or version < 1:
        raise corrupt(folder, folder / ZARR / "zarr.json", f"format version {version!r} is not a version")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            folder / ZARR,
            f"format version {version} is newer than {FORMAT_VERSION}, the newest this StackWise reads",
            "update StackWise, or delete the folder and run the same command again: it will be remade",
        )
    return version


def _read_group(folder: Path, name: Group, group: zarr.Group) -> GroupMetadata:
    def array_of(key: str) -> zarr.Array[Any]:
        return cast("zarr.Array[Any]", group[key])

    path = folder / GROUP_FOLDERS[name]
    spec = _spec_of(array_of("activations"))
    for key, of_array in spec.arrays.items():
        array = array_of(key)
        codecs = getattr(array.metadata, "codecs", None)
        found = (array.shape, str(array.dtype), array.shards, codecs)
        shape, shards = (_shape(of_array, key, rows) for rows in (of_array.rows, of_array.rows_per_shard))
        if found != (shape, of_array.zarr_name, shards, (codec_chain(of_array, key),)):
            problem = f"{array.dtype}, chunks {array.shards} of {array.chunks} by {codecs} are not this format's"
            raise corrupt(folder, path / key / "zarr.json", problem)
    sequence_id, view = (np.asarray(array_of(key)[:]) for key in ("sequence_id", "view"))
    if len(sequence_id) != spec.rows:
        problem = f"{spec.rows} rows, but {len(sequence_id)} sequence ids"
        raise corrupt(folder, path / "activations" / "zarr.json", problem)
    rows, channels = RowIndex(sequence_id, view), None
    if spec.is_quantised:
        mean, std = (np.asarray(array_of(key)[:], np.float32) for key in ("channel_mean", "channel_std"))
        channels = ChannelStatistics(torch.from_numpy(mean), torch.from_numpy(std))
    return GroupMetadata(spec, rows, channels)


def _spec_of(array: zarr.Array[Any]) -> GroupSpec:
    """Derive the spec from an array; it describes the array only if this format has such chunks and shards."""
    rows, seq_len, d_model = array.shape
    row_bytes = seq_len * d_model * array.dtype.itemsize
    shard_rows = (array.shards or array.chunks)[0]
    names = {name: dtype for dtype, name in ZARR_NAMES.items()}
    dtype = cast("StreamDtype", names.get(str(array.dtype), str(array.dtype)))
    return GroupSpec(rows, seq_len, d_model, dtype, array.chunks[0] * row_bytes, shard_rows * row_bytes)


def open_sealed(folder: Path, files: Files, *, complete: bool) -> tuple[dict[str, Any], dict[Group, GroupMetadata]]:
    """Read the metadata of a sealed artifact, after checking its checksums and the sizes of all its files.

    If the folder is not `complete`, the shards are in an object store and only the metadata is in the folder.
    """
    if not folder.is_dir():
        raise ArtifactMissingError(folder, "no such activation store", "run the command that makes it")
    for name, (size, checksum) in files.items():
        if complete or is_metadata(name):
            _check_file(folder, name, size, checksum)
    attributes, groups = read_metadata(folder)
    for group, metadata in groups.items():
        _check_listed(folder, files, group, metadata)
    return attributes, groups


def _check_file(folder: Path, name: str, size: int, checksum: str) -> None:
    path = folder / name
    if not path.is_file():
        raise corrupt(folder, path, "missing")
    if (found := path.stat().st_size) != size:
        raise corrupt(folder, path, f"{found} bytes, sealed with {size}")
    if is_metadata(name):
        now = checksum_file(path, checksum.partition(":")[0])
        if now != checksum:
            raise corrupt(folder, path, f"checksum {now}, sealed with {checksum}")


def _check_listed(folder: Path, files: Files, group: Group, metadata: GroupMetadata) -> None:
    """Refuse a list that lacks a file: Zarr would silently read fill values for it."""
    spec = metadata.spec
    names = metadata_paths(group, spec)
    for array in spec.arrays:
        for index in range(spec.n_shards):
            names += [shard_path(group, index, array), record_path(group, index, array)]
    for name in names:
        if name not in files:
            raise corrupt(folder, folder / name, "not in the sealed list")
