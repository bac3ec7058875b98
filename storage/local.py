"""A local folder as a place of sealed folders: work -> sealed -> retired, trash or quarantine, each by a rename.

What an operation promises is said in `place.Place`; here is only what is special to a folder.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stackwise_core.files import sync, why_full
from stackwise_core.stages.identity import Ref
from stackwise_core.strict import read_bounded
from storage.errors import ArtifactsFolderError, StoreSpaceError
from storage.files import TEMPORARY_SUFFIX, verify_files, write_text
from storage.links import opened, plain_files, remove_in
from storage.locks import FileLock, Holder, is_held, read_holder
from storage.manifest import MANIFEST, Manifest, load_manifest
from storage.place import FOLDERS, PINS, QUARANTINE, REASON, RUNS, Entry, Leftovers, SealedFolder
from storage.retirement import RETIRED, is_retired

NEWER_ROOMS = (FOLDERS["optimizer"],)
"""Rooms that an artifacts folder of an earlier version lacks."""
ROOMS = (*FOLDERS.values(), RUNS, "work", "locks", "trash", QUARANTINE)


class LocalPlace:
    """A folder on a file system with renames and flock."""

    is_remote = False

    def __init__(self, root: Path | str) -> None:
        """Name the folder; nothing is touched before `open()`."""
        self.root = Path(root).absolute()
        self.uri = str(self.root)

    def open(self) -> None:
        self.check_rooms()
        try:
            for name in ROOMS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "work" / f"probe-{os.getpid()}"
            probe.unlink(missing_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            if why := why_full(error):
                raise StoreSpaceError(f"{error.filename or self.root}: {why}") from None
            reason = error.strerror or str(error)
            raise ArtifactsFolderError(
                f"--artifacts {self.root}: cannot be written ({reason}); give a folder this user may write to"
            ) from None
        empty_trash(self.root)
        device = (self.root / "work").stat().st_dev
        rooms = (*FOLDERS.values(), "trash", QUARANTINE)
        if others := [name for name in rooms if (self.root / name).stat().st_dev != device]:
            raise ArtifactsFolderError(
                f"{self.root}: work/ and {', '.join(others)}/ lie on different file systems, so nothing can be "
                "sealed by renaming; keep the artifacts folder on one file system"
            )

    def check_exists(self) -> None:
        if not self.root.is_dir():
            problem = "there is no such folder; `stackwise train` makes one"
            if self.root.exists():
                problem = "it is a file, not a folder; name the folder of artifacts"
            raise ArtifactsFolderError(f"--artifacts {self.root}: {problem}")
        self.check_rooms()

    def check_reachable(self) -> None:
        """Check the rooms alone: artifacts can be looked up even in a folder that does not exist."""
        self.check_rooms()

    def check_rooms(self) -> None:
        """Raise ArtifactsFolderError if a room is a link: what is put or removed there would be elsewhere."""
        for path in (self.root / name for name in (*ROOMS, PINS, "prefect")):
            if path.is_symlink():
                raise ArtifactsFolderError(
                    f"{path}: is a link, and what is removed there may be yours; nothing was changed. Put a folder in "
                    "its place; to keep artifacts on another disk, move the whole artifacts folder"
                )

    def location(self, key: str) -> str:
        return str(self.root / key)

    def how_to_remove(self, key: str) -> str:
        return f"Remove {self.root / key}"

    # ------------------------------------------------------------ what is there

    def find(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        try:
            manifest = self._read_manifest(key, ref)
        except FileNotFoundError:
            return None
        folder = self.root / key
        sizes = plain_files(folder, manifest.files)
        # Read last: a process that retires or discards the folder now does so before it deletes a file.
        retired = is_retired(folder, manifest)
        return SealedFolder(key, manifest, sizes, retired) if os.path.exists(f"{folder}/{MANIFEST}") else None

    def _read_manifest(self, key: str, ref: Ref | None) -> Manifest:
        return load_manifest(self.root / key, ref)

    def sealed_keys(self) -> list[str]:
        found = (path.parent for room in FOLDERS.values() for path in (self.root / room).glob(f"*/{MANIFEST}"))
        return [path.relative_to(self.root).as_posix() for path in sorted(found)]

    def list(self, below: str = "") -> dict[str, Entry]:
        """Return every stored file, without following links."""
        base, found = self.root / below, dict[str, Entry]()
        for parent, folders, names in os.walk(base):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            for name in (*names, *links) if names or folders else (".",):
                with contextlib.suppress(FileNotFoundError):  # another process may be at work in it
                    path = os.path.join(parent, name)
                    stat = os.lstat(path)
                    entry = Entry(0 if name == "." else stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))
                    found[os.path.relpath(parent, base) + f"/{name}"] = entry
        return {key.removeprefix("./"): entry for key, entry in found.items()}

    def read(self, path: str) -> bytes:
        return read_bounded(self.root / path)

    def listed_manifest(self, key: str, entry: Entry) -> Manifest:
        return self._read_manifest(key, None)

    def files_below(self, key: str, manifest: Manifest) -> str:
        return ""  # beside the manifest

    def is_retired(self, key: str, manifest: Manifest) -> bool:
        return is_retired(self.root / key, manifest)

    # ------------------------------------------------------------ reading

    def fetch(self, found: SealedFolder, names: Iterable[str] | None = None) -> Path:
        return self.root / found.key

    def range_reader(self, found: SealedFolder) -> None:
        """Return None: all files are on this machine."""

    def verify(self, found: SealedFolder) -> list[str]:
        return verify_files(self.root / found.key, found.manifest.checksums())

    # ------------------------------------------------------------ changing

    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None:
        folder = self.root / key
        self.delete(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, folder)
        sync(folder.parent)
        sync(work.parent)

    def mark_retired(self, found: SealedFolder, marker: str) -> None:
        self._mark(found.key, RETIRED, marker)

    def drop_data(self, found: SealedFolder) -> None:
        for path in (self.root / found.key).iterdir():
            if path.name not in (MANIFEST, RETIRED):
                with contextlib.suppress(FileNotFoundError):  # another process of the run drops it too
                    trash(self.root, path)

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        folder = self.root / found.key
        target = _unused(self.root / QUARANTINE, folder.name)
        self._mark(found.key, REASON, reason + "\n")
        os.replace(folder, target)
        sync(target.parent)
        sync(folder.parent)
        return f"{QUARANTINE}/{target.name}"

    def _mark(self, key: str, name: str, text: str) -> None:
        """Put a file into a sealed folder; what a kill leaves half-written lies in work/, not in the folder."""
        folder = self.root / key
        made = self.root / "work" / f"{folder.name}.{name}"
        write_text(made, text)
        os.replace(made, folder / name)
        sync(folder)

    def delete(self, key: str) -> None:
        if os.path.lexists(self.root / key):
            trash(self.root, self.root / key)

    # ------------------------------------------------------------ locks and garbage collection

    def lock(self, name: str, **how: Any) -> FileLock:
        return FileLock(self.root / "locks" / name, **how)

    def lock_holder(self, name: str) -> Holder | None:
        path = self.root / "locks" / name
        return read_holder(path) if is_held(path, exclusively=True) else None

    def is_held(self, name: str) -> bool:
        return is_held(self.root / "locks" / name)

    def is_young(self, modified: datetime) -> bool:
        return False  # gc has the folder to itself, so nothing belongs to a run that it does not see

    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]:
        return set()  # gc has the folder to itself

    def leftovers(self, key: str, manifest: Manifest | None, entries: Mapping[str, Entry], retired: bool) -> Leftovers:
        if manifest is None:
            yield key, "never sealed"
        elif retired:
            tops = {name.partition("/")[0] for name in entries} - {MANIFEST, RETIRED}
            yield from ((f"{key}/{name}", "data of a retired artifact") for name in sorted(tops))
        else:
            halves = (name for name in entries if name.endswith(TEMPORARY_SUFFIX) and name not in manifest.files)
            yield from ((f"{key}/{name}", "half-written") for name in sorted(halves))

    def litter(self, entries: Mapping[str, Entry]) -> Leftovers:
        thrown = {key.split("/")[1] for key in entries if key.startswith("trash/")} - {"."}
        yield from ((f"trash/{name}", "thrown away before") for name in sorted(thrown))

    def collect(self, path: str, is_wanted: Callable[[str], bool]) -> bool:
        if not path.startswith("trash/"):
            _to_trash(self.root, self.root / path)  # which gc empties at its end
        return True

    # ------------------------------------------------------------ records of runs, and pins

    def share(self, path: Path) -> None:
        """Do nothing: every machine that sees the folder sees its files."""

    unshare = share

    def refresh_records(self) -> None:
        """Do nothing, as in `share`."""


def trash(root: Path, path: Path) -> None:
    """Delete something below `root`: renamed into trash/ at once, so that a kill leaves no half of it."""
    name = _to_trash(root, path)
    with opened(root, root / "trash") as room:
        remove_in(room, name)


def empty_trash(root: Path) -> None:
    """Delete what killed processes left in trash/, as far as this user may."""
    with opened(root, root / "trash") as room:
        for name in os.listdir(room):
            remove_in(room, name)


def _to_trash(root: Path, path: Path) -> str:
    """Move something below `root` into trash/, and return its name there."""
    with opened(root, path.parent) as folder, opened(root, root / "trash") as room:
        name = _unused(root / "trash", path.name).name
        os.replace(path.name, name, src_dir_fd=folder, dst_dir_fd=room)
    sync(path.parent)
    return name


def _unused(room: Path, name: str) -> Path:
    """Return a free path in a folder: the name, the process, a number."""
    paths = (room / f"{name}.{os.getpid()}.{number}" for number in itertools.count())
    return next(path for path in paths if not os.path.lexists(path))
