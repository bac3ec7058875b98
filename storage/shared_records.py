"""Records of runs, and pins, that every machine writes to its scratch folder, and that all machines see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.durable import write_bytes
from storage.local import LocalPlace
from storage.object_store import ObjectStore
from storage.place import PINS, PLANS_LOCK, RUNS, Entry

_FILES_AT_ONCE = 16


def refresh(store: ObjectStore, scratch: LocalPlace) -> None:
    """Download records that are not here as they are in the bucket, and drop those that other machines removed.

    A file has the time of the object it was downloaded from, so that it is not downloaded twice.
    """
    for folder in (RUNS, PINS):
        listed = {f"{folder}/{name}": entry for name, entry in store.list(folder).items() if _is_safe(name)}
        _download(store, scratch, [name for name, entry in listed.items() if not _is_here(scratch.root / name, entry)])
        _drop_removed(scratch, folder, listed.keys())


def _download(store: ObjectStore, scratch: LocalPlace, names: list[str]) -> None:
    """Download some records, start.json last: an attempt exists with it."""

    def download(name: str) -> None:
        try:
            data, entry = store.read(name)
        except FileNotFoundError:
            return  # deleted since
        path = scratch.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        os.utime(path, (entry.modified.timestamp(), entry.modified.timestamp()))

    last = [name for name in names if name.endswith("/start.json")]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for some in ([name for name in names if name not in last], last):
            list(pool.map(download, some))


def _drop_removed(scratch: LocalPlace, folder: str, listed: Set[str]) -> None:
    """Remove pins and attempts that are not in the bucket, except those of runs that begin or live here."""
    begins = scratch.is_held(PLANS_LOCK)
    for path in (scratch.root / folder).glob("*.json" if folder == PINS else "*/attempts/*/start.json"):
        if path.relative_to(scratch.root).as_posix() in listed:
            continue
        if folder == PINS:
            path.unlink(missing_ok=True)
        elif not begins and not scratch.is_held(f"run-{path.parents[2].name}"):
            shutil.rmtree(path.parent, ignore_errors=True)


def _is_here(path: Path, entry: Entry) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_size == entry.size and found.st_mtime == entry.modified.timestamp()


def _is_safe(name: str) -> bool:
    """Say whether a key names a place below the folder: a bucket may hold anything."""
    return not {"", ".", ".."} & set(name.split("/"))
