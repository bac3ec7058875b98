"""What a place stores at one moment, by one listing and the manifests; no data is read or changed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError, ArtifactError
from storage.manifest import MANIFEST, Manifest
from storage.place import FOLDERS, Entry, key_of
from storage.retirement import RETIRED

Standing = Literal["sealed", "retired", "damaged", "unsealed", "foreign"]

_NAME = re.compile(rf"({'|'.join(FOLDERS)})(-\d+)?-[0-9a-f]{{12}}")
_READS_AT_ONCE = 16


@dataclass(frozen=True)
class Found:
    """Something in a room of artifacts, judged by its name and manifest."""

    path: Path
    """Where it is on this machine, or would be mirrored."""
    standing: Standing
    entries: Mapping[str, Entry]
    """Its files, by path below it."""
    problem: str = ""
    """Why it is damaged or foreign."""
    manifest: Manifest | None = None
    """Of what is sealed or retired."""

    @property
    def key(self) -> str:
        """Its key in the place."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def modified(self) -> datetime:
        """When the newest of its files was written."""
        return max(entry.modified for entry in self.entries.values())


class Inventory:
    """A listing of a place."""

    def __init__(self, artifacts: Artifacts) -> None:
        """List everything."""
        self._artifacts = artifacts
        self.entries = artifacts.place.list()

    def below(self, path: str) -> dict[str, Entry]:
        """Return the files below a path, by path relative to it."""
        start = f"{path}/"
        return {key.removeprefix(start): entry for key, entry in self.entries.items() if key.startswith(start)}

    def n_bytes(self, path: str = "") -> int:
        """Return the bytes of a file, or of all files below a path."""
        start = f"{path}/" if path else ""
        return sum(entry.size for key, entry in self.entries.items() if f"{key}/".startswith(start))

    def folders(self, room: str) -> dict[str, dict[str, Entry]]:
        """Return what lies directly in a room, each with its files; see `by_folder`."""
        return by_folder(self.below(room))

    def artifacts(self) -> list[Found]:
        """Return what lies in the rooms of artifacts, in the order of rooms and names."""
        found = {f"{room}/{name}": each for room in FOLDERS.values() for name, each in self.folders(room).items()}
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            return [each for each in pool.map(self._judge, found.keys(), found.values()) if each]

    def _judge(self, key: str, entries: Mapping[str, Entry]) -> Found | None:
        place, path = self._artifacts.place, self._artifacts.root / key
        if not is_artifact_name(path.name) or "" in entries:
            return Found(path, "foreign", entries, "is not an artifact: StackWise did not put it there")
        if MANIFEST not in entries:
            return Found(path, "unsealed", entries)
        try:
            manifest = place.listed_manifest(key, entries[MANIFEST])
            if key_of(manifest.ref) != key:
                raise ArtifactCorruptError(key, f"belongs to {manifest.ref.name}, and lies in the place of another", "")
        except FileNotFoundError:
            return None  # removed since it was listed
        except ArtifactError as error:
            return Found(path, "damaged", entries, error.problem)
        retired = f"{place.files_below(key, manifest)}{RETIRED}" in entries and place.is_retired(key, manifest)
        return Found(path, "retired" if retired else "sealed", entries, manifest=manifest)


def by_folder(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Group files by the first part of their paths, sorted, each by the rest of its path ('' for a plain file)."""
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for path, entry in entries.items():
        name, _, rest = path.partition("/")
        if name != ".":
            found[name][rest] = entry
    return dict(sorted(found.items()))


def survey(artifacts: Artifacts) -> list[Found]:
    """Return what lies in the rooms of artifacts now."""
    return Inventory(artifacts).artifacts()


def is_artifact_name(name: str) -> bool:
    """Say whether a name has the form of an artifact's: kind, stage and 12 hex digits."""
    return _NAME.fullmatch(name) is not None
