"""Opens activation stores, whose shards may be in a local folder or in an object store."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.stages.identity import Ref
from storage.activations.format import is_shard
from storage.activations.reader import StoreReader
from storage.activations.shard import ShardObjects
from storage.artifacts import Artifacts
from storage.manifest import Manifest


def open_store(artifacts: Artifacts, ref: Ref) -> StoreReader:
    """Return a reader of a sealed store; of one in an object store, only the metadata is downloaded.

    Raises:
        ArtifactError: as `Artifacts.manifest` and `StoreReader`.
    """
    return open_at(artifacts, artifacts.folder(ref), artifacts.manifest(ref))


def open_at(artifacts: Artifacts, folder: Path, manifest: Manifest) -> StoreReader:
    """Return a reader of a sealed store in a folder, which need not be that of `artifacts`."""
    files = manifest.checksums()
    remote = artifacts.range_reader(manifest.ref) if artifacts.folder(manifest.ref) == folder else None
    if remote is None:
        return StoreReader(folder, files)
    fetch_metadata(artifacts, folder, manifest)
    return StoreReader(folder, files, objects=ShardObjects(remote))


def fetch_metadata(artifacts: Artifacts, folder: Path, manifest: Manifest) -> None:
    """Make sure that everything of a sealed store except its shards is in its folder."""
    if artifacts.folder(manifest.ref) == folder:
        artifacts.fetch(manifest.ref, [name for name in manifest.files if not is_shard(name)])
