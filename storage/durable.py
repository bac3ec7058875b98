"""Files and folders that are complete after a crash, or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np

from storage.errors import StoreSpaceError

TEMPORARY_SUFFIX = ".tmp"


def write_durably(path: Path, data: np.ndarray) -> None:
    """Write a whole file under a temporary name, then put it in place, flushed to the disk.

    Args:
        path: Where it goes; an older file there is replaced.
        data: uint8 `[size]`, contiguous.

    Raises:
        StoreSpaceError: The disk or the quota is full. Nothing of the attempt remains.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explain_full_disk(path, data.nbytes):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                written = 0
                while written < data.nbytes:
                    written += os.write(fd, data[written:].data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


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


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written below a folder."""
    for path in list(folder.rglob(f"*{TEMPORARY_SUFFIX}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_full_disk(path: Path, n_bytes: int | None = None) -> Generator[None]:
    """Turn "no space left" and "over quota" into one error that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = "" if n_bytes is None else f" ({n_bytes:,} bytes)"
        raise StoreSpaceError(
            f"{path}{size}: no space left to write it. What was written before is kept: "
            "free some space and run the same command again, and it goes on from there"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file of bytes durably; see `write_durably`."""
    write_durably(path, np.frombuffer(data, np.uint8))


def write_text(path: Path, text: str) -> None:
    """Write a whole file of text durably; see `write_durably`."""
    write_bytes(path, text.encode())


def replace_folder(fresh: Path, target: Path) -> None:
    """Put a flushed folder in the place of another: after a crash either is there, never a mixture.

    The old one is set aside before the new one takes its name; `recover_folder` mends what a kill
    between the two leaves.
    """
    sync_tree(fresh)
    aside = target.with_name(f"{target.name}.old")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    fresh.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish or undo a `replace_folder` that was killed in the middle."""
    aside = target.with_name(f"{target.name}.old")
    if aside.exists() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
