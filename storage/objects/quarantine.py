"""Stores that failed their validation, in a bucket: `quarantine/<id>.<attempt>/`, the manifest beside the files."""

from __future__ import annotations

from pathlib import Path

from storage.durable import write_text
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.layout import REASON
from storage.manifest import MANIFEST, Manifest, parse_manifest
from storage.objects.folder import ObjectFolder
from storage.objects.remote import RemoteArtifacts
from storage.objects.seals import delete_below
from storage.quarantine import Quarantined

_FOLDER = "quarantine"


def quarantined_objects(artifacts: RemoteArtifacts) -> list[Quarantined]:
    """Return what is in quarantine, sorted by name."""
    listing = artifacts.listing()
    found: list[Quarantined] = []
    for name in sorted({key.partition("/")[0] for key in listing.below(_FOLDER)}):
        entries = listing.below(f"{_FOLDER}/{name}")
        reason, since = "unknown", max((entry.modified for entry in entries.values()), default=None)
        if REASON in entries:
            data, entry = artifacts.bucket.read(f"{_FOLDER}/{name}/{REASON}")
            reason, since = data.decode(errors="replace").strip(), entry.modified
        n_bytes = sum(entry.size for entry in entries.values())
        said = since.isoformat(timespec="seconds") if since else "unknown"
        found.append(Quarantined(artifacts.root / _FOLDER / name, reason, said, n_bytes))
    return found


def bring(artifacts: RemoteArtifacts, path: Path, remedy: str) -> Manifest:
    """Bring an entry into quarantine/ of the scratch folder, every byte compared with its seal.

    Raises:
        ArtifactCorruptError: a byte differs. ArtifactMissingError: it has no manifest.
    """
    files = ObjectFolder(artifacts.bucket, _FOLDER, path.name)
    try:
        data, _ = artifacts.bucket.read(f"{files.prefix}/{MANIFEST}")
    except FileNotFoundError:
        raise ArtifactMissingError(files.uri(MANIFEST), "is not there", remedy) from None
    manifest = parse_manifest(data, files.uri(MANIFEST), artifacts.bucket.where(files.prefix), None)
    path.mkdir(parents=True, exist_ok=True)
    try:
        files.fetch(path, manifest.checksums())
    except ArtifactCorruptError as error:
        raise ArtifactCorruptError(error.path, error.problem, remedy) from None
    write_text(path / MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


def drop_objects(artifacts: RemoteArtifacts, name: str) -> None:
    """Delete an entry."""
    delete_below(artifacts.bucket, f"{_FOLDER}/{name}")
