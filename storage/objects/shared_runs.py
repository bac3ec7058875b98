"""Records of runs, and pins, which every machine writes to its scratch folder and all see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.durable import write_bytes
from storage.locks import is_held
from storage.objects.bucket import Bucket, Entry
from storage.reach import PINS
from storage.runs import PLANS_LOCK

OUTCOME = "outcome.json"
_FOLDER = "runs"
_FILES_AT_ONCE = 16


def share_file(bucket: Bucket, root: Path, path: Path) -> None:
    """Put one file of a run."""
    bucket.write(path.relative_to(root).as_posix(), path.read_bytes())


def unshare_file(bucket: Bucket, root: Path, path: Path) -> None:
    """Take back what was put of a file."""
    bucket.delete([path.relative_to(root).as_posix()])


def refresh(bucket: Bucket, root: Path) -> None:
    """Bring what is in the bucket and not here as it is there, the files that make an attempt exist last.

    A file has the time of the object that it was brought from, so that it is not brought twice. What another
    machine removed goes here too.
    """
    for folder in (_FOLDER, PINS):
        listed = {f"{folder}/{name}": entry for name, entry in bucket.list(folder).items() if _is_safe(name)}
        _bring(bucket, root, [name for name, entry in listed.items() if not _is_here(root, name, entry)])
        _drop_removed(root, folder, listed.keys())


def _bring(bucket: Bucket, root: Path, changed: list[str]) -> None:
    def bring(name: str) -> None:
        try:
            data, entry = bucket.read(name)
        except FileNotFoundError:
            return  # deleted since
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        os.utime(path, (entry.modified.timestamp(), entry.modified.timestamp()))

    last = [name for name in changed if name.endswith("/start.json")]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for names in ([name for name in changed if name not in last], last):
            list(pool.map(bring, names))


def _drop_removed(root: Path, folder: str, listed: Set[str]) -> None:
    """Remove pins and attempts that are not in the bucket, but for those of runs that begin or live here."""
    begins = is_held(root / "locks" / PLANS_LOCK)
    for path in (root / folder).glob("*.json" if folder == PINS else "*/attempts/*/start.json"):
        if path.relative_to(root).as_posix() in listed:
            continue
        if folder == PINS:
            path.unlink(missing_ok=True)
        elif not begins and not is_held(root / "locks" / f"run-{path.parents[2].name}"):
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_here(root: Path, name: str, entry: Entry) -> bool:
    try:
        found = (root / name).stat()
    except FileNotFoundError:
        return False
    return found.st_size == entry.size and found.st_mtime == entry.modified.timestamp()


def _is_safe(name: str) -> bool:
    """Say whether a key names a place below the folder: a bucket may hold anything."""
    return not {"", ".", ".."} & set(name.split("/"))
