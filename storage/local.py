"""A local folder as a place of sealed folders: work -> sealed -> retired, trash or quarantine, each by a rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stackwise_core.stages.identity import Ref
from storage.checksums import verify_files
from storage.durable import TEMPORARY_SUFFIX, sync, write_text
from storage.errors import ArtifactsFolderError
from storage.locks import FileLock, Holder, is_held, read_holder
from storage.manifest import MANIFEST, RETIRED, Manifest, parse_manifest
from storage.place import FOLDERS, QUARANTINE, REASON, RUNS, Entry, Leftovers, SealedFolder

ROOMS = (*FOLDERS.values(), RUNS, "work", "locks", "trash", QUARANTINE)


class LocalPlace:
    """A folder on a file system with renames and flock."""

    is_remote = False

    def __init__(self, root: Path | str) -> None:
        """Name the folder; nothing is touched before `open()`."""
        self.root = Path(root).absolute()

    @property
    def uri(self) -> str:
        """The path."""
        return str(self.root)

    def open(self) -> None:
        """Create the rooms, and make sure that files can be written and renamed there.

        Raises:
            ArtifactsFolderError: they cannot.
        """
        try:
            for name in ROOMS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "work" / f"probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ArtifactsFolderError(
                f"--artifacts {self.root}: cannot be written ({reason}); give a folder this user may write to"
            ) from None
        self.empty_trash()
        device = (self.root / "work").stat().st_dev
        rooms = (*FOLDERS.values(), "trash", QUARANTINE)
        if others := [name for name in rooms if (self.root / name).stat().st_dev != device]:
            raise ArtifactsFolderError(
                f"{self.root}: work/ and {', '.join(others)}/ lie on different file systems, so nothing can be "
                "sealed by renaming; keep the artifacts folder on one file system"
            )

    def check_exists(self) -> None:
        """Raise ArtifactsFolderError if the folder does not exist."""
        if not self.root.is_dir():
            raise ArtifactsFolderError(f"--artifacts {self.root}: there is no such folder; `stackwise train` makes one")

    def check_reachable(self) -> None:
        """Do nothing: artifacts can be looked up even in a folder that does not exist."""

    def location(self, key: str) -> str:
        """Return the path of a key."""
        return str(self.root / key)

    def how_to_remove(self, key: str) -> str:
        """Return how a person removes a folder."""
        return f"Remove {self.root / key}"

    # ------------------------------------------------------------ looking

    def look(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        """Read the manifest, and the sizes of the files that it lists."""
        folder = self.root / key
        try:
            manifest = self._read_manifest(key, ref)
        except FileNotFoundError:
            return None
        sizes = {name: size for name in manifest.files if (size := _size_of(folder / name)) is not None}
        # Looked at last: a process that retires or discards the folder now does so before it deletes a file.
        retired = (folder / RETIRED).exists()
        return SealedFolder(key, manifest, sizes, retired) if (folder / MANIFEST).exists() else None

    def _read_manifest(self, key: str, ref: Ref | None) -> Manifest:
        path = self.root / key / MANIFEST
        return parse_manifest(path.read_bytes(), path, path.parent, ref)

    def exists(self, key: str) -> bool:
        """Say whether the folder exists."""
        return (self.root / key).exists()

    def sealed_keys(self) -> list[str]:
        """Return the keys of all artifacts that have a manifest, sorted by path."""
        found = (path.parent for room in FOLDERS.values() for path in (self.root / room).glob(f"*/{MANIFEST}"))
        return [path.relative_to(self.root).as_posix() for path in sorted(found)]

    def list(self, below: str = "") -> dict[str, Entry]:
        """Return every file, without following links; an empty folder has one entry, '.'."""
        base, found = self.root / below, dict[str, Entry]()
        for parent, folders, names in os.walk(base):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            for name in (*names, *links) if names or folders else (".",):
                with contextlib.suppress(FileNotFoundError):  # another process may be at work in it
                    path = os.path.join(parent, name)
                    stat = os.lstat(path)
                    size = 0 if name == "." else stat.st_size
                    found[os.path.relpath(parent, base) + f"/{name}"] = Entry(size, _time(stat.st_mtime))
        return {key.removeprefix("./"): entry for key, entry in found.items()}

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        return (self.root / path).read_bytes()

    def stored_manifest(self, key: str, entry: Entry) -> Manifest:
        """Return the manifest of a folder."""
        return self._read_manifest(key, None)

    def files_below(self, key: str, manifest: Manifest) -> str:
        """Return '': files lie beside the manifest."""
        return ""

    # ------------------------------------------------------------ reading

    def fetch(self, found: SealedFolder, names: Iterator[str] | None = None) -> Path:
        """Return the folder; its files are here."""
        return self.root / found.key

    def range_reader(self, found: SealedFolder) -> None:
        """Return None: files are here."""

    def verify(self, found: SealedFolder) -> list[str]:
        """Compare every byte with its checksum."""
        return verify_files(self.root / found.key, found.manifest.checksums())

    # ------------------------------------------------------------ changing

    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None:
        """Rename the work folder into place; a folder that is there goes to the trash."""
        folder = self.root / key
        if folder.exists():
            self.trash(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, folder)
        sync(folder.parent)
        sync(work.parent)

    def mark_retired(self, found: SealedFolder) -> None:
        """Put the marker beside the manifest."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._mark(found.key, RETIRED, json.dumps({"retired": now}))

    def drop_data(self, found: SealedFolder) -> None:
        """Delete everything but the manifest and the marker."""
        for path in (self.root / found.key).iterdir():
            if path.name not in (MANIFEST, RETIRED):
                with contextlib.suppress(FileNotFoundError):  # another process of the run drops it too
                    self.trash(path)

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        """Rename the folder into quarantine/, the reason in it."""
        folder = self.root / found.key
        target = self._unused(QUARANTINE, folder.name)
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
        """Delete a folder through the trash."""
        if (self.root / key).exists():
            self.trash(self.root / key)

    def trash(self, path: Path) -> None:
        """Rename into trash/, which is atomic, then delete, which is not."""
        delete_path(self._to_trash(path))

    def _to_trash(self, path: Path) -> Path:
        target = self._unused("trash", path.name)
        os.replace(path, target)
        sync(path.parent)
        return target

    def empty_trash(self) -> None:
        """Delete what is in trash/, as far as this user may."""
        for path in (self.root / "trash").iterdir():
            delete_path(path)

    def _unused(self, room: str, name: str) -> Path:
        """Return a free path in a room: the name, the process, a number."""
        base = self.root / room / f"{name}.{os.getpid()}"
        number = 0
        while (path := base.with_name(f"{base.name}.{number}")).exists():
            number += 1
        return path

    # ------------------------------------------------------------ locks and garbage collection

    def lock(self, name: str, **how: Any) -> FileLock:
        """Return the lock of a name between the processes of this machine."""
        return FileLock(self.root / "locks" / name, **how)

    def lock_holder(self, name: str) -> Holder | None:
        """Return the process that holds a lock exclusively now."""
        path = self.root / "locks" / name
        return read_holder(path) if is_held(path, exclusively=True) else None

    def is_held(self, name: str) -> bool:
        """Say whether any process holds a lock. Writes nothing, so it works on read-only media."""
        return is_held(self.root / "locks" / name)

    def is_young(self, modified: datetime) -> bool:
        """Return False: gc has the folder to itself, so nothing here belongs to a run that it does not see."""
        return False

    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return nothing: gc has the folder to itself."""
        return set()

    def leftovers(self, key: str, manifest: Manifest | None, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield unsealed folders, data of retired artifacts, and half-written files in sealed ones."""
        if manifest is None:
            yield key, "never sealed"
        elif RETIRED in entries:
            tops = {name.partition("/")[0] for name in entries} - {MANIFEST, RETIRED}
            yield from ((f"{key}/{name}", "data of a retired artifact") for name in sorted(tops))
        else:
            halves = (name for name in entries if name.endswith(TEMPORARY_SUFFIX) and name not in manifest.files)
            yield from ((f"{key}/{name}", "half-written") for name in sorted(halves))

    def litter(self, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield what is in the trash."""
        thrown = {key.split("/")[1] for key in entries if key.startswith("trash/")} - {"."}
        yield from ((f"trash/{name}", "thrown away before") for name in sorted(thrown))

    def collect(self, path: str, is_wanted: Callable[[str], bool]) -> bool:
        """Rename into the trash, which gc empties at its end."""
        if not path.startswith("trash/"):
            self._to_trash(self.root / path)
        return True

    # ------------------------------------------------------------ records of runs

    def share(self, path: Path) -> None:
        """Do nothing: every machine that sees the folder sees the file."""

    def unshare(self, path: Path) -> None:
        """Do nothing, as `share`."""

    def refresh_records(self) -> None:
        """Do nothing, as `share`."""


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def delete_path(path: Path) -> None:
    """Delete a file or folder that another process may be deleting too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
