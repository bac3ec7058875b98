"""No link inside an artifacts folder is followed, so that a stranger's leads to nothing outside of it.

The folder itself may be a link, which its owner made.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
from collections.abc import Generator, Iterable
from pathlib import Path

from storage.errors import ArtifactCorruptError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def link_error(path: Path) -> ArtifactCorruptError:
    """Return the error of a link that is in the way."""
    return ArtifactCorruptError(path, "is a link, which is not followed", f"Remove {path}; what it leads to stays")


def check_no_link(root: Path, path: Path) -> None:
    """Raise ArtifactCorruptError if a path below a root, or a folder between them, is a link."""
    for part in (path, *path.parents):
        if part == root:
            return
        if part.is_symlink():
            raise link_error(part)


@contextlib.contextmanager
def opened(root: Path, folder: Path) -> Generator[int]:
    """Open a folder at or below a root, part by part, and give its descriptor.

    Raises:
        ArtifactCorruptError: a part below the root is a link.
        FileNotFoundError: there is none.
    """
    fd = os.open(root, _FOLDER)
    try:
        at = root
        for part in folder.relative_to(root).parts:
            at /= part
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            except OSError:
                if at.is_symlink():
                    raise link_error(at) from None
                raise
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def remove_in(folder: int, name: str) -> None:
    """Remove what has a name in an open folder; of a link, the link. Another process may be removing it too."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder, ignore_errors=True)
        else:
            os.unlink(name, dir_fd=folder)


def delete_path(path: Path) -> None:
    """Delete a file or folder, if it is there; of a link, the link."""
    with contextlib.suppress(FileNotFoundError), opened(path.parent, path.parent) as folder:
        remove_in(folder, path.name)


def remove_links(folder: Path) -> None:
    """Remove a folder that is a link, and below one all links and files with a second name, before it is written to."""
    if folder.is_symlink():
        folder.unlink()
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
                path.unlink(missing_ok=True)


def plain_files(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the size [bytes] of each of some files below a folder that is there, plain, and behind no link."""
    base = str(folder)  # of strings, since listings ask for the files of thousands of artifacts

    @functools.cache
    def is_real(below: str) -> bool:
        return below in ("", "/") or (not os.path.islink(f"{base}/{below}") and is_real(os.path.dirname(below)))

    found = dict[str, int]()
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(f"{base}/{name}")
            if stat.S_ISREG(status.st_mode) and is_real(os.path.dirname(name)):
                found[name] = status.st_size
    return found


def open_plain(path: Path, flags: int) -> int:
    """Open a plain file to write to, made if there is none, and return its descriptor.

    What else has its name is replaced, and so is a file with a second name, which may be the user's.
    """
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, or a pipe that nobody reads
            raise
    else:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return fd
        os.close(fd)
    path.unlink(missing_ok=True)
    return os.open(path, flags | os.O_EXCL, 0o644)
