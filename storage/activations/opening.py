"""What is compared when a sealed store is opened: all sizes, and the content of all but the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.activations.format import (
    Group,
    corrupt,
    is_metadata,
    metadata_paths,
    record_path,
    shard_path,
)
from storage.activations.metadata import GroupMetadata, read_metadata
from storage.checksums import Files, checksum_file
from storage.errors import ArtifactMissingError


def open_sealed(folder: Path, files: Files, *, whole: bool = True) -> tuple[dict[str, Any], dict[Group, GroupMetadata]]:
    """Read the metadata of a store, having compared what is cheap to compare.

    Args:
        folder: The sealed artifact.
        files: Its sealed list: posix path relative to `folder` -> (size in bytes, `<algorithm>:<hex>`).
        whole: Whether all of them are in the folder; else only the Zarr metadata is, the rest in an object store.

    Returns:
        Attributes and groups, as `read_metadata`.

    Raises:
        ArtifactMissingError: There is no such folder.
        ArtifactError: A newer version of this program wrote the store.
        ArtifactCorruptError: A file is missing, or is not what was sealed, or the list lacks one.
    """
    if not folder.is_dir():
        raise ArtifactMissingError(folder, "no such activation store", "run the command that makes it")
    for name, (size, checksum) in files.items():
        if whole or is_metadata(name):
            _check_file(folder, name, size, checksum)
    attributes, groups = read_metadata(folder)
    for group, metadata in groups.items():
        _check_listed(folder, files, group, metadata)
    return attributes, groups


def _check_file(folder: Path, name: str, size: int, checksum: str) -> None:
    """Compare a file's size, and its checksum if it is part of the Zarr metadata."""
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
    """Refuse a list that lacks a file: Zarr would read it as fill values, and nobody would know."""
    spec = metadata.spec
    shards = [
        path(group, index, array)
        for array in spec.arrays
        for index in range(spec.n_shards)
        for path in (shard_path, record_path)
    ]
    for name in (*metadata_paths(group, spec), *shards):
        if name not in files:
            raise corrupt(folder, folder / name, "not in the sealed list")
