"""Flushing files and folders to the disk, and replacing them: after a crash the old or the new is there, whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_FREE = "free some space (`stackwise gc` removes what no run needs) and run the same command again"
_FULL = {
    errno.ENOSPC: f"no space left to write it; {_FREE}",
    errno.EDQUOT: f"no space left to write it in the quota of this user; {_FREE}",
    errno.EFBIG: "files as large may not be written here; raise the limit (`ulimit -f`), or use another file system",
}


def why_full(error: OSError) -> str:
    """Return what a write met and what to do, if the disk, the quota or the largest file was full; '' otherwise."""
    return _FULL.get(error.errno or 0, "")


def write_file(path: Path, data: bytes) -> None:
    """Write a file; an error names it, as those of `write` do not."""
    try:
        path.write_bytes(data)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file piece by piece and return its SHA-256; an error names it."""
    digest = hashlib.sha256()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for piece in pieces:
                digest.update(piece)
                left = memoryview(piece)
                while left:
                    left = left[os.write(file, left) :]
        finally:
            os.close(file)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush one file, or the names in one folder, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush everything below a folder, children before parents."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def replace_folder(fresh: Path, target: Path) -> None:
    """Flush a folder and put it in the place of another: after a crash either is there, never a mixture.

    The old one is set aside before the new one takes its name; `recover_folder` repairs a kill between the two.
    """
    sync_tree(fresh)
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    fresh.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish or undo a `replace_folder` that was killed."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def standing_folder(target: Path) -> Path:
    """Return where the content of a folder is; changes nothing, so that a reader does not disturb who replaces it."""
    aside = _aside(target)
    return aside if aside.exists() and not target.exists() else target


def _aside(target: Path) -> Path:
    """Return a name that no user gives to a folder: what has it may be deleted."""
    return target.with_name(f".{target.name}.replaced")


def inside(folder: Path, name: str) -> Path:
    """Return the real path of a file in a stranger's folder; raises ValueError if it is a link that leads out of it."""
    real, base = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    # The cache of the Hub keeps contents in a folder beside those of snapshots, which hold links alone.
    if not any(real.is_relative_to(allowed) for allowed in (base, *_blobs_of(base))):
        raise ValueError(f"is a link that leads out of the folder, to {real}")
    return real


def _blobs_of(folder: Path) -> list[Path]:
    """Return where the files of a snapshot of the Hub's cache lie, models--OWNER--NAME/blobs; nothing of another."""
    model = folder.parent.parent
    return [model / "blobs"] if folder.parent.name == "snapshots" and model.name.startswith("models--") else []
