"""The files of one sealed folder in an object store: upload, download, ranges, verification."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from stackwise_core.failpoints import failpoint
from storage.checksums import NOT_LISTED, Files
from storage.durable import TEMPORARY_SUFFIX, explain_full_disk, sync
from storage.errors import ArtifactCorruptError
from storage.object_store import ObjectStore

_FILES_AT_ONCE = 4


class RemoteFiles:
    """The objects below a prefix, by their names relative to it."""

    def __init__(self, store: ObjectStore, artifact: str, prefix: str) -> None:
        """Name the key of the sealed folder, and the prefix of its files, which ends in '/'."""
        self._store, self._artifact, self.prefix = store, artifact, prefix

    @property
    def artifact_uri(self) -> str:
        """What messages call the sealed folder."""
        return self._store.where(self._artifact)

    def uri(self, name: str) -> str:
        """Return what messages call a file."""
        return self._store.where(f"{self.prefix}{name}")

    @property
    def _remedy(self) -> str:
        return f"Delete all below {self.artifact_uri} and run the same command again: it will be remade"

    def ranges(self, name: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]:
        """Return ranges of one file; see `ObjectStore.ranges`."""
        return self._store.ranges(f"{self.prefix}{name}", offsets, n_bytes)

    def upload(self, folder: Path, files: Files, there: Mapping[str, int], task: str) -> None:
        """Put the files of a work folder, except those that an interrupted upload put already.

        Objects are put atomically, and the prefix is named after the hash of all checksums: an object of the same
        name and size is the same file.

        Args:
            folder: the work folder.
            files: what to put.
            there: name -> size of what was put already.
            task: failpoint after each file.
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
        """Download the files that are not in a local folder in their size, comparing each with its checksum.

        Raises:
            ArtifactCorruptError: one is missing, or is not what was sealed.
        """
        missing = {name: files[name] for name in names_missing(folder, files)}
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            done = [pool.submit(self._fetch_file, folder / name, name, *entry) for name, entry in missing.items()]
            for each in done:
                each.result()

    def _fetch_file(self, path: Path, name: str, size: int, checksum: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        state = hashlib.sha256()
        try:
            with explain_full_disk(path, size), temporary.open("wb") as file:
                for block in self._store.blocks(f"{self.prefix}{name}", size):
                    state.update(block.data)
                    file.write(block.data)
            if problem := _problem(temporary.stat().st_size, f"sha256:{state.hexdigest()}", size, checksum):
                raise ArtifactCorruptError(self.uri(name), problem, self._remedy)
            sync(temporary)
            os.replace(temporary, path)
        except FileNotFoundError as error:
            if error.filename != self.uri(name):
                raise
            raise ArtifactCorruptError(self.uri(name), "is missing from a sealed artifact", self._remedy) from None
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)

    def verify(self, files: Files, there: Mapping[str, int]) -> list[str]:
        """Read every byte of the objects `there`; return a line per file that is missing, differs, or is not listed."""
        problems = [line for name, entry in sorted(files.items()) if (line := self._verify_file(name, there, *entry))]
        return problems + [f"{self.uri(name)}: {NOT_LISTED}" for name in sorted(there.keys() - files.keys())]

    def _verify_file(self, name: str, there: Mapping[str, int], size: int, checksum: str) -> str:
        if name not in there:
            return f"{self.uri(name)}: missing"
        state, n_bytes = hashlib.sha256(), there[name]
        for block in self._store.blocks(f"{self.prefix}{name}", n_bytes):
            state.update(block.data)
        problem = _problem(n_bytes, f"sha256:{state.hexdigest()}", size, checksum)
        return f"{self.uri(name)}: {problem}" if problem else ""


def _problem(found: int, now: str, size: int, checksum: str) -> str:
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
