"""Artifacts: the state of each, and how it gets from work to sealed, retired or quarantine, in any place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from stackwise_core.failpoints import failpoint
from stackwise_core.files import sync_tree
from stackwise_core.stages.identity import Recipe, Ref
from storage.errors import (
    AGAIN,
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
)
from storage.files import NOT_LISTED, Files, checksum_file, remove_temporaries, write_text
from storage.links import delete_path, remove_links
from storage.local import LocalPlace, trash
from storage.locks import FileLock, OnWait, no_wait
from storage.manifest import MANIFEST, FileEntry, InputEntry, Manifest, make_manifest, read_manifest
from storage.place import Place, SealedFolder, key_of
from storage.retirement import make_statement
from storage.unchanged import verify_once

SCRATCH = "scratch"
"""Folder inside a work folder for what a task needs to resume after a kill; it is never sealed."""
_REMAKE = f"R{AGAIN[1:]}"


class State(Enum):
    """What is stored of an artifact."""

    SEALED = "sealed"
    RETIRED = "retired"
    ABSENT = "absent"
    CORRUPT = "corrupt"


@dataclass(frozen=True)
class Lookup:
    """The state of an artifact at one moment."""

    state: State
    folder: SealedFolder | None = None
    """If it has a manifest that can be trusted."""
    error: ArtifactCorruptError | None = None
    """What is damaged, if the state is CORRUPT."""

    @property
    def sealed(self) -> Manifest | None:
        """The manifest, if the artifact is sealed and not retired or damaged."""
        return self.folder.manifest if self.folder and self.state is State.SEALED else None


def _place_at(uri: Path | str) -> Place:
    text = str(uri)
    if not text:
        raise ArtifactsFolderError("--artifacts '': give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if "://" in text:
        from storage.bucket import BucketPlace  # imports obstore

        return BucketPlace(text)
    return LocalPlace(Path(uri).expanduser() if text.startswith("~") else uri)  # a form has no shell


def artifacts_at(uri: Path | str) -> Artifacts:
    """Return the artifacts of a folder or of a URI such as s3://bucket/prefix; nothing is touched yet."""
    return Artifacts(uri)


