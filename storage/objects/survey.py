"""What lies in a bucket, by one listing and the manifests: no byte of data is read, nothing is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from storage.errors import ArtifactCorruptError, ArtifactError
from storage.layout import FOLDERS
from storage.manifest import MANIFEST, RETIRED
from storage.objects import lease
from storage.objects.bucket import Bucket, Entry
from storage.objects.looks import Looks, key_of
from storage.survey import Found, is_artifact_name

_READS_AT_ONCE = 16


@dataclass(frozen=True)
class FoundObjects(Found):
    """What lies below the key of an artifact; its path is where the scratch folder mirrors it."""

    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    """By key below the artifact's."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its objects, as they were listed."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def newest(self) -> datetime:
        """When the last of it was put."""
        return max(entry.modified for entry in self.entries.values())

    def unlisted(self) -> list[Path]:
        """Return the data of what is retired."""
        if self.standing != "retired" or self.manifest is None:
            return []
        kept = (MANIFEST, f"{self.manifest.attempt}/{RETIRED}")
        own = f"{self.manifest.attempt}/"
        return sorted(self.path / name for name in self.entries if name.startswith(own) and name not in kept)

    def other_attempts(self) -> Iterator[FoundObjects]:
        """Yield what lies below it, attempt by attempt, and is not of the one that its manifest names."""
        own = self.manifest.attempt if self.manifest else None
        below: dict[str, dict[str, Entry]] = defaultdict(dict)
        for name, entry in self.entries.items():
            attempt, _, rest = name.partition("/")
            if name != MANIFEST and attempt != own:
                below[attempt][rest] = entry
        for attempt, entries in sorted(below.items()):
            yield FoundObjects(self.path / attempt, "unsealed", entries=entries)


class Listing:
    """Everything below a URI at one moment."""

    def __init__(self, bucket: Bucket) -> None:
        """List it."""
        self._bucket = bucket
        self.entries = bucket.list("")

    @property
    def n_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(entry.size for entry in self.entries.values())

    def below(self, prefix: str) -> dict[str, Entry]:
        """Return what lies below a key, by key relative to it."""
        start = f"{prefix}/"
        return {key.removeprefix(start): entry for key, entry in self.entries.items() if key.startswith(start)}

    def held(self) -> set[str]:
        """Return the names that somebody holds a lease of, alone or with others."""
        return {key.partition("/")[0] for key, entry in self.below(lease.FOLDER).items() if not lease.is_stale(entry)}

    def artifacts(self, root: Path, looks: Looks) -> list[FoundObjects]:
        """Return what lies in the rooms of artifacts, sorted by room and name."""
        grouped: dict[str, dict[str, Entry]] = defaultdict(dict)
        for room in FOLDERS.values():
            for name, entry in self.below(room).items():
                artifact, _, rest = name.partition("/")
                grouped[f"{room}/{artifact}"][rest] = entry

        def look(key: str) -> FoundObjects | None:
            return _look_at(root, key, grouped[key], looks)

        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            return [found for found in pool.map(look, sorted(grouped)) if found]


def _look_at(root: Path, key: str, entries: dict[str, Entry], looks: Looks) -> FoundObjects | None:
    path = root / key
    if not is_artifact_name(PurePosixPath(key).name) or "" in entries:
        return FoundObjects(path, "foreign", "is no artifact: StackWise did not put it there", entries=entries)
    if MANIFEST not in entries:
        return FoundObjects(path, "unsealed", entries=entries)
    try:
        _, manifest = looks.manifest(key, entries[MANIFEST])
        if key_of(manifest.ref) != key:
            raise ArtifactCorruptError(key, f"belongs to {manifest.ref.name}, and lies in the place of another", "")
    except FileNotFoundError:
        return None  # removed since it was listed
    except ArtifactError as error:
        return FoundObjects(path, "damaged", error.problem, entries=entries)
    standing = "retired" if f"{manifest.attempt}/{RETIRED}" in entries else "sealed"
    return FoundObjects(path, standing, manifest=manifest, entries=entries)
