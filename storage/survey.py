"""What lies in an artifacts folder, and how many bytes it holds. Reads manifests, never data; changes nothing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.durable import TEMPORARY_SUFFIX
from storage.errors import ArtifactCorruptError, ArtifactError
from storage.layout import FOLDERS, Artifacts
from storage.manifest import MANIFEST, RETIRED, Manifest, read_manifest
from storage.roots import as_remote

Standing = Literal["sealed", "retired", "damaged", "unsealed", "foreign"]

_NAME = re.compile(rf"({'|'.join(FOLDERS)})(-\d+)?-[0-9a-f]{{12}}")


@dataclass(frozen=True)
class Found:
    """Something in a room of artifacts, as its name and manifest tell."""

    path: Path
    standing: Standing
    problem: str = ""
    """Why it is damaged or foreign."""
    manifest: Manifest | None = None
    """Of what is sealed or retired."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its files, counted now."""
        return bytes_below(self.path)

    def unlisted(self) -> list[Path]:
        """Return what is in it though it should not: data of the retired, half-written files of the sealed."""
        if self.standing == "retired":
            return sorted(path for path in self.path.iterdir() if path.name not in (MANIFEST, RETIRED))
        if self.manifest is None:
            return []
        listed = self.manifest.files
        halves = (path for path in self.path.rglob(f"*{TEMPORARY_SUFFIX}") if path.is_file())
        return sorted(path for path in halves if path.relative_to(self.path).as_posix() not in listed)


def survey(artifacts: Artifacts) -> Sequence[Found]:
    """Return everything in the rooms of artifacts, sorted by room and name."""
    if (remote := as_remote(artifacts)) is not None:
        return remote.survey(remote.listing())
    rooms = [artifacts.root / room for room in FOLDERS.values()]
    return [_look_at(artifacts, path) for room in rooms if room.is_dir() for path in sorted(room.iterdir())]


def is_artifact_name(name: str) -> bool:
    """Say whether a name is one that artifacts have: kind, stage and 12 hex digits."""
    return _NAME.fullmatch(name) is not None


def bytes_below(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return _size(path)
    return sum(_size(Path(parent, name)) for parent, _, names in os.walk(path) for name in names)


def weigher(artifacts: Artifacts) -> Callable[[str], int]:
    """Return what tells the bytes below a path relative to the root, '' for all of them.

    Of an object store it is what is in the bucket, at one moment.
    """
    if (remote := as_remote(artifacts)) is not None:
        listing = remote.listing()
        return lambda name: sum(entry.size for entry in listing.below(name).values()) if name else listing.n_bytes
    return lambda name: bytes_below(artifacts.root / name)


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # another process may be at work in it
        return path.lstat().st_size
    return 0


def _look_at(artifacts: Artifacts, path: Path) -> Found:
    if path.is_symlink() or not path.is_dir() or not is_artifact_name(path.name):
        return Found(path, "foreign", "is no artifact: StackWise did not put it there")
    if not (path / MANIFEST).exists():
        return Found(path, "unsealed")
    try:
        manifest = read_manifest(path)
        if artifacts.folder(manifest.ref) != path:
            problem = f"belongs to {manifest.ref.name}, and lies in the folder of another"
            raise ArtifactCorruptError(path / MANIFEST, problem, "Remove it")
    except ArtifactError as error:
        return Found(path, "damaged", error.problem)
    return Found(path, "retired" if (path / RETIRED).exists() else "sealed", manifest=manifest)
