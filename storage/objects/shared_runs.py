"""Records of runs, which every machine writes to its scratch folder and all see."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.durable import write_bytes
from storage.objects.bucket import Bucket, Entry

OUTCOME = "outcome.json"
_FOLDER = "runs"
_FILES_AT_ONCE = 16


def share_file(bucket: Bucket, root: Path, path: Path) -> None:
    """Put one file of a run."""
    bucket.write(path.relative_to(root).as_posix(), path.read_bytes())


def refresh(bucket: Bucket, root: Path) -> None:
    """Bring what is in the bucket and not here as it is there, the files that make an attempt exist last.

    A file has the time of the object that it was brought from, so that it is not brought twice.
    """
    changed = {
        name: entry
        for name, entry in bucket.list(_FOLDER).items()
        if _is_safe(name) and not _is_here(root, name, entry)
    }

    def bring(name: str) -> None:
        try:
            data, entry = bucket.read(f"{_FOLDER}/{name}")
        except FileNotFoundError:
            return  # deleted since
        path = root / _FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        os.utime(path, (entry.modified.timestamp(), entry.modified.timestamp()))

    last = [name for name in changed if name.endswith("/start.json")]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for names in ([name for name in changed if name not in last], last):
            list(pool.map(bring, names))


def _is_here(root: Path, name: str, entry: Entry) -> bool:
    try:
        found = (root / _FOLDER / name).stat()
    except FileNotFoundError:
        return False
    return found.st_size == entry.size and found.st_mtime == entry.modified.timestamp()


def _is_safe(name: str) -> bool:
    """Say whether a key names a place below the folder: a bucket may hold anything."""
    return not {"", ".", ".."} & set(name.split("/"))
