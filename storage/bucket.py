"""A prefix in a bucket as a place of sealed folders, with a scratch folder on this machine.

Everything is made in the scratch folder, which is laid out like a local place: work folders, locks, records of runs.
What is sealed is only in the bucket:

    <kind>/<id>/manifest.json             the seal, put under the condition that there is none
    <kind>/<id>/<attempt>/...             the files; the attempt is named after the seal's hash
    <kind>/<id>/<attempt>/retired.json    its data was dropped on purpose
    quarantine/<id>.<attempt>/...         the manifest and the reason beside the files
    runs/...  pins/...  leases/...

In the scratch folder a sealed folder has its manifest, and those of its files that were made or read here. The scratch
folder may be deleted whenever nothing runs; only what an interrupted run left in work/ would be made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from stackwise_core.stages.identity import Ref
from storage import leases
from storage.durable import write_text
from storage.errors import ArtifactError, ArtifactsFolderError, ObjectStoreError
from storage.leases import LeasedLock
from storage.local import LocalPlace
from storage.locks import FileLock, Holder
from storage.manifest import MANIFEST, RETIRED, Manifest
from storage.object_store import FEW_RETRIES, ObjectStore
from storage.place import FOLDERS, OUTCOME, PLANS_LOCK, RUNS, Entry, Leftovers, SealedFolder
from storage.remote_files import RemoteFiles, names_missing
from storage.sealed_objects import SealedObjects, files_below, is_young, leftovers
from storage.shared_records import refresh

_REQUESTS_AT_ONCE = 16


def scratch_of(uri: str) -> Path:
    """Return the scratch folder of a URI: in STACKWISE_SCRATCH, or in the user's cache folder."""
    given = os.environ.get("STACKWISE_SCRATCH")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(given) if given else Path(cache) / "stackwise"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("://")[2]).strip("-.")[:48]
    return base.absolute() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


