"""The files of one sealed artifact in an object store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from stackwise_core.failpoints import failpoint
from storage.durable import TEMPORARY_SUFFIX, explain_full_disk, sync
from storage.errors import ArtifactCorruptError
from storage.objects.bucket import Bucket

Files = Mapping[str, tuple[int, str]]
"""Name -> (size in bytes, 'sha256:<hex>')."""
_FILES_AT_ONCE = 4


class ObjectFolder:
    """One attempt at an artifact: the folder that its manifest names."""

    def __init__(self, bucket: Bucket, artifact: str, attempt: str) -> None:
        """Name it.

        Args:
            bucket: where.
            artifact: key of the artifact, such as stacks/stack-0-...
            attempt: as its manifest names it.
        """
        self.bucket, self.artifact, self.prefix = bucket, artifact, f"{artifact}/{attempt}"

    def uri(self, name: str) -> str:
        """Return what messages call a file."""
        return self.bucket.where(f"{self.prefix}/{name}")

    @property
    def remedy(self) -> str:
        """What to do about damage."""
        return f"Delete all below {self.bucket.where(self.artifact)} and run the same command again: it will be remade"

    def ranges(self, name: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]:
        """Return ranges of one file; see `Bucket.ranges`."""
        return self.bucket.ranges(f"{self.prefix}/{name}", offsets, n_bytes)

    def upload(self, folder: Path, files: Files, there: Mapping[str, int], task: str) -> None:
        """Put the files of a work folder, but for those that an attempt before put already.

        An object is whole or not there, and the attempt is named after the hash of all checksums: what is
        there under its name and size is the same file.

        Args:
            folder: the work folder.
            files: what to put.
            there: name -> size of what was put already.
            task: name of the failpoint that is reached after every file.
        """
        missing = [name for name, (size, _) in files.items() if there.get(name) != size]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            puts = [pool.submit(self.bucket.write, f"{self.prefix}/{name}", folder / name) for name in missing]
            try:
                for number, put in enumerate(as_completed(puts), 1):
                    put.result()
                    failpoint(task, number)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def fetch(self, folder: Path, files: Files) -> None:
        """Bring some files here, each compared with its checksum as it arrives.

        Raises:
            ArtifactCorruptError: one is missing, or is not what was sealed.
        """
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for done in [pool.submit(self._fetch_file, folder / name, name, *entry) for name, entry in files.items()]:
                done.result()

    def fetch_missing(self, folder: Path, files: Files) -> None:
        """Bring those of some files that are not here in their size."""
        self.fetch(folder, {name: files[name] for name in names_missing(folder, files)})

    def _fetch_file(self, path: Path, name: str, size: int, checksum: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        state = hashlib.sha256()
        try:
            with explain_full_disk(path, size), temporary.open("wb") as file:
                for block in self.bucket.blocks(f"{self.prefix}/{name}", size):
                    state.update(block.data)
                    file.write(block.data)
            if problem := _problem(temporary.stat().st_size, f"sha256:{state.hexdigest()}", size, checksum):
                raise ArtifactCorruptError(self.uri(name), problem, self.remedy)
            sync(temporary)
            os.replace(temporary, path)
        except FileNotFoundError as error:
            if error.filename != self.uri(name):
                raise
            raise ArtifactCorruptError(self.uri(name), "is missing from a sealed artifact", self.remedy) from None
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)

    def verify(self, files: Files, there: Mapping[str, int]) -> list[str]:
        """Read every byte and compare; return one line per file that is missing, another, or too much.

        Args:
            files: what was sealed.
            there: name -> size of what lies in the folder.
        """
        problems = [line for name, entry in sorted(files.items()) if (line := self._verify_file(name, there, *entry))]
        return problems + [f"{self.uri(name)}: not in the sealed list" for name in sorted(there.keys() - files.keys())]

    def _verify_file(self, name: str, there: Mapping[str, int], size: int, checksum: str) -> str:
        if name not in there:
            return f"{self.uri(name)}: missing"
        state, n_bytes = hashlib.sha256(), there[name]
        for block in self.bucket.blocks(f"{self.prefix}/{name}", n_bytes):
            state.update(block.data)
        problem = _problem(n_bytes, f"sha256:{state.hexdigest()}", size, checksum)
        return f"{self.uri(name)}: {problem}" if problem else ""


def _problem(found: int, now: str, size: int, checksum: str) -> str:
    """Say what differs from the seal, or nothing."""
    if found != size:
        return f"{found:,} bytes, sealed with {size:,}"
    return "" if now == checksum else f"checksum {now}, sealed with {checksum}"


def names_missing(folder: Path, files: Files) -> Iterable[str]:
    """Give the files that are not in a local folder in their size."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            yield name
