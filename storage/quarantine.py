"""Stores that failed their validation: inspected, put back or dropped, always by hand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.files import verify_files
from storage.inventory import Inventory
from storage.local import empty_trash
from storage.manifest import Manifest
from storage.place import QUARANTINE, REASON

_STAYS = "It stays in quarantine; `stackwise quarantine --drop` removes it"


@dataclass(frozen=True)
class Quarantined:
    """An artifact in quarantine."""

    path: Path
    reason: str
    since: str
    """ISO 8601, UTC."""
    n_bytes: int


def quarantined(artifacts: Artifacts) -> list[Quarantined]:
    """Return what is in quarantine, sorted by name."""
    found: list[Quarantined] = []
    for name, entries in Inventory(artifacts).folders(QUARANTINE).items():
        reason, since = "unknown", max(entry.modified for entry in entries.values())
        if REASON in entries:
            since = entries[REASON].modified
            with contextlib.suppress(OSError, ValueError):
                text = artifacts.place.read(f"{QUARANTINE}/{name}/{REASON}")
                reason = text.decode(errors="replace").strip()
        n_bytes = sum(entry.size for entry in entries.values())
        path = artifacts.root / QUARANTINE / name
        found.append(Quarantined(path, reason, since.isoformat(timespec="seconds"), n_bytes))
    return found


def find_quarantined(artifacts: Artifacts, name: str) -> Path:
    """Return an entry by its name, its artifact's, or a unique start of either.

    Raises:
        ArtifactMissingError: there is none.
        ConfigError: several match.
    """
    found = [entry.path for entry in quarantined(artifacts) if entry.path.name.startswith(name)]
    exact = [path for path in found if path.name == name] or found
    if not exact:
        where = artifacts.place.location(QUARANTINE)
        raise ArtifactMissingError(name, f"is not in {where}", "See `stackwise quarantine`")
    if len(exact) > 1:
        names = ", ".join(path.name for path in exact)
        raise ConfigError([Fault("ID", repr(name), f"{len(exact)} in quarantine begin so: {names}")])
    return exact[0]


def release(artifacts: Artifacts, path: Path) -> Manifest:
    """Put an artifact back, after comparing every byte with its seal. Hold `without_gc`.

    Raises:
        ArtifactCorruptError: a byte differs. ConfigError: an artifact is there already.
    """
    manifest, folder = _checked(artifacts, path)
    with artifacts.lock(manifest.ref.name):
        state = artifacts.state(manifest.ref)
        if state is not State.ABSENT:
            taken = f"{artifacts.where(manifest.ref)} is there, {state.value}; remove one of the two"
            raise ConfigError([Fault("--release", repr(path.name), taken)])
        (folder / REASON).unlink(missing_ok=True)  # not sealed; after a kill here it is in quarantine without a reason
        artifacts.adopt(manifest.ref, folder)
    drop(artifacts, path)
    return manifest


def drop(artifacts: Artifacts, path: Path) -> None:
    """Delete what is in quarantine. Hold `without_gc`."""
    artifacts.place.delete(f"{QUARANTINE}/{path.name}")
    empty_trash(artifacts.root)


def _checked(artifacts: Artifacts, path: Path) -> tuple[Manifest, Path]:
    """Return the manifest and the local folder of an artifact in which every byte is as it was sealed."""
    place, key = artifacts.place, f"{QUARANTINE}/{path.name}"
    try:
        found = place.find(key)
        if found is None:
            raise ArtifactMissingError(place.location(key), "has no manifest", _STAYS)
        folder = place.fetch(found)
    except ArtifactCorruptError as error:
        raise ArtifactCorruptError(error.path, error.problem, _STAYS) from None
    problems = verify_files(folder, found.manifest.checksums())
    problems = [line for line in problems if not line.startswith(f"{folder / REASON}: ")]
    if problems:
        where, _, problem = problems[0].partition(": ")
        raise ArtifactCorruptError(where, problem, _STAYS)
    return found.manifest, folder