class BucketPlace:
    """A prefix in a bucket that keeps conditional writes."""

    is_remote = True

    def __init__(self, uri: str) -> None:
        """Name it; the first operation connects."""
        self.store = ObjectStore(uri)
        self.uri = self.store.uri
        self.root = scratch_of(self.uri)
        self._sealed = SealedObjects(self.store)

    def open(self) -> None:
        """Make the scratch folder, and make sure that the store accepts writes and honours conditions."""
        self.store.check(writes=True)
        self.refresh_records()

    def check_exists(self) -> None:
        """Raise ArtifactsFolderError if nothing is below the URI, or the store does not answer."""
        self.check_reachable()
        if not self.store.folders(""):
            raise ArtifactsFolderError(f"--artifacts {self.uri}: nothing is there; `stackwise train` makes it")
        self.refresh_records()

    def check_reachable(self) -> None:
        """Raise ArtifactsFolderError if the store does not answer."""
        self.store.check(writes=False)

    @functools.cached_property
    def _scratch(self) -> LocalPlace:
        scratch = LocalPlace(self.root)
        scratch.open()
        return scratch

    @functools.cached_property
    def _few_retries(self) -> ObjectStore:
        """The store, for requests that may fail and must not hold anything up."""
        return ObjectStore(self.uri, FEW_RETRIES)

    @functools.cached_property
    def machine(self) -> str:
        """What distinguishes this scratch folder from those of other machines."""
        path = self._scratch.root / "machine"
        if not path.exists():
            with FileLock(self.root / "locks" / "machine"):
                if not path.exists():
                    write_text(path, uuid.uuid4().hex)
        return path.read_text()

    def location(self, key: str) -> str:
        """Return the URI of a key."""
        return self.store.where(key)

    def how_to_remove(self, key: str) -> str:
        """Return how a person removes a folder."""
        return f"Delete all below {self.location(key)}"

    # ------------------------------------------------------------ looking

    def look(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        """List the objects and read the manifest, if it changed; the scratch folder then mirrors it."""
        if (found := self._sealed.look(key, ref)) is not None:
            self._mirror(found)
        return found

    def _mirror(self, found: SealedFolder) -> None:
        """Give the scratch folder the manifest, and remove files of another attempt."""
        folder = self._scratch.root / found.key
        if not _is_mirrored(folder, found):
            with FileLock(self.root / "locks" / f"mirror-{folder.name}"):
                if folder.exists() and not _is_mirrored(folder, found):
                    self._scratch.trash(folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / MANIFEST, found.manifest.model_dump_json(indent=1))
        if found.retired and not (folder / RETIRED).exists():
            self._scratch.mark_retired(found)
            self._scratch.drop_data(found)

    def exists(self, key: str) -> bool:
        """Say whether any object lies below a key."""
        return bool(self.store.list(key))

    def sealed_keys(self) -> list[str]:
        """Return the keys of all artifacts that have a manifest, sorted; the scratch folder then mirrors them."""

        def has_manifest(key: str) -> bool:
            try:
                return self.look(key) is not None
            except ArtifactError:
                return True  # damaged

        keys = sorted(f"{room}/{name}" for room in FOLDERS.values() for name in self.store.folders(room))
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            return [key for key, sealed in zip(keys, pool.map(has_manifest, keys), strict=True) if sealed]

    def list(self, below: str = "") -> dict[str, Entry]:
        """Return all objects below a key."""
        return self.store.list(below)

    def read(self, path: str) -> bytes:
        """Return the bytes of an object."""
        return self.store.read(path)[0]

    def stored_manifest(self, key: str, entry: Entry) -> Manifest:
        """Return the manifest that a listing shows."""
        return self._sealed.manifest(key, entry)[1]

    def files_below(self, key: str, manifest: Manifest) -> str:
        """Return the folder of the attempt; in quarantine files lie beside the manifest."""
        return files_below(key, manifest)

    # ------------------------------------------------------------ reading

    def fetch(self, found: SealedFolder, names: Iterator[str] | None = None) -> Path:
        """Download what the scratch folder lacks, each file compared with its checksum as it arrives."""
        files, folder = found.manifest.checksums(), self._scratch.root / found.key
        self._sealed.files(found).fetch(folder, files if names is None else {name: files[name] for name in names})
        return folder

    def range_reader(self, found: SealedFolder) -> RemoteFiles | None:
        """Return the objects, unless all files are in the scratch folder."""
        here = not any(names_missing(self.root / found.key, found.manifest.checksums()))
        return None if here else self._sealed.files(found)

    def verify(self, found: SealedFolder) -> list[str]:
        """Download every byte and compare it with its checksum; nothing is kept."""
        return self._sealed.files(found).verify(found.manifest.checksums(), found.sizes)

    # ------------------------------------------------------------ changing

    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None:
        """Upload the files, then put the manifest under a condition; the scratch folder keeps what was made."""
        try:
            won = self._sealed.seal(key, work, manifest, replaces)
        except ObjectStoreError as error:
            kept = f"{manifest.ref.name} is made and kept in {work}, and its upload goes on where it was"
            raise ObjectStoreError(error.reason, kept) from None
        if won:
            self._scratch.publish(key, work, manifest, replaces)
        else:
            self._scratch.trash(work)

    def mark_retired(self, found: SealedFolder) -> None:
        """Mark it in the bucket, then here."""
        self._sealed.mark_retired(found)
        if (self.root / found.key / MANIFEST).exists():
            self._scratch.mark_retired(found)

    def drop_data(self, found: SealedFolder) -> None:
        """Delete the files here and in the bucket."""
        if (self.root / found.key).exists():
            self._scratch.drop_data(found)
        self._sealed.drop_data(found)

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        """Move it in the bucket, and delete what is here."""
        target = self._sealed.quarantine(found, reason)
        self._scratch.delete(found.key)
        return target

    def delete(self, key: str) -> None:
        """Delete it in the bucket, then here."""
        self._sealed.delete(key)
        self._scratch.delete(key)

    def trash(self, path: Path) -> None:
        """Delete something in the scratch folder."""
        self._scratch.trash(path)

    def empty_trash(self) -> None:
        """Delete what killed processes left in the scratch folder's trash."""
        self._scratch.empty_trash()

    # ------------------------------------------------------------ locks

    def lock(self, name: str, **how: Any) -> FileLock:
        """Return the lock of a name: a flock between the processes of this machine, and a lease between machines."""
        if name == "gc":  # gc of another machine goes by the plans of runs and by age
            return self._scratch.lock(name, **how)
        return LeasedLock(self._scratch.root / "locks" / name, self._few_retries, self.machine, **how)

    def lock_holder(self, name: str) -> Holder | None:
        """Return the process, of any machine, that holds a lock exclusively now."""
        return leases.holder_of(self.store, name) or self._scratch.lock_holder(name)

    def is_held(self, name: str) -> bool:
        """Say whether a process of any machine holds a lock now."""
        return leases.is_held_by_another(self.store, name, self.machine) or self._scratch.is_held(name)

    # ------------------------------------------------------------ garbage collection
    #
    # No process can lock a whole bucket, so gc goes by the plans of runs, by leases and by age. A run writes its
    # planned ids before it first looks at an artifact. Of an artifact that no run plans, gc deletes the manifest and
    # reads the records of runs again; if a run that began meanwhile plans it, the manifest is put back before a byte
    # of data was touched. A run that begins later finds no manifest, and makes the artifact like any that is absent.

    def is_young(self, modified: datetime) -> bool:
        """Say whether something is within the grace."""
        return is_young(modified)

    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return the names of live leases, exclusive and shared."""
        found = ((key.split("/"), entry) for key, entry in entries.items())
        return {key[1] for key, entry in found if key[0] == leases.FOLDER and not leases.is_stale(entry)}

    def leftovers(self, key: str, manifest: Manifest | None, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield attempts of dead writers that are not young, and data of retired artifacts."""
        return leftovers(key, manifest, entries)

    def litter(self, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield leases that were last renewed before the grace began."""
        for key, entry in sorted(entries.items()):
            if key.startswith(f"{leases.FOLDER}/") and leases.is_stale(entry) and not is_young(entry.modified):
                yield key, "a lease of the dead"

    def collect(self, path: str, is_wanted: Callable[[str], bool]) -> bool:
        """Remove it under its lock, unless it was sealed, begun or planned since it was listed."""
        room, name, *below = path.split("/")
        if room == leases.FOLDER:
            self.store.delete([path])
            return True
        lock = self.lock(PLANS_LOCK if room == RUNS else name)
        if not lock.try_acquire():
            return False  # another process makes it, or copies it there, right now
        try:
            if room == RUNS:
                removed = self._collect_run(path)
            elif below:
                removed = self._sealed.collect_leftover(f"{room}/{name}", below)
            else:
                removed = self._sealed.collect_artifact(path, is_wanted)
            if removed:
                self._scratch.delete(path)
        finally:
            lock.release()
        return removed

    def _collect_run(self, key: str) -> bool:
        """Remove the record of a run that is not live; what makes its attempts exist goes first."""
        if self.is_held(f"run-{key.split('/')[1]}"):
            return False
        found = [f"{key}/{name}" for name in self.store.list(key)]
        self.store.delete([name for name in found if name.endswith("/start.json")])
        self.store.delete(found)
        return True

    # ------------------------------------------------------------ records of runs, and pins

    def share(self, path: Path) -> None:
        """Put a file of a run. How it ended is put with few retries: a lost connection must not hold up the end."""
        store = self._few_retries if path.name == OUTCOME else self.store
        store.write(path.relative_to(self.root).as_posix(), path.read_bytes())

    def unshare(self, path: Path) -> None:
        """Delete the object of a file."""
        self.store.delete([path.relative_to(self.root).as_posix()])

    def refresh_records(self) -> None:
        """Download records and pins that differ from those here, and drop those that were removed."""
        refresh(self.store, self._scratch)


def _is_mirrored(folder: Path, found: SealedFolder) -> bool:
    if (folder / RETIRED).exists() and not found.retired:
        return False  # made again, to the same seal
    try:
        return json.loads((folder / MANIFEST).read_bytes())["seal"] == found.manifest.seal
    except (FileNotFoundError, ValueError, KeyError):
        return False
