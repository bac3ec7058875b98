"""Stores that failed their validation: looked at, put back, or dropped, only ever by hand."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise_core.errors import ConfigError, Fault
from storage.checksums import verify_files
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.layout import REASON, Artifacts, State
from storage.manifest import Manifest, read_manifest
from storage.roots import as_remote
from storage.survey import bytes_below

if TYPE_CHECKING:
    from storage.objects.remote import RemoteArtifacts

STAYS = "It stays in quarantine; `stackwise quarantine --drop` removes it"
"""What to do about damage."""


@dataclass(frozen=True)
class Quarantined:
    """An artifact that was taken out of every reader's reach."""

    path: Path
    reason: str
    since: str
    """ISO 8601, UTC."""
    n_bytes: int


def quarantined(artifacts: Artifacts) -> list[Quarantined]:
    """Return what is in quarantine, sorted by name."""
    if (remote := as_remote(artifacts)) is not None:
        from storage.objects.quarantine import quarantined_objects

        return quarantined_objects(remote)
    return [_look_at(path) for path in sorted((artifacts.root / "quarantine").glob("*"))]


def _look_at(path: Path) -> Quarantined:
    reason = path / REASON
    known = reason.is_file()
    since = datetime.fromtimestamp((reason if known else path).lstat().st_mtime, UTC).isoformat(timespec="seconds")
    return Quarantined(path, reason.read_text().strip() if known else "unknown", since, bytes_below(path))


def find_quarantined(artifacts: Artifacts, name: str) -> Path:
    """Return an entry by its name, its artifact's, or a unique start of either.

    Raises:
        ArtifactMissingError: there is none. ConfigError: there are several.
    """
    found = [entry.path for entry in quarantined(artifacts) if entry.path.name.startswith(name)]
    exact = [path for path in found if path.name == name] or found
    if not exact:
        raise ArtifactMissingError(
            name, f"is not in {artifacts.place(artifacts.root / 'quarantine')}", "See `stackwise quarantine`"
        )
    if len(exact) > 1:
        names = ", ".join(path.name for path in exact)
        raise ConfigError([Fault("ID", repr(name), f"{len(exact)} in quarantine begin so: {names}")])
    return exact[0]


def release(artifacts: Artifacts, path: Path) -> Manifest:
    """Put an artifact back in its place, after comparing every byte with its seal. Hold `among_others`.

    Raises:
        ArtifactCorruptError: a byte differs. ConfigError: an artifact is in its place already.
    """
    remote = as_remote(artifacts)
    manifest = _checked(path) if remote is None else _checked_objects(remote, path)
    with artifacts.lock(manifest.ref.name):
        state = artifacts.state(manifest.ref)
        if state is not State.ABSENT:
            taken = f"{artifacts.where(manifest.ref)} is there, {state.value}; remove one of the two"
            raise ConfigError([Fault("--release", repr(path.name), taken)])
        (path / REASON).unlink(missing_ok=True)  # it is not sealed; a kill here leaves it in quarantine, unexplained
        artifacts.adopt(manifest.ref, path)
    if remote is not None:
        drop(artifacts, path)
    return manifest


def drop(artifacts: Artifacts, path: Path) -> None:
    """Delete what is in quarantine. Hold `among_others`."""
    if (remote := as_remote(artifacts)) is not None:
        from storage.objects.quarantine import drop_objects

        drop_objects(remote, path.name)
    if path.exists():
        artifacts.to_trash(path)
        artifacts.empty_trash()


def _checked(path: Path) -> Manifest:
    manifest = read_manifest(path)
    problems = [line for line in verify_files(path, manifest.checksums()) if not line.startswith(f"{path / REASON}: ")]
    if problems:
        where, _, problem = problems[0].partition(": ")
        raise ArtifactCorruptError(where, problem, STAYS)
    return manifest


def _checked_objects(remote: RemoteArtifacts, path: Path) -> Manifest:
    from storage.objects.quarantine import bring

    return bring(remote, path, STAYS)
