"""Opens the activation store of a sealed artifact, in whichever place its shards are."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.stages.identity import Ref
from storage.activations.format import is_shard
from storage.activations.reader import StoreReader
from storage.artifacts import Artifacts
from storage.manifest import Manifest


def open_store(artifacts: Artifacts, ref: Ref) -> StoreReader:
    """Return a reader of a sealed store; of one in an object store, only the metadata is downloaded."""
    found = artifacts.sealed_folder(ref)
    remote = artifacts.place.range_reader(found)
    folder = artifacts.place.fetch(found, _metadata(found.manifest))
    return StoreReader(folder, found.manifest.checksums(), remote=remote)


def open_at(artifacts: Artifacts, folder: Path, manifest: Manifest) -> StoreReader:
    """Return a reader of a sealed store in a folder, which need not be that of `artifacts`."""
    if artifacts.folder(manifest.ref) == folder:
        return open_store(artifacts, manifest.ref)
    return StoreReader(folder, manifest.checksums())


def fetch_metadata(artifacts: Artifacts, folder: Path, manifest: Manifest) -> None:
    """Make sure that everything of a sealed store except its shards is in its folder."""
    if artifacts.folder(manifest.ref) == folder:
        artifacts.place.fetch(artifacts.sealed_folder(manifest.ref), _metadata(manifest))


def _metadata(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if not is_shard(name)]
