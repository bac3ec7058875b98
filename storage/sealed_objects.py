"""The sealed folders of a bucket, as objects: independent of this machine's scratch folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_core.failpoints import failpoint
from stackwise_core.files import sync
from stackwise_core.stages.identity import Ref
from storage.errors import AGAIN, ArtifactCorruptError, ArtifactNewerError
from storage.files import NOT_LISTED, TEMPORARY_SUFFIX, Files, explain_full_disk
from storage.manifest import MANIFEST, Manifest, parse_manifest
from storage.object_store import ObjectStore
from storage.place import QUARANTINE, REASON, Entry, Leftovers, SealedFolder
from storage.retirement import RETIRABLE, RETIRED, states_retirement

GRACE = timedelta(hours=24)
"""gc keeps what is younger: the record of its run may not be visible yet, or its upload may not be finished."""
_FILES_AT_ONCE = 4
_log = logging.getLogger(__name__)


def clock() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def is_young(modified: datetime) -> bool:
    """Say whether something is within the grace, by the store's clock, which may differ by minutes from ours."""
    return clock() - modified < GRACE


def files_below(key: str, manifest: Manifest) -> str:
    """Return the folder of the attempt; in quarantine files lie beside the manifest."""
    return "" if key.startswith(f"{QUARANTINE}/") else f"{manifest.attempt}/"


class RemoteFiles:
    """The files of one sealed folder: the objects below a prefix, by their names relative to it."""

    def __init__(self, store: ObjectStore, key: str, prefix: str) -> None:
        """Give the key of the sealed folder, and the prefix of its files, which ends in '/'."""
        self._store, self.prefix = store, prefix
        self.artifact_uri = store.where(key)

    def uri(self, name: str) -> str:
        """Return what messages call a file."""
        return self._store.where(f"{self.prefix}{name}")

    def ranges(self, name: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]:
        """Return ranges of one file; see `ObjectStore.ranges`."""
        return self._store.ranges(f"{self.prefix}{name}", offsets, n_bytes)

    def upload(self, folder: Path, files: Files, there: Mapping[str, int], task: str) -> None:
        """Put the files of a work folder, except those that are `there`, by name and size.

        Objects are put atomically, and the prefix is named after the hash of all checksums: an object of the same
        name and size is the same file. `task` is a failpoint after each file.
        """
        missing = [name for name, (size, _) in files.items() if there.get(name) != size]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            puts = [pool.submit(self._store.write, f"{self.prefix}{name}", folder / name) for name in missing]
            try:
                for number, put in enumerate(as_completed(puts), 1):
                    put.result()
                    failpoint(task, number)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def fetch(self, folder: Path, files: Files) -> None:
        """Download the files that a local folder lacks, comparing each with its checksum."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            fetches = [
                pool.submit(self._fetch_file, folder, name, *files[name]) for name in names_missing(folder, files)
            ]
            for fetch in fetches:
                fetch.result()

    def _fetch_file(self, folder: Path, name: str, size: int, checksum: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        remedy = f"Delete all below {self.artifact_uri} and {AGAIN}"
        try:
            with explain_full_disk(path, size), temporary.open("wb") as file:
                now = self._checksum(name, size, file.write)
            if problem := _difference(temporary.stat().st_size, now, size, checksum):
                raise ArtifactCorruptError(self.uri(name), problem, remedy)
            sync(temporary)
            os.replace(temporary, path)
        except FileNotFoundError as error:
            if error.filename != self.uri(name):
                raise
            raise ArtifactCorruptError(self.uri(name), "is missing from a sealed artifact", remedy) from None
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)

    def _checksum(self, name: str, n_bytes: int, keep: Callable[[memoryview], object] | None = None) -> str:
        """Read a file from its beginning, hand its bytes to `keep`, and return their checksum."""
        state = hashlib.sha256()
        for block in self._store.blocks(f"{self.prefix}{name}", n_bytes):
            state.update(block.data)
            if keep is not None:
                keep(block.data)
        return f"sha256:{state.hexdigest()}"

    def verify(self, files: Files, there: Mapping[str, int]) -> list[str]:
        """Read every byte of the objects `there`; return a line per file that is missing, differs, or is not listed."""
        problems: list[str] = []
        for name, (size, checksum) in sorted(files.items()):
            if name not in there:
                problems.append(f"{self.uri(name)}: missing")
            elif problem := _difference(there[name], self._checksum(name, there[name]), size, checksum):
                problems.append(f"{self.uri(name)}: {problem}")
        return problems + [f"{self.uri(name)}: {NOT_LISTED}" for name in sorted(there.keys() - files.keys())]


def _difference(found: int, now: str, size: int, checksum: str) -> str:
    """Say how a file differs from its seal; '' if it does not."""
    if found != size:
        return f"{found:,} bytes, sealed with {size:,}"
    return "" if now == checksum else f"checksum {now}, sealed with {checksum}"


def names_missing(folder: Path, files: Files) -> Iterable[str]:
    """Yield the files that are not in a local folder in their size."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            yield name


