"""Where each artifact lives, and how it gets there: work -> sealed -> retired, trash or quarantine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stackwise_core.failpoints import failpoint
from stackwise_core.stages.identity import Kind, Recipe, Ref
from storage.checksums import checksum_file, verify_files
from storage.durable import remove_temporaries, sync, sync_tree, write_text
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
)
from storage.locks import FileLock, Holder, is_held, no_wait, read_holder
from storage.manifest import MANIFEST, RETIRED, FileEntry, InputEntry, Manifest, make_manifest, read_manifest

if TYPE_CHECKING:
    from storage.objects.folder import ObjectFolder

FOLDERS: dict[Kind, str] = {
    "data": "data",
    "build": "builds",
    "trunk": "trunks",
    "stack": "stacks",
    "activations": "activations",
    "validation": "validations",
}


SCRATCH = "scratch"
"""Folder inside a work folder for what helps to go on after a kill; it is never sealed."""

REASON = "reason.txt"
"""Why a folder is in quarantine."""


class State(Enum):
    """What is on disk of an artifact."""

    SEALED = "sealed"
    RETIRED = "retired"
    ABSENT = "absent"
    CORRUPT = "corrupt"


class Artifacts:
    """A folder of artifacts. Knows names and seals, nothing of what is inside."""

    def __init__(self, root: Path | str) -> None:
        """Name the folder; nothing is touched before `open()`."""
        self.given = str(root)
        self.root = Path(root).absolute()
        self._checked: set[tuple[str, str]] = set()

    def open(self) -> Artifacts:
        """Create the folder and its rooms, and make sure that files can be written and renamed there.

        Raises:
            ArtifactsFolderError: it cannot be written, or work/ lies on another file system.
        """
        self._refuse_uri()
        try:
            for name in (*FOLDERS.values(), "runs", "work", "locks", "trash", "quarantine"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / "work" / f"probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ArtifactsFolderError(
                f"--artifacts {self.root}: cannot be written ({reason}); give a folder this user may write to"
            ) from None
        self.empty_trash()  # what a killed process had thrown away already
        device = (self.root / "work").stat().st_dev
        rooms = (*FOLDERS.values(), "trash", "quarantine")
        elsewhere = [name for name in rooms if (self.root / name).stat().st_dev != device]
        if elsewhere:
            raise ArtifactsFolderError(
                f"{self.root}: work/ and {', '.join(elsewhere)}/ lie on different file systems, so nothing can be "
                "sealed by renaming; keep the artifacts folder on one file system"
            )
        return self

    def existing(self) -> Artifacts:
        """Return self if the folder is there.

        Raises:
            ArtifactsFolderError: there is none.
        """
        self._refuse_uri()
        if not self.root.is_dir():
            raise ArtifactsFolderError(f"--artifacts {self.root}: there is no such folder; `stackwise train` makes one")
        return self

    def _refuse_uri(self) -> None:
        if "://" in self.given or not self.given:
            problem = "this command works on a local folder, not on an object store; give one"
            raise ArtifactsFolderError(f"--artifacts {self.given!r}: {problem}")

    # ------------------------------------------------------------ other machines; `objects/remote.py` has some

    is_remote: ClassVar = False
    """Whether what is sealed is in an object store, and `root` a scratch folder."""

    @property
    def uri(self) -> str:
        """What `--artifacts` takes to come here, from any working folder."""
        return str(self.root)

    def where(self, ref: Ref) -> str:
        """Return what messages call the place of an artifact."""
        return str(self.folder(ref))

    def reachable(self) -> Artifacts:
        """Return self if artifacts can be asked for; a local folder need not even exist."""
        return self

    def is_there(self, ref: Ref) -> bool:
        """Say whether anything stands in the place of an artifact, sealed or not."""
        return self.folder(ref).exists()

    def elsewhere(self, ref: Ref) -> ObjectFolder | None:
        """Return where the files of a sealed artifact are read from by ranges; None: they are in `folder`."""
        return None

    def is_held_elsewhere(self, name: str) -> bool:
        """Say whether a process of another machine holds a lock now."""
        return False

    def verify_elsewhere(self, folder: Path) -> tuple[list[str], int] | None:
        """Return what is wrong with the bytes of another place, and how many were read; None: they are here."""
        return None

    def share(self, path: Path) -> None:
        """Let other machines see a file of a run, or a pin."""

    def unshare(self, path: Path) -> None:
        """Let other machines see it no more."""

    def refresh_runs(self) -> None:
        """See what other machines shared, and what they removed."""

    def brought(self, ref: Ref) -> Path:
        """Return the folder of an artifact, all files of it on this machine."""
        return self.folder(ref)

    # ------------------------------------------------------------ names

    def place(self, path: Path) -> str:
        """Return what messages call a path below the root."""
        return str(path)

    def folder(self, ref: Ref) -> Path:
        """Return where the sealed artifact lives."""
        return self.root / FOLDERS[ref.kind] / ref.name

    def work(self, ref: Ref) -> Path:
        """Return where the artifact is made, created if need be; what a killed task left is still in it."""
        folder = self.root / "work" / ref.name
        if folder.is_symlink():
            folder.unlink()  # what is made stays inside the artifacts folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock(
        self,
        name: str,
        *,
        shared: bool = False,
        on_wait: Callable[[str], None] = no_wait,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> FileLock:
        """Return the lock of a name, to be held with `with`."""
        return FileLock(self.root / "locks" / name, shared=shared, on_wait=on_wait, should_stop=should_stop)

    def lock_holder(self, name: str) -> Holder | None:
        """Return the process that holds a name's lock alone now; None if nobody does."""
        path = self.root / "locks" / name
        return read_holder(path) if is_held(path, alone=True) else None

    # ------------------------------------------------------------ state

    def state(self, ref: Ref) -> State:
        """Say what is on disk, from the manifest and the sizes of the listed files.

        Bytes are not read here: checksums are compared when a file is used, and by `stackwise verify`.
        """
        folder = self.folder(ref)
        if not (folder / MANIFEST).exists():
            return State.ABSENT
        if (folder / RETIRED).exists():
            return State.RETIRED
        try:
            self.manifest(ref)
        except (ArtifactMissingError, ArtifactUnsealedError):  # retired or discarded by another process just now
            return State.RETIRED if (folder / RETIRED).exists() else State.ABSENT
        except ArtifactError:
            return State.CORRUPT
        return State.SEALED

    def manifest(self, ref: Ref) -> Manifest:
        """Return the manifest of a sealed artifact, every listed file present in its size.

        Raises:
            ArtifactMissingError, ArtifactUnsealedError, ArtifactCorruptError: each names path and remedy.
        """
        folder = self.folder(ref)
        try:
            return self._read_sealed(folder, ref)
        except ArtifactCorruptError:
            self._refuse_absent(folder)  # another process may have retired it while it was read
            raise

    def sealed(self, ref: Ref) -> Manifest | None:
        """Return the manifest of an artifact that is sealed now; None if it is absent, retired or damaged."""
        try:
            return self.manifest(ref)
        except ArtifactError:
            return None

    def known(self, ref: Ref) -> Manifest | None:
        """Return the manifest of an artifact, sealed or retired, its files not looked at; None: it has none.

        Raises:
            ArtifactCorruptError: it cannot be believed.
        """
        folder = self.folder(ref)
        return read_manifest(folder, ref) if (folder / MANIFEST).exists() else None

    def _read_sealed(self, folder: Path, ref: Ref) -> Manifest:
        self._refuse_absent(folder)
        manifest = read_manifest(folder, ref)
        for name, entry in manifest.files.items():
            self._check_size(folder, name, entry)
        return manifest

    def _refuse_absent(self, folder: Path) -> None:
        remedy = "Run `stackwise train` with the configuration that made it: it will be made"
        if not folder.exists():
            raise ArtifactMissingError(folder, "there is no such artifact", remedy)
        if not (folder / MANIFEST).exists():
            raise ArtifactUnsealedError(folder, "was never sealed (no manifest)", remedy)
        if (folder / RETIRED).exists():
            raise ArtifactMissingError(folder, "was retired: its data was dropped on purpose", remedy)

    def checked(self, ref: Ref) -> Path:
        """Return the folder of a sealed artifact after comparing every checksum, once per digest.

        Raises:
            ArtifactError: as `manifest`, or a file's bytes are not what was sealed.
        """
        manifest, folder = self.manifest(ref), self.folder(ref)
        if (ref.sha256, manifest.digest) not in self._checked:
            problems = verify_files(folder, manifest.checksums())
            if problems:
                path, _, problem = problems[0].partition(": ")
                remedy = f"Remove {folder} and run the same command again: it will be remade"
                raise ArtifactCorruptError(path, problem, remedy)
            self._checked.add((ref.sha256, manifest.digest))
        return folder

    def _check_size(self, folder: Path, name: str, entry: FileEntry) -> None:
        path = folder / name
        remedy = f"Remove {folder} and run the same command again: it will be remade"
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactCorruptError(path, "is missing from a sealed artifact", remedy) from None
        if size != entry.size:
            raise ArtifactCorruptError(path, f"has {size:,} bytes, sealed with {entry.size:,}", remedy)

    def input_entry(self, ref: Ref) -> InputEntry:
        """Return (id, digest) of a sealed artifact, as manifests record what they were made from."""
        return InputEntry(ref=ref, digest=self.manifest(ref).digest)

    def everything(self) -> list[Path]:
        """Return the folder of every artifact with a manifest, sorted."""
        return sorted(path.parent for name in FOLDERS.values() for path in (self.root / name).glob(f"*/{MANIFEST}"))

    # ------------------------------------------------------------ transitions

    def seal(
        self,
        ref: Ref,
        recipe: Recipe,
        inputs: tuple[InputEntry, ...],
        facts: dict[str, Any],
        fingerprint: dict[str, Any],
        *,
        checksums: dict[str, tuple[int, str]] | None = None,
        records: tuple[str, ...] = (),
    ) -> Manifest:
        """Turn the work folder into the artifact: flush, manifest last, then `promote`.

        Args:
            ref: what it is.
            recipe: what it was made by.
            inputs: what it was made from.
            facts: what the task found out.
            fingerprint: on what it was computed.
            checksums: path -> (size, checksum) of files that need not be read again.
            records: files that are logs, not content.
        """
        work, known = self.work(ref), checksums or {}
        remove_temporaries(work)
        for path in list(work.rglob(".*")):  # .DS_Store and the like: no task writes hidden files
            _delete(path)
        files: dict[str, FileEntry] = {}
        for path in sorted(work.rglob("*")):
            name = path.relative_to(work).as_posix()
            if path.is_file() and name != MANIFEST and not name.startswith(f"{SCRATCH}/"):
                n_bytes, checksum = known.get(name) or (path.stat().st_size, checksum_file(path, "sha256"))
                files[name] = FileEntry(size=n_bytes, checksum=checksum, content=name not in records)
        sync_tree(work)
        write_text(
            work / MANIFEST, make_manifest(ref, recipe, inputs, files, facts, fingerprint).model_dump_json(indent=1)
        )
        failpoint(f"promote-{ref.kind}", ref.stage)
        self.promote(ref)
        return self.manifest(ref)

    def promote(self, ref: Ref) -> bool:
        """Put a work folder that has its manifest in place; say whether there was one.

        An artifact of that id which is sealed already (a forced attempt) stays if its digest is the
        same; otherwise it goes to the trash and the new one takes its place. Called again before a task
        begins: it may have been killed between the manifest and the rename.
        """
        work, folder = self.root / "work" / ref.name, self.folder(ref)
        if not (work / MANIFEST).exists():
            return False
        manifest = read_manifest(work, ref)
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        if self._is_as_sealed(ref, manifest.digest):
            self._discard(work)
            return True
        if folder.exists():
            self._discard(folder)
        os.replace(work, folder)
        sync(folder.parent)
        sync(work.parent)
        return True

    def _is_as_sealed(self, ref: Ref, digest: str) -> bool:
        """Say whether an artifact of this digest is in place, every byte of it as it was sealed."""
        if self.state(ref) is not State.SEALED or self.manifest(ref).digest != digest:
            return False
        return not verify_files(self.folder(ref), self.manifest(ref).checksums())

    def retire(self, ref: Ref) -> None:
        """Drop the data of a sealed artifact on purpose; the manifest stays to tell what was there."""
        folder = self.folder(ref)
        if not (folder / MANIFEST).exists():
            return
        self.mark_retired(ref)
        for path in folder.iterdir():
            if path.name not in (MANIFEST, RETIRED):
                with contextlib.suppress(FileNotFoundError):  # another process of the run drops it too
                    self._discard(path)

    def mark_retired(self, ref: Ref) -> None:
        """Take a sealed artifact from its readers; `retire` then drops the data."""
        if not (self.folder(ref) / RETIRED).exists():
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._mark(self.folder(ref), RETIRED, json.dumps({"retired": now}))

    def quarantine(self, ref: Ref, reason: str) -> Path | str:
        """Take a sealed artifact out of every reader's reach, and keep it for inspection."""
        target = self._unused("quarantine", ref.name)
        self._mark(self.folder(ref), REASON, reason + "\n")
        os.replace(self.folder(ref), target)
        sync(target.parent)
        sync(self.folder(ref).parent)
        return target

    def _mark(self, folder: Path, name: str, text: str) -> None:
        """Put a file into a sealed folder; what a kill leaves half-written lies in work/, not in the folder."""
        made = self.root / "work" / f"{folder.name}.{name}"
        write_text(made, text)
        os.replace(made, folder / name)
        sync(folder)

    def discard(self, ref: Ref) -> None:
        """Throw an artifact away, sealed or not."""
        if self.folder(ref).exists():
            self._discard(self.folder(ref))

    def discard_work(self, ref: Ref) -> None:
        """Throw away what an attempt left, so that the next begins at the beginning."""
        self._discard(self.work(ref))

    def adopt(self, ref: Ref, complete: Path) -> None:
        """Put a folder that has its manifest in place: a copy, or one from quarantine.

        What stands there must not be sealed; unsealed or retired, it goes to the trash.
        """
        place = self.folder(ref)
        if place.exists():
            self._discard(place)
        os.replace(complete, place)
        sync(place.parent)
        sync(complete.parent)

    def _discard(self, path: Path) -> None:
        """Rename into trash/, which is atomic, then delete, which is not."""
        _delete(self.to_trash(path))

    def to_trash(self, path: Path) -> Path:
        """Rename something into trash/: whole, and from then on nobody's."""
        target = self._unused("trash", path.name)
        os.replace(path, target)
        sync(path.parent)
        return target

    def empty_trash(self) -> None:
        """Delete what is in trash/, as far as this user may."""
        for path in (self.root / "trash").iterdir():
            _delete(path)

    def _unused(self, room: str, name: str) -> Path:
        """Return a path in a room that nothing has taken: the name, the process, a number."""
        base = self.root / room / f"{name}.{os.getpid()}"
        number = 0
        while (path := base.with_name(f"{base.name}.{number}")).exists():
            number += 1
        return path


def _delete(path: Path) -> None:
    """Delete what is in the trash; another process may be emptying it too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