class Artifacts:
    """The artifacts of one place, by their names and seals; what is inside them is up to others.

    `root` is the folder of this machine in which artifacts are made and read; `uri` is what `--artifacts` takes.
    Nothing is cached. For answers that must agree with each other, use `functools.cache(artifacts.lookup)`.
    """

    def __init__(self, uri: Path | str) -> None:
        """Name the place by a path, or a URI such as s3://bucket/prefix; nothing is touched before `open()`."""
        self.place = _place_at(uri)
        self.root, self.uri, self.is_remote = self.place.root, self.place.uri, self.place.is_remote
        self._compared: set[tuple[str, str]] = set()
        self._replaces: dict[Ref, str] = {}

    def open(self) -> Artifacts:
        """Create what is missing, or raise ArtifactsFolderError if artifacts cannot be sealed here."""
        self.place.open()
        return self

    def existing(self) -> Artifacts:
        """Return self, or raise ArtifactsFolderError if nothing is here."""
        self.place.check_exists()
        return self

    def reachable(self) -> Artifacts:
        """Return self, or raise ArtifactsFolderError if nothing can be looked up; a local folder need not exist."""
        self.place.check_reachable()
        return self

    # ------------------------------------------------------------ names

    def where(self, ref: Ref) -> str:
        """Return what messages call an artifact: its path or URI."""
        return self.place.location(key_of(ref))

    def location(self, path: Path) -> str:
        """Return what messages call something below the root."""
        return self.place.location(path.relative_to(self.root).as_posix())

    def folder(self, ref: Ref) -> Path:
        """Return the folder of a sealed artifact on this machine. For a bucket it may lack files; see `checked`."""
        return self.root / key_of(ref)

    def work(self, ref: Ref) -> Path:
        """Return the folder in which an artifact is made, with what a killed task left in it."""
        folder = self.root / "work" / ref.name
        if ref not in self._replaces:
            remove_links(folder)
            try:
                found = self.place.find(key_of(ref), ref)
            except ArtifactCorruptError:
                found = None
            self._replaces[ref] = found.manifest.seal if found else ""
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock(
        self,
        name: str,
        *,
        shared: bool = False,
        on_wait: OnWait = no_wait,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> FileLock:
        """Return the lock of a name, to be held with `with`."""
        return self.place.lock(name, shared=shared, on_wait=on_wait, should_stop=should_stop)

    # ------------------------------------------------------------ state

    def lookup(self, ref: Ref) -> Lookup:
        """Return the state of an artifact by its manifest and the sizes of the files that it lists.

        Bytes are not read here: checksums are compared when a file is used, and by `stackwise verify`.
        """
        key = key_of(ref)
        try:
            found = self.place.find(key, ref)
        except ArtifactCorruptError as error:
            return Lookup(State.CORRUPT, error=error)
        if found is None:
            return Lookup(State.ABSENT)
        if found.retired:
            return Lookup(State.RETIRED, found)
        if problem := found.problem():
            path = self.place.location(f"{key}/{self.place.files_below(key, found.manifest)}{problem[0]}")
            remedy = f"{self.place.how_to_remove(key)} and {AGAIN}"
            return Lookup(State.CORRUPT, found, ArtifactCorruptError(path, problem[1], remedy))
        return Lookup(State.SEALED, found)

    def state(self, ref: Ref) -> State:
        """Return the state of an artifact; see `lookup`."""
        return self.lookup(ref).state

    def manifest(self, ref: Ref) -> Manifest:
        """Return the manifest of a sealed artifact; see `sealed_folder`."""
        return self.sealed_folder(ref).manifest

    def sealed_folder(self, ref: Ref) -> SealedFolder:
        """Return a sealed artifact in which every listed file has its size.

        Raises:
            ArtifactError: it is missing, retired, unsealed or corrupt.
        """
        found = self.lookup(ref)
        if found.error:
            raise found.error
        if found.state is State.RETIRED:
            raise ArtifactMissingError(self.where(ref), "was retired: its data was dropped on purpose", _REMAKE)
        if found.folder:
            return found.folder
        if self.is_there(ref):
            raise ArtifactUnsealedError(self.where(ref), "was never sealed (no manifest)", _REMAKE)
        raise ArtifactMissingError(self.where(ref), "there is no such artifact", _REMAKE)

    def sealed(self, ref: Ref) -> Manifest | None:
        """Return the manifest of an artifact that is sealed now; None if it is absent, retired or damaged."""
        return self.lookup(ref).sealed

    def known(self, ref: Ref) -> Manifest | None:
        """Return the manifest of an artifact, sealed or retired, even if its files are damaged; None if it has none."""
        found = self.place.find(key_of(ref), ref)
        return found.manifest if found else None

    def is_there(self, ref: Ref) -> bool:
        """Say whether anything is stored where an artifact belongs, sealed or not."""
        return bool(self.place.list(key_of(ref)))

    def checked(self, ref: Ref) -> Path:
        """Return the folder of a sealed artifact, with all files on this machine and their checksums compared once.

        Raises:
            ArtifactError: as `sealed_folder`, or a file's bytes are not what was sealed.
        """
        found = self.sealed_folder(ref)
        folder = self.place.fetch(found)
        if (ref.sha256, found.manifest.digest) not in self._compared:
            if problems := verify_once(folder, found.manifest.checksums(), found.manifest.digest):
                path, _, problem = problems[0].partition(": ")
                remedy = f"Remove {folder} and {AGAIN}"
                raise ArtifactCorruptError(path, problem, remedy)
            self._compared.add((ref.sha256, found.manifest.digest))
        return folder

    def input_entry(self, ref: Ref) -> InputEntry:
        """Return (id, digest) of a sealed artifact, as manifests record what they were made from."""
        return InputEntry(ref=ref, digest=self.manifest(ref).digest)

    def everything(self) -> list[Path]:
        """Return the folder of every artifact with a manifest, sorted."""
        return [self.root / key for key in self.place.sealed_keys()]

    def verify(self, folder: Path) -> tuple[list[str], int]:
        """Compare every byte of an artifact, here or in any local folder, with its seal.

        Returns a line for each problem, with the remedy, and the number of bytes that were read.
        """
        place, key = self.place, f"{folder.parent.name}/{folder.name}"
        if folder != self.root / key:
            place, key = LocalPlace(folder.parent), folder.name
        try:
            found = place.find(key)
        except ArtifactError as error:
            return [str(error)], 0
        if found is None:
            return [str(ArtifactUnsealedError(place.location(key), "was never sealed (no manifest)", _REMAKE))], 0
        if found.retired:
            return [], 0
        remedy = f"{place.how_to_remove(key)} and {AGAIN}"
        unlisted = "Remove it; half-written files (.tmp) are removed by `stackwise gc`"
        lines = (f"{line}. {unlisted if line.endswith(NOT_LISTED) else remedy}" for line in place.verify(found))
        return list(lines), found.manifest.n_bytes

    # ------------------------------------------------------------ transitions

    def seal(
        self,
        ref: Ref,
        recipe: Recipe,
        inputs: tuple[InputEntry, ...],
        facts: dict[str, Any],
        fingerprint: dict[str, Any],
        *,
        checksums: Files | None = None,
        records: tuple[str, ...] = (),
    ) -> Manifest:
        """Turn the work folder into the artifact: flush, manifest last, then `promote`.

        Files in `checksums` are not read again; `records` are files that are logs and not content.
        """
        work, known = self.work(ref), checksums or {}
        remove_temporaries(work)
        for path in list(work.rglob(".*")):  # .DS_Store and the like: no task writes hidden files
            delete_path(path)
        files: dict[str, FileEntry] = {}
        for path in sorted(work.rglob("*")):
            name = path.relative_to(work).as_posix()
            if path.is_file() and name != MANIFEST and not name.startswith(f"{SCRATCH}/"):
                n_bytes, checksum = known.get(name) or (path.stat().st_size, checksum_file(path, "sha256"))
                files[name] = FileEntry(size=n_bytes, checksum=checksum, content=name not in records)
        sync_tree(work)
        manifest = make_manifest(ref, recipe, inputs, files, facts, fingerprint)
        write_text(work / MANIFEST, manifest.model_dump_json(indent=1))
        failpoint(f"promote-{ref.kind}", ref.stage)
        self.promote(ref)
        return self.manifest(ref)

    def promote(self, ref: Ref) -> bool:
        """Seal a work folder that has its manifest; say whether it had one.

        An equal artifact that is sealed already stays if every byte of it is as sealed; otherwise it is replaced.
        A task calls this before it begins, because an earlier one may have been killed after it wrote the manifest.
        """
        work, key = self.root / "work" / ref.name, key_of(ref)
        if not (work / MANIFEST).exists():
            return False
        manifest = read_manifest(work, ref)
        delete_path(work / SCRATCH)
        if self._is_sealed_equal(ref, manifest):
            trash(self.root, work)
        else:
            self.place.publish(key, work, manifest, self._replaces.get(ref))
        self._replaces.pop(ref, None)
        return True

    def _is_sealed_equal(self, ref: Ref, ours: Manifest) -> bool:
        """Say whether another attempt sealed the same bytes, and every byte is still as it was sealed."""
        found = self.lookup(ref)
        theirs = found.sealed
        if not found.folder or not theirs or theirs.digest != ours.digest or theirs.seal == ours.seal:
            return False
        return not self.place.verify(found.folder)

    def retire(self, ref: Ref) -> None:
        """Drop the data of a sealed artifact on purpose; the manifest stays as a record."""
        self.mark_retired(ref)
        if (found := self.place.find(key_of(ref), ref)) is not None:
            self.place.drop_data(found)

    def mark_retired(self, ref: Ref) -> None:
        """Hide a sealed artifact from its readers; `retire` then drops the data. Raises ValueError if it never is."""
        found = self.place.find(key_of(ref), ref)
        if found is not None and not found.retired:
            self.place.mark_retired(found, make_statement(found.manifest))

    def quarantine(self, ref: Ref, reason: str) -> str:
        """Move a sealed artifact into quarantine, where it is kept for inspection, and return its path or URI."""
        return self.place.location(self.place.quarantine(self.sealed_folder(ref), reason))

    def discard(self, ref: Ref) -> None:
        """Delete an artifact, sealed or not."""
        self.place.delete(key_of(ref))

    def discard_work(self, ref: Ref) -> None:
        """Delete what an attempt left, so that the next one starts from nothing."""
        trash(self.root, self.work(ref))

    def adopt(self, ref: Ref, complete: Path) -> None:
        """Seal a folder that has its manifest; replaces what is unsealed or retired there."""
        self.place.publish(key_of(ref), complete, read_manifest(complete, ref), None)
