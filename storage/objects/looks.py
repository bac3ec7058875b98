"""What the bucket says of an artifact: one listing and its manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass

from stackwise_core.stages.identity import Kind, Ref
from storage.layout import FOLDERS
from storage.manifest import MANIFEST, RETIRED, Manifest, parse_manifest
from storage.objects.bucket import Bucket, Entry
from storage.objects.folder import ObjectFolder

FRESH_SECONDS = 1.0
"""For so long a look at a sealed artifact counts: planning asks for the same ones over and over."""


def key_of(ref: Ref) -> str:
    """Return the key of an artifact."""
    return f"{FOLDERS[ref.kind]}/{ref.name}"


@dataclass(frozen=True)
class Look:
    """A sealed artifact, as the bucket shows it."""

    key: str
    manifest: Manifest
    entry: Entry
    """Of the manifest."""
    sizes: dict[str, int]
    """Of the files of the attempt that the manifest names [bytes]."""

    @property
    def retired(self) -> bool:
        """Whether its data was dropped on purpose."""
        return RETIRED in self.sizes

    def problem(self) -> tuple[str, str] | None:
        """Return a file that is not as it was sealed, by the listing alone, and what is wrong with it."""
        for name, sealed in self.manifest.files.items():
            if name not in self.sizes:
                return name, "is missing from a sealed artifact"
            if self.sizes[name] != sealed.size:
                return name, f"has {self.sizes[name]:,} bytes, sealed with {sealed.size:,}"
        return None


class Looks:
    """Looks at artifacts; a manifest that did not change is read once."""

    def __init__(self, bucket: Bucket) -> None:
        """Name the bucket."""
        self._bucket = bucket
        self._manifests: dict[str, tuple[Entry, Manifest]] = {}
        self._recent: dict[str, tuple[float, Look]] = {}

    def forget(self) -> None:
        """Let no look of before count: another process may have done something meanwhile."""
        self._recent.clear()

    def recent(self, ref: Ref) -> Look | None:
        """Return a look that may be a second old if it found the artifact sealed."""
        found = self._recent.get(key_of(ref))
        if found and time.monotonic() - found[0] < FRESH_SECONDS and found[1].manifest.ref == ref:
            return found[1]
        return self.now(ref)

    def now(self, ref: Ref) -> Look | None:
        """Return a look at an artifact, or None if it is not sealed.

        Raises:
            ArtifactCorruptError: its manifest is none, or of another artifact.
        """
        return self.at(key_of(ref), ref)

    def at(self, key: str, ref: Ref | None = None) -> Look | None:
        """Return a look at what lies under a key; see `now`."""
        self._recent.pop(key, None)
        while True:
            listed = self._bucket.list(key)
            if MANIFEST not in listed:
                return None
            try:
                entry, manifest = self.manifest(key, listed[MANIFEST], ref)
            except FileNotFoundError:
                continue  # deleted in between
            if entry.version == listed[MANIFEST].version:  # else it was replaced in between
                break
        attempt = f"{manifest.attempt}/"
        sizes = {name[len(attempt) :]: each.size for name, each in listed.items() if name.startswith(attempt)}
        look = Look(key, manifest, entry, sizes)
        self._recent[key] = time.monotonic(), look
        return look

    def folder(self, look: Look) -> ObjectFolder:
        """Return the files of an artifact."""
        return ObjectFolder(self._bucket, look.key, look.manifest.attempt)

    def manifest(self, key: str, listed: Entry, ref: Ref | None = None) -> tuple[Entry, Manifest]:
        """Return the manifest of an artifact that a listing shows, and what was read of its object.

        Raises:
            FileNotFoundError: it was removed since. ArtifactCorruptError: as `now`.
        """
        known = self._manifests.get(key)
        if known is None or known[0].version != listed.version or (ref is not None and known[1].ref != ref):
            path = f"{key}/{MANIFEST}"
            data, entry = self._bucket.read(path)
            manifest = parse_manifest(data, self._bucket.where(path), f"all below {self._bucket.where(key)}", ref)
            known = self._manifests[key] = entry, manifest
        return known

    def sealed_keys(self) -> list[str]:
        """Return the keys of all artifacts that may be sealed, sorted."""
        return [f"{room}/{name}" for room in _ROOMS for name in self._bucket.folders(room)]


_ROOMS: dict[str, Kind] = {room: kind for kind, room in FOLDERS.items()}
