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

What an operation promises is said in `place.Place`; here is only what is special to a bucket.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stackwise_core.stages.identity import Ref
from storage import leases
from storage.errors import ArtifactError, ArtifactsFolderError, ObjectStoreError
from storage.files import write_bytes, write_text
from storage.leases import LeasedLock
from storage.local import LocalPlace, trash
from storage.locks import FileLock, Holder
from storage.manifest import MANIFEST, Manifest
from storage.object_store import FEW_RETRIES, ObjectStore
from storage.place import FOLDERS, OUTCOME, PINS, PLANS_LOCK, RUNS, Entry, Leftovers, SealedFolder
from storage.retirement import RETIRED
from storage.sealed_objects import RemoteFiles, SealedObjects, files_below, is_young, leftovers, names_missing

_REQUESTS_AT_ONCE = 16


def _scratch_of(uri: str) -> Path:
    """Return the scratch folder of a URI: in STACKWISE_SCRATCH, or in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(os.environ.get("STACKWISE_SCRATCH") or Path(cache, "stackwise"))
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("://")[2]).strip("-.")[:48]
    return base.absolute() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


class BucketPlace:
    """A prefix in a bucket that keeps conditional writes."""

    is_remote = True
    files_below, is_young, leftovers = staticmethod(files_below), staticmethod(is_young), staticmethod(leftovers)

    def __init__(self, uri: str) -> None:
        """Name it; the first operation connects."""
        self.store = ObjectStore(uri)
        self.uri = self.store.uri
        self.root = _scratch_of(self.uri)
        self._sealed = SealedObjects(self.store)

    def open(self) -> None:
        self.store.check(writes=True)
        self.refresh_records()

    def check_exists(self) -> None:
        self.check_reachable()
        if not self.store.folders(""):
            raise ArtifactsFolderError(f"--artifacts {self.uri}: nothing is there; `stackwise train` makes it")
        self.refresh_records()

    def check_reachable(self) -> None:
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
        return self.store.where(key)

    def how_to_remove(self, key: str) -> str:
        return f"Delete all below {self.location(key)}"

    # ------------------------------------------------------------ what is there

    def find(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        """Return a sealed folder as it is now, which the scratch folder then mirrors."""
        if (found := self._sealed.find(key, ref)) is not None:
            self._mirror(found)
        return found

    def _mirror(self, found: SealedFolder) -> None:
        """Give the scratch folder the manifest, and remove files of another attempt."""
        folder = self._scratch.root / found.key
        if not _is_mirrored(folder, found):
            with FileLock(self.root / "locks" / f"mirror-{folder.name}"):
                if folder.exists() and not _is_mirrored(folder, found):
                    trash(self.root, folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / MANIFEST, found.manifest.model_dump_json(indent=1))
        if found.retired and not (folder / RETIRED).exists():
            with contextlib.suppress(FileNotFoundError):  # it is being made again
                self._scratch.mark_retired(found, self._sealed.retired_marker(found))
                self._scratch.drop_data(found)

    def sealed_keys(self) -> list[str]:
        def has_manifest(key: str) -> bool:
            try:
                return self.find(key) is not None
            except ArtifactError:
                return True  # damaged

        keys = sorted(f"{room}/{name}" for room in FOLDERS.values() for name in self.store.folders(room))
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            return [key for key, sealed in zip(keys, pool.map(has_manifest, keys), strict=True) if sealed]

    def list(self, below: str = "") -> dict[str, Entry]:
        return self.store.list(below)

    def read(self, path: str) -> bytes:
        return self.store.read(path)[0]

    def listed_manifest(self, key: str, entry: Entry) -> Manifest:
        return self._sealed.manifest(key, entry)[1]

    # ------------------------------------------------------------ reading

    def fetch(self, found: SealedFolder, names: Iterable[str] | None = None) -> Path:
        """Download what the scratch folder lacks, each file compared with its checksum as it arrives."""
        files, folder = found.manifest.checksums(), self._scratch.root / found.key
        self._sealed.files(found).fetch(folder, files if names is None else {name: files[name] for name in names})
        return folder

    def range_reader(self, found: SealedFolder) -> RemoteFiles | None:
        here = not any(names_missing(self.root / found.key, found.manifest.checksums()))
        return None if here else self._sealed.files(found)

    def verify(self, found: SealedFolder) -> list[str]:
        return self._sealed.files(found).verify(found.manifest.checksums(), found.sizes)

    # ------------------------------------------------------------ changing

    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None:
        """Upload the work folder; the scratch folder keeps what was made."""
        try:
            won = self._sealed.seal(key, work, manifest, replaces)
        except ObjectStoreError as error:
            kept = f"{manifest.ref.name} is made and kept in {work}, and its upload goes on where it was"
            raise ObjectStoreError(error.reason, kept) from None
        if won:
            self._scratch.publish(key, work, manifest, replaces)
        else:
            trash(self.root, work)

    def is_retired(self, key: str, manifest: Manifest) -> bool:
        return self._sealed.is_retired(key, manifest)

    def mark_retired(self, found: SealedFolder, marker: str) -> None:
        self._sealed.mark_retired(found, marker)
        if (self.root / found.key / MANIFEST).exists():
            self._scratch.mark_retired(found, marker)

    def drop_data(self, found: SealedFolder) -> None:
        if (self.root / found.key).exists():
            self._scratch.drop_data(found)
        self._sealed.drop_data(found)

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        target = self._sealed.quarantine(found, reason)
        self._scratch.delete(found.key)
        return target

    def delete(self, key: str) -> None:
        self._sealed.delete(key)
        self._scratch.delete(key)

    # ------------------------------------------------------------ locks

    def lock(self, name: str, **how: Any) -> FileLock:
        """Return the lock of a name: a flock between the processes of this machine, and a lease between machines."""
        if name == "gc":  # gc of another machine goes by the plans of runs and by age
            return self._scratch.lock(name, **how)
        return LeasedLock(self._scratch.root / "locks" / name, self._few_retries, self.machine, **how)

    def lock_holder(self, name: str) -> Holder | None:
        return leases.holder_of(self.store, name) or self._scratch.lock_holder(name)

    def is_held(self, name: str) -> bool:
        return leases.is_held_by_another(self.store, name, self.machine) or self._scratch.is_held(name)

    # ------------------------------------------------------------ garbage collection
    #
    # No process can lock a whole bucket, so gc goes by the plans of runs, by leases and by age. A run writes its
    # planned ids before it first looks up an artifact. Of an artifact that no run plans, gc deletes the manifest and
    # reads the records of runs again; if a run that began meanwhile plans it, the manifest is put back before any
    # data was touched. A run that begins later finds no manifest, and makes the artifact like any that is absent.

    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]:
        found = ((key.split("/"), entry) for key, entry in entries.items())
        return {key[1] for key, entry in found if key[0] == leases.FOLDER and not leases.is_stale(entry)}

    def litter(self, entries: Mapping[str, Entry]) -> Leftovers:
        for key, entry in sorted(entries.items()):
            if key.startswith(f"{leases.FOLDER}/") and leases.is_stale(entry) and not is_young(entry.modified):
                yield key, "a lease of a dead process"

    def collect(self, path: str, is_wanted: Callable[[str], bool]) -> bool:
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
        """Remove the record of a run that is not live; start.json goes first, without which no attempt exists."""
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
        self.store.delete([path.relative_to(self.root).as_posix()])

    def refresh_records(self) -> None:
        """Download records that differ from those here, and drop those that other machines removed."""
        for folder in (RUNS, PINS):
            here = self._scratch.list(folder)
            listed = {name: entry for name, entry in self.store.list(folder).items() if _is_safe(name)}
            stale = [name for name, entry in listed.items() if name not in here or here[name][:2] != entry[:2]]
            self._download([f"{folder}/{name}" for name in stale])
            self._drop_removed(folder, here.keys() - listed.keys())

    def _download(self, names: list[str]) -> None:
        """Download some records, start.json last: without it an attempt does not exist.

        A file gets the time of its object, so that it is not downloaded twice.
        """

        def download(name: str) -> None:
            try:
                data, entry = self.store.read(name)
            except FileNotFoundError:
                return  # deleted since
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
            os.utime(path, (entry.modified.timestamp(), entry.modified.timestamp()))

        last = [name for name in names if name.endswith("/start.json")]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            for some in ([name for name in names if name not in last], last):
                list(pool.map(download, some))

    def _drop_removed(self, folder: str, names: Set[str]) -> None:
        """Remove pins and attempts that are not in the bucket, except those of runs that begin or live here."""
        begins = self._scratch.is_held(PLANS_LOCK)
        for path in (self.root / folder / name for name in names):
            if folder == PINS and path.suffix == ".json":
                path.unlink(missing_ok=True)
            elif path.name == "start.json" and not begins and not self._scratch.is_held(f"run-{path.parents[2].name}"):
                shutil.rmtree(path.parent, ignore_errors=True)


def _is_safe(name: str) -> bool:
    """Say whether a name stays below its folder: a bucket may hold anything."""
    return not {"", ".", ".."} & set(name.split("/"))


def _is_mirrored(folder: Path, found: SealedFolder) -> bool:
    if (folder / RETIRED).exists() and not found.retired:
        return False  # made again, to the same seal
    try:
        return json.loads((folder / MANIFEST).read_bytes())["seal"] == found.manifest.seal
    except (FileNotFoundError, ValueError, KeyError):
        return False
