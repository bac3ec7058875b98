"""What a place of sealed folders can do. A folder (`local.py`) and a bucket (`bucket.py`) are siblings behind it.

A *key* names a sealed folder: its room and its name, such as 'stacks/stack-0-0123456789ab'. What is being made, locks
and the records of runs lie in `root`, a folder of this machine: for a local place it is the place itself, for a bucket
a scratch folder, in which each sealed folder is mirrored as far as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from stackwise_core.stages.identity import Kind, Ref
from storage.locks import FileLock, Holder
from storage.manifest import Manifest

FOLDERS: dict[Kind, str] = {
    "data": "data",
    "build": "builds",
    "trunk": "trunks",
    "stack": "stacks",
    "optimizer": "optimizers",
    "cooldown": "cooldowns",
    "activations": "activations",
    "validation": "validations",
}
"""Kind of artifact -> the room it is kept in; each kind comes after those that it is made from."""
RUNS, PINS, QUARANTINE = "runs", "pins", "quarantine"
COMPARISONS = "comparisons"
"""Pages and tables of what runs were compared, and the logs of those; nothing reads them but people."""
REASON = "reason.txt"
"""Why a folder is in quarantine."""
OUTCOME = "outcome.json"
"""How an attempt of a run ended."""
PLANS_LOCK = "plans"
"""Held while a run writes what it will read, and while a process decides whether to retire a store."""


def key_of(ref: Ref) -> str:
    """Return the key of an artifact."""
    return f"{FOLDERS[ref.kind]}/{ref.name}"


Leftovers = Iterator[tuple[str, str]]
"""Paths relative to the place, and why each may go."""


class Entry(NamedTuple):
    """One stored file."""

    size: int
    modified: datetime
    version: Any = None
    """What a conditional write to an object store compares."""


@dataclass(frozen=True)
class SealedFolder:
    """A folder with a manifest, as it was when it was looked up."""

    key: str
    manifest: Manifest
    sizes: Mapping[str, int]
    """Sizes [bytes] of the files that are there."""
    retired: bool
    """Whether its data was dropped on purpose."""
    version: Any = None
    """Of the stored manifest."""

    def problem(self) -> tuple[str, str] | None:
        """Return a listed file that is missing or has another size, and what is wrong with it."""
        for name, sealed in self.manifest.files.items():
            if name not in self.sizes:
                return name, "is missing from a sealed artifact"
            if self.sizes[name] != sealed.size:
                return name, f"has {self.sizes[name]:,} bytes, sealed with {sealed.size:,}"
        return None


class RangeReader(Protocol):
    """The files of a sealed folder that are not on this machine."""

    # What messages call the artifact.
    @property
    def artifact_uri(self) -> str: ...

    # Return what messages call a file.
    def uri(self, name: str) -> str: ...

    # Return ranges of one file, each uint8 [n_bytes], shorter past the end of the file.
    def ranges(self, name: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]: ...


class Place(Protocol):
    """Sealed folders, and the locks and policies that protect them. Implementations are thread-safe."""

    # Whether `root` is only a scratch folder, so that gc goes by plans, leases and age instead of a lock.
    is_remote: bool

    # Folder of this machine in which things are made and read.
    root: Path

    # What `--artifacts` takes to come here, from any working folder.
    uri: str

    # Create what is missing. Raises ArtifactsFolderError if artifacts cannot be sealed here.
    def open(self) -> None: ...

    # Raise ArtifactsFolderError if nothing is here.
    def check_exists(self) -> None: ...

    # Raise ArtifactsFolderError if nothing can be looked up here.
    def check_reachable(self) -> None: ...

    # Return what messages call a key, or a file below one.
    def location(self, key: str) -> str: ...

    # Return the beginning of a remedy: how a person removes a damaged folder.
    def how_to_remove(self, key: str) -> str: ...

    # ------------------------------------------------------------ what is there

    # Return a sealed folder as it is now; None if it has no manifest.
    # Raises ArtifactCorruptError if the manifest cannot be trusted, or is not that of `ref`.
    def find(self, key: str, ref: Ref | None = None) -> SealedFolder | None: ...

    # Return the keys of all artifacts that have a manifest, damaged or not, sorted.
    def sealed_keys(self) -> list[str]: ...

    # Return every stored file below a key, by its path relative to it. An empty folder has one entry, '.'.
    def list(self, below: str = "") -> dict[str, Entry]: ...

    # Return the bytes of a small file; FileNotFoundError if there is none, ValueError if it is not a small plain one.
    def read(self, path: str) -> bytes: ...

    # Return the manifest that a listing shows; FileNotFoundError if it was removed since.
    def listed_manifest(self, key: str, entry: Entry) -> Manifest: ...

    # Return where the files of a sealed folder lie below its key: '' or a path that ends in '/'.
    def files_below(self, key: str, manifest: Manifest) -> str: ...

    # Say whether an artifact with a marker of retirement was retired: the marker may be a stray file.
    def is_retired(self, key: str, manifest: Manifest) -> bool: ...

    # ------------------------------------------------------------ reading

    # Make sure that the files of a sealed folder, or some of them, are on this machine; return its folder.
    def fetch(self, found: SealedFolder, names: Iterable[str] | None = None) -> Path: ...

    # Return what reads files by ranges; None if all of them are on this machine.
    def range_reader(self, found: SealedFolder) -> RangeReader | None: ...

    # Read every byte; return a line for each file that is missing, differs, or is not listed.
    def verify(self, found: SealedFolder) -> list[str]: ...

    # ------------------------------------------------------------ changing

    # Turn a work folder that holds the files and the manifest into the sealed folder of a key; the folder is consumed.
    # `replaces` is the seal of what the attempt set out to replace: '' for none, None if that is not known. If another
    # process sealed the key since, a bucket keeps what that process sealed.
    def publish(self, key: str, work: Path, manifest: Manifest, replaces: str | None) -> None: ...

    # Hide a sealed folder from its readers by a marker, JSON that says since when; its files stay.
    def mark_retired(self, found: SealedFolder, marker: str) -> None: ...

    # Delete the files of a retired folder, all but the manifest and the marker.
    def drop_data(self, found: SealedFolder) -> None: ...

    # Move a sealed folder out of every reader's way, and return its key there.
    def quarantine(self, found: SealedFolder, reason: str) -> str: ...

    # Delete a folder, sealed or not; the manifest first, so that no reader sees the rest.
    def delete(self, key: str) -> None: ...

    # ------------------------------------------------------------ locks and garbage collection

    # Return the lock of a name; `how` is as for FileLock.
    def lock(self, name: str, **how: Any) -> FileLock: ...

    # Return the process that holds a lock exclusively now.
    def lock_holder(self, name: str) -> Holder | None: ...

    # Say whether any process holds a lock now. Writes nothing, so it works on read-only media.
    def is_held(self, name: str) -> bool: ...

    # Say whether gc keeps something because the run that it belongs to may not be visible yet.
    def is_young(self, modified: datetime) -> bool: ...

    # Return the names whose locks some machine holds, by a listing, where gc runs beside live runs.
    def names_in_use(self, entries: Mapping[str, Entry]) -> set[str]: ...

    # Yield what dead writers left below the key of an artifact that stays.
    def leftovers(
        self, key: str, manifest: Manifest | None, entries: Mapping[str, Entry], retired: bool
    ) -> Leftovers: ...

    # Yield what dead processes left outside the rooms of artifacts and runs.
    def litter(self, entries: Mapping[str, Entry]) -> Leftovers: ...

    # Remove what gc decided on, a path relative to the place, unless some process began to use it meanwhile; say
    # whether it was removed. `is_wanted` says whether a run plans an artifact, by the records as they are now.
    def collect(self, path: str, is_wanted: Callable[[str], bool]) -> bool: ...

    # ------------------------------------------------------------ records of runs, and pins

    # Let other machines see a file of a run, or a pin.
    def share(self, path: Path) -> None: ...

    # Remove a file that was shared.
    def unshare(self, path: Path) -> None: ...

    # See the records and pins that other machines shared, and forget those they removed.
    def refresh_records(self) -> None: ...
