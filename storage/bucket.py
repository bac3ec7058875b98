"""A prefix in a bucket as a place of sealed folders, with a scratch folder on this machine.

Everything is made in the scratch folder, which is laid out like a local place: work folders, locks, records of runs.
What is sealed is in the bucket alone:

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
import logging
import os
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stackwise_core.failpoints import failpoint
from stackwise_core.stages.identity import Ref
from storage import leases
from storage.durable import write_bytes, write_text
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactNewerError,
    ArtifactsFolderError,
    ObjectStoreError,
)
from storage.leases import LeasedLock
from storage.local import LocalPlace
from storage.locks import FileLock, Holder
from storage.manifest import MANIFEST, RETIRED, Manifest, parse_manifest
from storage.object_store import FEW_RETRIES, ObjectStore
from storage.place import (
    FOLDERS,
    OUTCOME,
    PINS,
    PLANS_LOCK,
    QUARANTINE,
    REASON,
    RUNS,
    Entry,
    Leftovers,
    SealedFolder,
)
from storage.remote_files import RemoteFiles, names_missing

GRACE = timedelta(hours=24)
"""What is younger stays: the record of its run may not be visible yet, or it may still be uploaded."""
_REQUESTS_AT_ONCE = 16
_log = logging.getLogger(__name__)


def clock() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


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
        self._manifests: dict[str, tuple[Entry, Manifest]] = {}

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
        if (found := self._look(key, ref)) is not None:
            self._mirror(found)
        return found

    def _look(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        while True:
            listed = self.store.list(key)
            if MANIFEST not in listed:
                return None
            try:
                entry, manifest = self._manifest(key, listed[MANIFEST], ref)
            except FileNotFoundError:
                continue  # deleted in between
            if entry.version == listed[MANIFEST].version:  # else it was replaced in between
                break
        below = self.files_below(key, manifest)
        sizes = {name[len(below) :]: each.size for name, each in listed.items() if name.startswith(below)}
        return SealedFolder(key, manifest, sizes, RETIRED in sizes, entry.version)

    def _manifest(self, key: str, listed: Entry, ref: Ref | None = None) -> tuple[Entry, Manifest]:
        """Return a manifest that a listing shows and its entry; one that did not change is read once."""
        known = self._manifests.get(key)
        if known is None or known[0].version != listed.version or (ref is not None and known[1].ref != ref):
            path = f"{key}/{MANIFEST}"
            data, entry = self.store.read(path)
            manifest = parse_manifest(data, self.location(path), f"all below {self.location(key)}", ref)
            known = self._manifests[key] = entry, manifest
        return known

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
        return self._manifest(key, entry)[1]

    def files_below(self, key: str, manifest: Manifest) -> str:
        """Return the folder of the attempt; in quarantine files lie beside the manifest."""
        return "" if key.startswith(f"{QUARANTINE}/") else f"{manifest.attempt}/"

    # ------------------------------------------------------------ reading

    def _files(self, found: SealedFolder) -> RemoteFiles:
        return RemoteFiles(self.store, found.key, f"{found.key}/{self.files_below(found.key, found.manifest)}")

    def fetch(self, found: SealedFolder, names: Iterator[str] | None = None) -> Path:
        """Download what the scratch folder lacks, each file compared with its checksum as it arrives."""
        files, folder = found.manifest.checksums(), self._scratch.root / found.key
        self._files(found).fetch(folder, files if names is None else {name: files[name] for name in names})
        return folder

    def range_reader(self, found: SealedFolder) -> RemoteFiles | None:
        """Return the objects, unless all files are in the scratch folder."""
        here = not any(names_missing(self.root / found.key, found.manifest.checksums()))
        return None if here else self._files(found)

    def verify(self, found: SealedFolder) -> list[str]:
        """Download every byte and compare it with its checksum; nothing is kept."""
        return self._files(found).verify(found.manifest.checksums(), found.sizes)

    # ------------------------------------------------------------ changing

    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None:
        """Upload the files, then put the manifest under a condition; the scratch folder keeps what was made."""
        try:
            won = self._upload_and_seal(key, work, manifest, replaces)
        except ObjectStoreError as error:
            kept = f"{manifest.ref.name} is made and kept in {work}, and its upload goes on where it was"
            raise ObjectStoreError(error.reason, kept) from None
        if won:
            self._scratch.publish(key, work, manifest, replaces)
        else:
            self._scratch.trash(work)

    def _upload_and_seal(self, key: str, work: Path, ours: Manifest, replaces: str | None) -> bool:
        """Say whether `ours` is what is sealed at the end; if not, another machine sealed the key meanwhile."""
        before, damaged = self._look_before_sealing(key)
        is_ours = before is not None and before.manifest.seal == ours.seal
        if before and not is_ours and not before.retired and before.manifest.seal != replaces:
            return self._lost(key, ours, before)
        files = RemoteFiles(self.store, key, f"{key}/{ours.attempt}/")
        there = {name: entry.size for name, entry in self.store.list(f"{key}/{ours.attempt}").items()}
        if (work / RETIRED).exists():  # a copy of an artifact that is retired where it comes from
            self.store.write(f"{files.prefix}{RETIRED}", (work / RETIRED).read_bytes())
        else:
            files.upload(work, ours.checksums(), there, f"upload-{ours.ref.kind}")
            self.store.delete([f"{files.prefix}{RETIRED}"] if RETIRED in there else [])
        if is_ours:
            return True
        data = (work / MANIFEST).read_bytes()
        version = before.version if before else damaged
        if version is None:
            self.store.create(f"{key}/{MANIFEST}", data)
        else:
            self.store.replace(f"{key}/{MANIFEST}", data, version)
        # Do not go by the answer: a request that was repeated on a lost connection may have met its own first success.
        after = self._look(key, ours.ref)
        if after is None or after.manifest.seal != ours.seal:
            self.store.delete_below(f"{key}/{ours.attempt}")
            return self._lost(key, ours, after)
        if before:
            self.store.delete_below(f"{key}/{before.manifest.attempt}")
        return True

    def _look_before_sealing(self, key: str) -> tuple[SealedFolder | None, Any]:
        """Return what is sealed under a key, and the version of a manifest that is damaged and may be replaced."""
        try:
            return self._look(key), None
        except ArtifactNewerError:
            raise
        except ArtifactCorruptError:
            entry = self.store.list(key).get(MANIFEST)
            return None, entry.version if entry else None

    def _lost(self, key: str, ours: Manifest, theirs: SealedFolder | None) -> bool:
        """Warn if another machine made other bytes from the same recipe."""
        if theirs and theirs.manifest.digest != ours.digest:
            _log.warning(
                "%s was sealed by another machine with other bytes (digest %s, here %s), and is used as it is there: "
                "another version, device or number of threads computes other bits",
                self.location(key),
                theirs.manifest.digest[:12],
                ours.digest[:12],
            )
        return False

    def mark_retired(self, found: SealedFolder) -> None:
        """Put the marker inside the attempt, so that an artifact that is made again is not retired by it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.store.write(f"{self._files(found).prefix}{RETIRED}", json.dumps({"retired": now}).encode())
        if (self.root / found.key / MANIFEST).exists():
            self._scratch.mark_retired(found)

    def drop_data(self, found: SealedFolder) -> None:
        """Delete the files here and in the bucket, all but the manifest and the marker."""
        if (self.root / found.key).exists():
            self._scratch.drop_data(found)
        prefix = self._files(found).prefix
        self.store.delete([f"{prefix}{name}" for name in found.sizes if name != RETIRED])

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        """Move the objects to quarantine/, the manifest first."""
        target = f"{QUARANTINE}/{found.manifest.ref.name}.{found.manifest.attempt}"
        self.store.write(f"{target}/{REASON}", (reason + "\n").encode())
        self.store.move(f"{found.key}/{MANIFEST}", f"{target}/{MANIFEST}")
        prefix = self._files(found).prefix
        for name in found.sizes:
            self.store.move(f"{prefix}{name}", f"{target}/{name}")
        self._scratch.delete(found.key)
        return target

    def delete(self, key: str) -> None:
        """Delete the manifest, then the rest, then what the scratch folder has of it."""
        self.store.delete([f"{key}/{MANIFEST}"])
        self.store.delete_below(key)
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
    # Nobody can have a bucket to himself, so gc goes by the plans of runs, by leases and by age. A run writes its
    # planned ids before it first looks at an artifact. Of an artifact that no run plans, gc deletes the manifest and
    # reads the records of runs again; if a run that began meanwhile plans it, the manifest is put back before a byte
    # of data was touched. A run that begins later finds no manifest, and makes the artifact like any that is absent.

    def is_young(self, modified: datetime) -> bool:
        """Say whether something is within the grace, by the store's clock, which may differ by minutes from ours."""
        return clock() - modified < GRACE

    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]:
        """Return the names of live leases, exclusive and shared."""
        found = ((key.split("/"), entry) for key, entry in entries.items())
        return {key[1] for key, entry in found if key[0] == leases.FOLDER and not leases.is_stale(entry)}

    def leftovers(self, key: str, manifest: Manifest | None, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield attempts of dead writers that are not young, and data of retired artifacts."""
        own = self.files_below(key, manifest) if manifest else None
        newest: dict[str, datetime] = defaultdict(lambda: datetime.min.replace(tzinfo=UTC))
        for name, entry in entries.items():
            attempt = name.partition("/")[0]
            if name != MANIFEST and f"{attempt}/" != own:
                newest[attempt] = max(newest[attempt], entry.modified)
        for attempt, modified in sorted(newest.items()):
            if not self.is_young(modified):
                yield f"{key}/{attempt}", "left by a dead writer"
        if own and f"{own}{RETIRED}" in entries:
            data = sorted(name for name in entries if name.startswith(own) and name != f"{own}{RETIRED}")
            yield from ((f"{key}/{name}", "data of a retired artifact") for name in data)

    def litter(self, entries: Mapping[str, Entry]) -> Leftovers:
        """Yield leases that were last renewed before the grace began."""
        for key, entry in sorted(entries.items()):
            if key.startswith(f"{leases.FOLDER}/") and leases.is_stale(entry) and not self.is_young(entry.modified):
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
                removed = self._collect_leftover(f"{room}/{name}", below)
            else:
                removed = self._collect_artifact(path, is_wanted)
            if removed:
                self._scratch.delete(path)
        finally:
            lock.release()
        return removed

    def _collect_run(self, key: str) -> bool:
        """Remove the record of a run that nobody began again; what makes its attempts exist goes first."""
        if self.is_held(f"run-{key.split('/')[1]}"):
            return False
        found = [f"{key}/{name}" for name in self.store.list(key)]
        self.store.delete([name for name in found if name.endswith("/start.json")])
        self.store.delete(found)
        return True

    def _collect_leftover(self, key: str, below: list[str]) -> bool:
        """Remove an attempt, or a file of a retired one, unless it was sealed since."""
        found = self._look(key)
        if found is not None and below[0] == found.manifest.attempt and (len(below) == 1 or not found.retired):
            return False
        path = "/".join((key, *below))
        self.store.delete([path])
        self.store.delete_below(path)
        return True

    def _collect_artifact(self, key: str, is_wanted: Callable[[str], bool]) -> bool:
        """Delete the manifest, ask again, and then either put it back or delete the data."""
        manifest = f"{key}/{MANIFEST}"
        try:
            data, entry = self.store.read(manifest)
        except FileNotFoundError:
            return True  # another gc was first
        if self.is_young(entry.modified):
            return False  # sealed anew since it was listed
        self.store.delete([manifest])
        failpoint("gc-data", 0)
        if is_wanted(key.split("/")[1]):
            self.store.create(manifest, data)
            return False
        self.store.delete_below(key)
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
        """Download records and pins that are not here as they are in the bucket, and drop those that were removed.

        A file has the time of the object it was downloaded from, so that it is not downloaded twice.
        """
        root = self._scratch.root
        for folder in (RUNS, PINS):
            listed = {f"{folder}/{name}": entry for name, entry in self.store.list(folder).items() if _is_safe(name)}
            self._download([name for name, entry in listed.items() if not _is_here(root / name, entry)])
            self._drop_removed(folder, listed.keys())

    def _download(self, names: list[str]) -> None:
        """Download some records, start.json last: an attempt exists with it."""

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

    def _drop_removed(self, folder: str, listed: Set[str]) -> None:
        """Remove pins and attempts that are not in the bucket, except those of runs that begin or live here."""
        begins = self._scratch.is_held(PLANS_LOCK)
        for path in (self.root / folder).glob("*.json" if folder == PINS else "*/attempts/*/start.json"):
            if path.relative_to(self.root).as_posix() in listed:
                continue
            if folder == PINS:
                path.unlink(missing_ok=True)
            elif not begins and not self._scratch.is_held(f"run-{path.parents[2].name}"):
                shutil.rmtree(path.parent, ignore_errors=True)


def _is_mirrored(folder: Path, found: SealedFolder) -> bool:
    if (folder / RETIRED).exists() and not found.retired:
        return False  # made again, to the same seal
    try:
        return json.loads((folder / MANIFEST).read_bytes())["seal"] == found.manifest.seal
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _is_here(path: Path, entry: Entry) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_size == entry.size and found.st_mtime == entry.modified.timestamp()


def _is_safe(name: str) -> bool:
    """Say whether a key names a place below the folder: a bucket may hold anything."""
    return not {"", ".", ".."} & set(name.split("/"))
