"""Files on disk: complete after a crash or absent, their checksums, and the file system they lie on."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from stackwise_core.files import sync, why_full
from storage.errors import StoreSpaceError
from storage.links import delete_path, open_plain, plain_files
from storage.manifest import MANIFEST

TEMPORARY_SUFFIX = ".tmp"
Files = Mapping[str, tuple[int, str]]
"""POSIX path relative to a folder -> (size in bytes, '<algorithm>:<hex>')."""
NOT_LISTED = "not in the sealed list"
"""What `verify_files` says of a file that is not in the list."""
_BLOCK_BYTES = 8 * 2**20
_ALGORITHMS: dict[str, Callable[[], Any]] = {"crc32c": google_crc32c.Checksum, "sha256": hashlib.sha256}
_MOUNTS = Path("/proc/self/mounts")
_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "afs", "beegfs", "gpfs", "fuse")
"""First letters of the file systems whose files another machine, or another process, may take away."""


def write_durably(path: Path, data: np.ndarray) -> None:
    """Write a file under a temporary name, flush it to the disk, and put it in place of an older one.

    Args:
        path: Where it goes.
        data: uint8 `[size]`, contiguous.

    Raises:
        StoreSpaceError: The disk, the quota or the largest file is full. No part of the new file remains.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explain_full_disk(path, data.nbytes):
        try:
            fd = open_plain(temporary, os.O_WRONLY)
            try:
                os.ftruncate(fd, 0)
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of bytes durably; see `write_durably`."""
    write_durably(path, np.frombuffer(data, np.uint8))


def write_text(path: Path, text: str) -> None:
    """Write a file of text durably; see `write_durably`."""
    write_bytes(path, text.encode())


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written below a folder."""
    for path in list(folder.rglob(f"*{TEMPORARY_SUFFIX}")):
        delete_path(path)


@contextlib.contextmanager
def explain_full_disk(path: Path, n_bytes: int | None = None) -> Generator[None]:
    """Turn a full disk, quota or largest file into one error that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        if not (why := why_full(error)):
            raise
        size = "" if n_bytes is None else f" ({n_bytes:,} bytes)"
        raise StoreSpaceError(f"{error.filename or path}{size}: {why}. What was written before is kept") from error


# ---------------------------------------------------------------- checksums


def checksum_bytes(data: np.ndarray) -> str:
    """Return what `checksum_file` would return for a file of these bytes: contiguous uint8 `[size]`."""
    return f"sha256:{hashlib.sha256(data.data).hexdigest()}"


def checksum_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of a file as '<algorithm>:<hex>'.

    crc32c is for old lists only. Over data followed by its own crc32c it is a constant, so all shards of one shape,
    which hold crc32c themselves, would have the same checksum, whatever their numbers.

    Raises:
        ValueError: The algorithm is neither sha256 nor crc32c.
    """
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"checksum algorithm must be one of {sorted(_ALGORITHMS)}, got {algorithm!r}")
    state = _ALGORITHMS[algorithm]()
    block = np.empty(_BLOCK_BYTES, np.uint8)  # google_crc32c refuses a memoryview of a writable buffer
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block.data):
            state.update(block[:n])
    return f"{algorithm}:{state.digest().hex()}"


def verify_files(folder: Path, files: Files) -> list[str]:
    """Compare every byte of a folder with its sealed list.

    Returns:
        One line per file that is missing, has another size or other content, or is not listed (except the
        manifest, which cannot list itself). Empty when all is well.
    """
    plain = plain_files(folder, files)
    problems = (_problem(folder / name, plain.get(name), *expected) for name, expected in sorted(files.items()))
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    present = {path.relative_to(folder).as_posix() for path in found}
    extra = sorted(present - files.keys() - {MANIFEST})
    return [line for line in problems if line] + [f"{folder / name}: {NOT_LISTED}" for name in extra]


def _problem(path: Path, found: int | None, size: int, checksum: str) -> str:
    """Say what is wrong with one file, which has `found` bytes if it is there; '' if nothing is."""
    algorithm = checksum.partition(":")[0]
    if found is None:
        return f"{path}: {'is a link, or behind one, and not followed' if os.path.lexists(path) else 'missing'}"
    if found != size:
        return f"{path}: {found} bytes, sealed with {size}"
    if algorithm not in _ALGORITHMS:
        return f"{path}: sealed with {checksum!r}, an unknown kind of checksum"
    if (now := checksum_file(path, algorithm)) != checksum:
        return f"{path}: checksum {now}, sealed with {checksum}"
    return ""


# ---------------------------------------------------------------- file systems


def file_system_of(path: Path) -> str:
    """Return the kernel's name of the file system a path lies on, such as 'ext4'; '' if unknown."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    where = path.resolve()
    found = [(point, kind) for _, point, kind, *_ in mounts if where.is_relative_to(_unescaped(point))]
    # The longest mount point is the innermost; of two at the same place the later one hides the other.
    return max(reversed(found), key=lambda mount: len(mount[0]), default=("", ""))[1]


def is_local(path: Path) -> bool:
    """Say whether a path lies on a disk of this machine."""
    return not file_system_of(path).startswith(_REMOTE)


def _unescaped(point: str) -> str:
    """Undo the octal escapes of /proc/mounts, in which a space is a backslash and 040 (see `man 5 fstab`)."""
    return point.encode().decode("unicode_escape")