class SealedObjects:
    """Finds sealed folders, seals, marks and removes them; operations that `Place` has too promise the same."""

    def __init__(self, store: ObjectStore) -> None:
        """Use a store."""
        self.store = store
        self._manifests: dict[str, tuple[Entry, Manifest]] = {}

    def find(self, key: str, ref: Ref | None = None) -> SealedFolder | None:
        """List the objects of a folder, and read its manifest if it changed; see `Place.find`."""
        while True:
            listed = self.store.list(key)
            if MANIFEST not in listed:
                return None
            try:
                entry, manifest = self.manifest(key, listed[MANIFEST], ref)
            except FileNotFoundError:
                continue  # deleted in between
            if entry.version == listed[MANIFEST].version:  # else it was replaced in between
                break
        below = files_below(key, manifest)
        sizes = {name[len(below) :]: each.size for name, each in listed.items() if name.startswith(below)}
        retired = RETIRED in sizes and self.is_retired(key, manifest)
        return SealedFolder(key, manifest, sizes, retired, entry.version)

    def is_retired(self, key: str, manifest: Manifest) -> bool:
        """Say whether the marker in an attempt is a statement that it was retired."""
        if manifest.ref.kind not in RETIRABLE:
            return False
        try:
            return states_retirement(self.store.read(f"{key}/{files_below(key, manifest)}{RETIRED}")[0], manifest)
        except FileNotFoundError:
            return False  # it is being made again

    def manifest(self, key: str, listed: Entry, ref: Ref | None = None) -> tuple[Entry, Manifest]:
        """Return a manifest that a listing shows and its entry; one that did not change is read once."""
        known = self._manifests.get(key)
        if known is None or known[0].version != listed.version or (ref is not None and known[1].ref != ref):
            path = f"{key}/{MANIFEST}"
            data, entry = self.store.read(path)
            manifest = parse_manifest(data, self.store.where(path), f"all below {self.store.where(key)}", ref)
            known = self._manifests[key] = entry, manifest
        return known

    def files(self, found: SealedFolder) -> RemoteFiles:
        """Return the files of a sealed folder."""
        return RemoteFiles(self.store, found.key, f"{found.key}/{files_below(found.key, found.manifest)}")

    # ------------------------------------------------------------ changing

    def seal(self, key: str, work: Path, ours: Manifest, replaces: str | None) -> bool:
        """Upload a work folder, then put its manifest under a condition; see `Place.publish`.

        Returns whether `ours` is sealed at the end; if not, another machine sealed the key meanwhile.
        """
        before, damaged = self._find_before_sealing(key)
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
        # The answer does not count: a request that was repeated on a lost connection may have met its own success.
        after = self.find(key, ours.ref)
        if after is None or after.manifest.seal != ours.seal:
            self.store.delete_below(f"{key}/{ours.attempt}")
            return self._lost(key, ours, after)
        if before:
            self.store.delete_below(f"{key}/{before.manifest.attempt}")
        return True

    def _find_before_sealing(self, key: str) -> tuple[SealedFolder | None, Any]:
        """Return what is sealed under a key, and the version of a manifest that is damaged and may be replaced."""
        try:
            return self.find(key), None
        except ArtifactNewerError:
            raise
        except ArtifactCorruptError:
            entry = self.store.list(key).get(MANIFEST)
            return None, entry.version if entry else None

    def _lost(self, key: str, ours: Manifest, theirs: SealedFolder | None) -> bool:
        """Return False, and warn if another machine made other bytes from the same recipe."""
        if theirs and theirs.manifest.digest != ours.digest:
            _log.warning(
                "%s was sealed by another machine with other bytes (digest %s, here %s), and is used as it is there: "
                "another version, device or number of threads computes other bits",
                self.store.where(key),
                theirs.manifest.digest[:12],
                ours.digest[:12],
            )
        return False

    def mark_retired(self, found: SealedFolder, marker: str) -> None:
        """Put the marker inside the attempt, so that an artifact that is made again is not retired by it."""
        self.store.write(f"{self.files(found).prefix}{RETIRED}", marker.encode())

    def retired_marker(self, found: SealedFolder) -> str:
        """Return the marker of a retired artifact."""
        return self.store.read(f"{self.files(found).prefix}{RETIRED}")[0].decode()

    def drop_data(self, found: SealedFolder) -> None:
        """Delete the files, all but the marker."""
        prefix = self.files(found).prefix
        self.store.delete([f"{prefix}{name}" for name in found.sizes if name != RETIRED])

    def quarantine(self, found: SealedFolder, reason: str) -> str:
        """Move the objects to quarantine/, the manifest first, and return the key there."""
        target = f"{QUARANTINE}/{found.manifest.ref.name}.{found.manifest.attempt}"
        self.store.write(f"{target}/{REASON}", (reason + "\n").encode())
        self.store.move(f"{found.key}/{MANIFEST}", f"{target}/{MANIFEST}")
        prefix = self.files(found).prefix
        for name in found.sizes:
            self.store.move(f"{prefix}{name}", f"{target}/{name}")
        return target

    def delete(self, key: str) -> None:
        """Delete the manifest, so that no reader sees the rest, then the rest."""
        self.store.delete([f"{key}/{MANIFEST}"])
        self.store.delete_below(key)

    # ------------------------------------------------------------ garbage collection, under the lock of the artifact

    def collect_leftover(self, key: str, below: list[str]) -> bool:
        """Remove an attempt, or a file of a retired one, unless it was sealed since."""
        found = self.find(key)
        if found is not None and below[0] == found.manifest.attempt and (len(below) == 1 or not found.retired):
            return False
        path = "/".join((key, *below))
        self.store.delete([path])
        self.store.delete_below(path)
        return True

    def collect_artifact(self, key: str, is_wanted: Callable[[str], bool]) -> bool:
        """Delete the manifest, ask again whether a run plans it, and put the manifest back or delete the data."""
        manifest = f"{key}/{MANIFEST}"
        try:
            data, entry = self.store.read(manifest)
        except FileNotFoundError:
            return True  # another gc was first
        if is_young(entry.modified):
            return False  # sealed anew since it was listed
        self.store.delete([manifest])
        failpoint("gc-data", 0)
        if is_wanted(key.split("/")[1]):
            self.store.create(manifest, data)
            return False
        self.store.delete_below(key)
        return True


def leftovers(key: str, manifest: Manifest | None, entries: Mapping[str, Entry], retired: bool) -> Leftovers:
    """Yield attempts of dead writers that are not young, and data of retired artifacts."""
    own = files_below(key, manifest) if manifest else None
    newest: dict[str, datetime] = defaultdict(lambda: datetime.min.replace(tzinfo=UTC))
    for name, entry in entries.items():
        attempt = name.partition("/")[0]
        if name != MANIFEST and f"{attempt}/" != own:
            newest[attempt] = max(newest[attempt], entry.modified)
    for attempt, modified in sorted(newest.items()):
        if not is_young(modified):
            yield f"{key}/{attempt}", "left by a dead writer"
    if own and retired:
        data = sorted(name for name in entries if name.startswith(own) and name != f"{own}{RETIRED}")
        yield from ((f"{key}/{name}", "data of a retired artifact") for name in data)
