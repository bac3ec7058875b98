"""Artifacts whose root is an object store.

Everything is made in a scratch folder of this machine, which is laid out like a local root: work folders,
locks, run records. What is sealed is the bucket's alone:

    <kind>/<id>/manifest.json             the seal, put under the condition that there is none
    <kind>/<id>/<attempt>/...             the files; the attempt is named after the seal's hash
    <kind>/<id>/<attempt>/retired.json    its data was dropped on purpose
    runs/...  leases/...  quarantine/...

The scratch folder of a sealed artifact mirrors its manifest, and has those of its files that were made or read
here. It may be deleted whenever nothing runs; only what an interrupted run left in work/ would be made again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from stackwise_core.stages.identity import Ref
from storage.durable import sync, write_text
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
    ObjectStoreError,
)
from storage.layout import SCRATCH, Artifacts, State
from storage.locks import FileLock, Holder, no_wait
from storage.manifest import MANIFEST, RETIRED, Manifest, read_manifest
from storage.objects import lease, seals
from storage.objects.bucket import FEW_RETRIES, Bucket
from storage.objects.folder import ObjectFolder, names_missing
from storage.objects.looks import Look, Looks, key_of
from storage.objects.scratch import scratch_of
from storage.objects.shared_runs import OUTCOME, refresh, share_file, unshare_file
from storage.objects.survey import FoundObjects, Listing

_LOOKS_AT_ONCE = 16


class RemoteArtifacts(Artifacts):
    """A prefix in a bucket, and the scratch folder `root`."""

    def __init__(self, uri: str) -> None:
        """Name both; nothing is asked before it is needed."""
        self.bucket = Bucket(uri)
        self._looks = Looks(self.bucket)
        self._found_at_begin: dict[Ref, str] = {}
        super().__init__(scratch_of(self.bucket.uri))

    is_remote: ClassVar = True

    @property
    def uri(self) -> str:
        """The URI."""
        return self.bucket.uri

    def where(self, ref: Ref) -> str:
        """Return the URI of an artifact."""
        return self.bucket.where(key_of(ref))

    def place(self, path: Path) -> str:
        """Return the URI of what the scratch folder mirrors at a path."""
        return self.bucket.where(path.relative_to(self.root).as_posix())

    # ------------------------------------------------------------ opening

    def reachable(self) -> RemoteArtifacts:
        """Return self if the store answers.

        Raises:
            ArtifactsFolderError: it does not; one line says why.
        """
        self.bucket.check(writes=False)
        return self

    def open(self) -> RemoteArtifacts:
        """Make the scratch folder, and make sure that the store can be written and keeps conditional writes."""
        self.bucket.check(writes=True)
        _ = self._scratch
        refresh(self.bucket, self.root)
        return self

    def existing(self) -> RemoteArtifacts:
        """Return self if there is anything below the URI.

        Raises:
            ArtifactsFolderError: there is nothing, or the store does not answer.
        """
        self.reachable()
        if not self.bucket.folders(""):
            raise ArtifactsFolderError(f"--artifacts {self.uri}: nothing is there; `stackwise train` makes it")
        refresh(self.bucket, self._scratch)
        return self

    @functools.cached_property
    def _scratch(self) -> Path:
        """The scratch folder, its rooms made."""
        super().open()
        return self.root

    @functools.cached_property
    def _brief(self) -> Bucket:
        """The bucket, for what may fail."""
        return Bucket(self.uri, FEW_RETRIES)

    @functools.cached_property
    def _machine(self) -> str:
        """What tells this scratch folder from those of other machines."""
        path = self._scratch / "machine"
        if not path.exists():
            with FileLock(self._scratch / "locks" / "machine"):
                if not path.exists():
                    write_text(path, uuid.uuid4().hex)
        return path.read_text()

    # ------------------------------------------------------------ other machines

    def lock(
        self,
        name: str,
        *,
        shared: bool = False,
        on_wait: Callable[[str], None] = no_wait,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> FileLock:
        """Return the lock of a name: between the processes of this machine, and by a lease between machines."""
        self._looks.forget()  # by the time it is held, another may have sealed something
        if name == "gc":  # gc of another machine goes by the plans of runs and by time
            return super().lock(name, shared=shared, on_wait=on_wait, should_stop=should_stop)
        path = self._scratch / "locks" / name
        return lease.LeasedLock(
            path, self._brief, self._machine, shared=shared, on_wait=on_wait, should_stop=should_stop
        )

    def lock_holder(self, name: str) -> Holder | None:
        """Return the process, of whichever machine, that holds a name's lock alone now; None if nobody does."""
        return lease.holder_of(self.bucket, name) or super().lock_holder(name)

    def is_held_elsewhere(self, name: str) -> bool:
        """Say whether a process of another machine holds a lease now."""
        return lease.is_held(self.bucket, name, self._machine)

    def share(self, path: Path) -> None:
        """Put a file of a run; how it ended must not hold up its end."""
        share_file(self._brief if path.name == OUTCOME else self.bucket, self.root, path)

    def unshare(self, path: Path) -> None:
        """Delete the object of a file."""
        unshare_file(self.bucket, self.root, path)

    def refresh_runs(self) -> None:
        """Bring the records of runs and the pins that other machines wrote, and drop those they removed."""
        refresh(self.bucket, self.root)

    def brought(self, ref: Ref) -> Path:
        """Return the scratch folder of an artifact, all files of it brought there and compared as they arrive."""
        look = self._looks.now(ref)
        if look is not None and not look.retired:
            self._looks.folder(look).fetch_missing(self.folder(ref), look.manifest.checksums())
        return self.folder(ref)

    # ------------------------------------------------------------ the bucket as a whole

    def listing(self) -> Listing:
        """Return everything in the bucket, as it is now."""
        return Listing(self.bucket)

    def survey(self, listing: Listing) -> list[FoundObjects]:
        """Return what lies in the rooms of artifacts."""
        return listing.artifacts(self.root, self._looks)

    def look(self, key: str) -> Look | None:
        """Return what the bucket says now of the artifact under a key; None if it is not sealed."""
        return self._looks.at(key)

    def forget(self) -> None:
        """Let no look of before count."""
        self._looks.forget()

    # ------------------------------------------------------------ state

    def is_there(self, ref: Ref) -> bool:
        """Say whether an artifact has a manifest."""
        return self.state(ref) is not State.ABSENT

    def state(self, ref: Ref) -> State:
        """Say what the bucket has of an artifact, from its manifest and the sizes of the listed files."""
        try:
            look = self._looks.recent(ref)
        except ArtifactCorruptError:
            return State.CORRUPT
        if look is None:
            return State.ABSENT
        self._mirror(look)
        if look.retired:
            return State.RETIRED
        return State.CORRUPT if look.problem() else State.SEALED

    def manifest(self, ref: Ref) -> Manifest:
        """Return the manifest of a sealed artifact, every listed file in the bucket in its size.

        Raises:
            ArtifactMissingError, ArtifactUnsealedError, ArtifactCorruptError: each names the URI and the remedy.
        """
        return self._sealed(ref).manifest

    def known(self, ref: Ref) -> Manifest | None:
        """Return the manifest of an artifact, sealed or retired; None if it has none."""
        look = self._looks.now(ref)
        return look.manifest if look else None

    def _sealed(self, ref: Ref) -> Look:
        look = self._looks.recent(ref)
        remedy = "Run `stackwise train` with the configuration that made it: it will be made"
        if look is None:
            if self.bucket.list(key_of(ref)):
                raise ArtifactUnsealedError(self.where(ref), "was never sealed (no manifest)", remedy)
            raise ArtifactMissingError(self.where(ref), "there is no such artifact", remedy)
        self._mirror(look)
        if look.retired:
            raise ArtifactMissingError(self.where(ref), "was retired: its data was dropped on purpose", remedy)
        if problem := look.problem():
            files = self._looks.folder(look)
            raise ArtifactCorruptError(files.uri(problem[0]), problem[1], files.remedy)
        return look

    def checked(self, ref: Ref) -> Path:
        """Return the scratch folder of a sealed artifact, whole, every checksum compared once per digest.

        Raises:
            ArtifactError: as `manifest`, or a file's bytes are not what was sealed.
        """
        look = self._sealed(ref)
        self._looks.folder(look).fetch_missing(self.folder(ref), look.manifest.checksums())
        return super().checked(ref)

    def elsewhere(self, ref: Ref) -> ObjectFolder | None:
        """Return where the files of a sealed artifact are read from; None if all of them are here."""
        look = self._sealed(ref)
        here = not any(names_missing(self.folder(ref), look.manifest.checksums()))
        return None if here else self._looks.folder(look)

    def everything(self) -> list[Path]:
        """Return the scratch folder of every artifact that is sealed or retired, sorted."""

        def mirrored(key: str) -> Path | None:
            with contextlib.suppress(ArtifactError):  # `verify` tells of a manifest that is none
                if (look := self._looks.at(key)) is None:
                    return None
                self._mirror(look)
            return self.root / key

        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            return sorted(path for path in pool.map(mirrored, self._looks.sealed_keys()) if path)

    def verify_elsewhere(self, folder: Path) -> tuple[list[str], int]:
        """Read every byte of an artifact in the bucket; return what is wrong, and how many were read."""
        key = folder.relative_to(self.root).as_posix()
        try:
            look = self._looks.at(key)
        except ArtifactError as error:
            return [str(error)], 0
        if look is None:
            return [f"{self.bucket.where(key)}: was never sealed (no manifest)"], 0
        if look.retired:
            return [], 0
        files = self._looks.folder(look)
        problems = files.verify(look.manifest.checksums(), look.sizes)
        return [f"{line}. {files.remedy}" for line in problems], look.manifest.n_bytes

    def _mirror(self, look: Look) -> None:
        """Let the scratch folder of an artifact have its manifest, and nothing of another attempt."""
        folder = self.root / look.key
        if not _is_mirrored(folder, look):
            with FileLock(self._scratch / "locks" / f"mirror-{folder.name}"):
                if folder.exists() and not _is_mirrored(folder, look):
                    self._discard(folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / MANIFEST, look.manifest.model_dump_json(indent=1))
        if look.retired and not (folder / RETIRED).exists():
            super().retire(look.manifest.ref)

    # ------------------------------------------------------------ transitions

    def work(self, ref: Ref) -> Path:
        """Return where the artifact is made; what is sealed now is what the attempt is to replace."""
        if ref not in self._found_at_begin:
            look = self._looks.now(ref)
            self._found_at_begin[ref] = look.manifest.seal if look else ""
        return super().work(ref)

    def promote(self, ref: Ref) -> bool:
        """Upload a work folder that has its manifest and seal it; say whether there was one.

        A file that an interrupted upload put already is not put again. An artifact that was sealed when the
        attempt began (a forced or retired one) is replaced; one that was sealed since has won, and is used.
        """
        work = self.root / "work" / ref.name
        if not (work / MANIFEST).exists():
            return False
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        ours = read_manifest(work, ref)
        try:
            won = seals.publish(self.bucket, self._looks, work, ours, self._found_at_begin.get(ref))
        except ObjectStoreError as error:
            kept = f"{ref.name} is made and kept in {work}, and its upload goes on where it was"
            raise ObjectStoreError(error.reason, kept) from None
        self._found_at_begin.pop(ref, None)
        self._settle(ref, work, won=won)
        return True

    def adopt(self, ref: Ref, complete: Path) -> None:
        """Upload a folder that has its manifest, and seal it: a copy, whose bytes were compared as they arrived.

        What is sealed there meanwhile stays; what is retired is replaced.
        """
        manifest = read_manifest(complete, ref)
        won = seals.publish(self.bucket, self._looks, complete, manifest, None)
        self._settle(ref, complete, won=won)

    def _settle(self, ref: Ref, made: Path, *, won: bool) -> None:
        """Keep what was made here as the copy that is read, if it is what is sealed."""
        self._looks.forget()
        if not won:
            self._discard(made)
            return
        folder = self.folder(ref)
        if folder.exists():
            self._discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, folder)
        sync(folder.parent)
        sync(made.parent)

    def mark_retired(self, ref: Ref) -> None:
        """Take a sealed artifact from its readers, on this and every machine; `retire` then drops the data."""
        look = self._looks.now(ref)
        if look and not look.retired:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.bucket.write(f"{self._looks.folder(look).prefix}/{RETIRED}", json.dumps({"retired": now}).encode())
            self._looks.forget()
        if (self.folder(ref) / MANIFEST).exists():
            super().mark_retired(ref)

    def retire(self, ref: Ref) -> None:
        """Drop the data of a sealed artifact on purpose; the manifest stays to tell what was there."""
        self.mark_retired(ref)
        super().retire(ref)
        if look := self._looks.now(ref):
            prefix = self._looks.folder(look).prefix
            self.bucket.delete([f"{prefix}/{name}" for name in look.sizes if name != RETIRED])

    def quarantine(self, ref: Ref, reason: str) -> str:
        """Take a sealed artifact out of every reader's reach, and keep it for inspection, manifest first."""
        target = seals.set_aside(self.bucket, self._sealed(ref), self._looks, reason)
        self._looks.forget()
        super().discard(ref)
        return self.bucket.where(target)

    def discard(self, ref: Ref) -> None:
        """Throw an artifact away: the manifest first, so that nobody reads the rest."""
        seals.delete_artifact(self.bucket, key_of(ref))
        self._looks.forget()
        super().discard(ref)


def _is_mirrored(folder: Path, look: Look) -> bool:
    if (folder / RETIRED).exists() and not look.retired:
        return False  # made again, to the same seal
    try:
        return json.loads((folder / MANIFEST).read_bytes())["seal"] == look.manifest.seal
    except (FileNotFoundError, ValueError, KeyError):
        return False
