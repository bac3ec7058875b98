"""Opens the activation store of an artifact, wherever its shards are."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.stages.identity import Ref
from storage.activations.format import is_shard
from storage.activations.reader import StoreReader
from storage.activations.shard_object import ShardObjects
from storage.layout import Artifacts
from storage.manifest import Manifest


def open_store(artifacts: Artifacts, ref: Ref) -> StoreReader:
    """Return a reader of a sealed store; of one in an object store, only the metadata is brought here.

    Raises:
        ArtifactError: as `Artifacts.manifest` and `StoreReader`.
    """
    return open_at(artifacts, artifacts.folder(ref), artifacts.manifest(ref))


def open_at(artifacts: Artifacts, folder: Path, manifest: Manifest) -> StoreReader:
    """Return a reader of a sealed store in a folder, which need not be where the artifacts are."""
    files = manifest.checksums()
    objects = artifacts.elsewhere(manifest.ref) if artifacts.folder(manifest.ref) == folder else None
    if objects is None:
        return StoreReader(folder, files)
    bring_metadata(artifacts, folder, manifest)
    return StoreReader(folder, files, objects=ShardObjects(objects))


def bring_metadata(artifacts: Artifacts, folder: Path, manifest: Manifest) -> None:
    """Make sure that all of a sealed store but its shards is in its folder."""
    if artifacts.folder(manifest.ref) == folder and (objects := artifacts.elsewhere(manifest.ref)):
        files = manifest.checksums()
        objects.fetch_missing(folder, {name: entry for name, entry in files.items() if not is_shard(name)})
