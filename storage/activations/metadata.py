"""The part of a store that zarr-python writes and reads: everything but the shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from storage.activations.format import (
    FORMAT_VERSION,
    GROUP_FOLDERS,
    GROUPS,
    ZARR,
    Dtype,
    Group,
    GroupSpec,
    corrupt,
)
from storage.activations.rows import RowIndex
from storage.errors import ArtifactError

# "." keeps the shards of an array in one folder; "/" would make two folders for each.
_CHUNK_KEYS: Any = {"name": "default", "configuration": {"separator": "."}}
_VERSION_KEY = "format_version"


@dataclass(frozen=True)
class GroupMetadata:
    """One group of rows.

    Attributes:
        spec: Sizes and layout.
        rows: Which sequence and view every row is of.
    """

    spec: GroupSpec
    rows: RowIndex


def codec_chain(spec: GroupSpec) -> ShardingCodec:
    """The one chain of codecs that the writer writes and the reader reads."""
    inner = (BytesCodec(endian="little"), Crc32cCodec())
    chunk_shape = (spec.rows_per_chunk, spec.seq_len, spec.d_model)
    return ShardingCodec(chunk_shape=chunk_shape, codecs=inner, index_codecs=inner, index_location="end")


def write_metadata(zarr_folder: Path, attributes: dict[str, Any], groups: dict[Group, GroupMetadata]) -> None:
    """Create the Zarr group with all its arrays, filled but for the activations.

    Args:
        zarr_folder: Where; must not exist.
        attributes: JSON. Key order does not matter: equal attributes give equal bytes.
        groups: The two groups of rows.
    """
    ordered = json.loads(json.dumps(attributes | {_VERSION_KEY: FORMAT_VERSION}, sort_keys=True))
    root = zarr.create_group(zarr_folder, attributes=ordered)  # pyright: ignore[reportUnknownMemberType]
    _write_group(root, groups["train"])
    _write_group(root.create_group("validation"), groups["validation"])


def _write_group(group: zarr.Group, metadata: GroupMetadata) -> None:
    spec = metadata.spec
    group.create_array(
        "activations",
        shape=(spec.rows, spec.seq_len, spec.d_model),
        dtype=spec.dtype,
        chunks=(spec.rows_per_shard, spec.seq_len, spec.d_model),
        serializer=codec_chain(spec),
        filters=None,
        compressors=None,
        fill_value=float("nan"),
        chunk_key_encoding=_CHUNK_KEYS,
        dimension_names=("row", "position", "channel"),
    )
    for name, values in (("sequence_id", metadata.rows.sequence_id), ("view", metadata.rows.view)):
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(max(len(values), 1),),
            serializer=BytesCodec(endian="little"),
            filters=None,
            compressors=(Crc32cCodec(),),
            chunk_key_encoding=_CHUNK_KEYS,
            dimension_names=("row",),
            # By default a chunk of zeros is left out, and then a lost one cannot be told from it.
            config={"write_empty_chunks": True},
        )
        array[:] = values


def read_metadata(folder: Path) -> tuple[dict[str, Any], dict[Group, GroupMetadata]]:
    """Read what `write_metadata` wrote, and refuse what it would not have written.

    Args:
        folder: The artifact.

    Returns:
        The attributes as they were given to the writer, and the groups.

    Raises:
        ArtifactError: The store was written by a newer version of this program.
        ArtifactCorruptError: It is not a store of this format.
    """
    root_path = folder / ZARR
    try:
        root = zarr.open_group(root_path, mode="r", zarr_format=3)  # pyright: ignore[reportUnknownMemberType]
        attributes = dict(root.attrs)
        _check_version(folder, attributes.pop(_VERSION_KEY, None))
        nodes: dict[Group, zarr.Group] = {"train": root, "validation": cast(zarr.Group, root["validation"])}
        return attributes, {group: _read_group(folder, group, nodes[group]) for group in GROUPS}
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise corrupt(folder, root_path, f"not an activation store: {error}") from error


def _check_version(folder: Path, version: object) -> None:
    if not isinstance(version, int) or version < 1:
        raise corrupt(folder, folder / ZARR / "zarr.json", f"format version {version!r} is not a version")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            folder / ZARR,
            f"format version {version} is newer than {FORMAT_VERSION}, the newest this StackWise reads",
            "update StackWise, or delete the folder and run the same command again: it will be remade",
        )


def _read_group(folder: Path, name: Group, group: zarr.Group) -> GroupMetadata:
    array = cast("zarr.Array[Any]", group["activations"])
    path = folder / GROUP_FOLDERS[name] / "activations" / "zarr.json"
    spec, codecs = _spec_of(array), getattr(array.metadata, "codecs", None)
    if spec is None or codecs != (codec_chain(spec),):
        raise corrupt(folder, path, f"chunks {array.shards} of {array.chunks} by {codecs} are not this format's")
    sequence_id, view = (np.asarray(cast("zarr.Array[Any]", group[key])[:]) for key in ("sequence_id", "view"))
    if len(sequence_id) != spec.rows:
        raise corrupt(folder, path, f"{spec.rows} rows, but {len(sequence_id)} sequence ids")
    return GroupMetadata(spec, RowIndex(sequence_id, view))


def _spec_of(array: zarr.Array[Any]) -> GroupSpec | None:
    """Derive the spec from an array's own shapes, or None if no spec gives them."""
    rows, seq_len, d_model = array.shape
    row_bytes = seq_len * d_model * array.dtype.itemsize
    shard_rows = (array.shards or array.chunks)[0]
    spec = GroupSpec(
        rows,
        seq_len,
        d_model,
        cast(Dtype, str(array.dtype)),
        array.chunks[0] * row_bytes,
        shard_rows * row_bytes,
    )
    shapes = ((spec.rows_per_shard, seq_len, d_model), (spec.rows_per_chunk, seq_len, d_model))
    return spec if (array.shards, array.chunks) == shapes else None
