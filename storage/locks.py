"""Locks between processes of one machine: flock on files that are never deleted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import sleep
from typing import ClassVar, NamedTuple

from stackwise_core.errors import StageInterruptedError
from stackwise_core.strict import parse_object, read_bounded
from storage.errors import ArtifactsFolderError

OnWait = Callable[[str], None]
"""Called once with the holder of a lock, such as 'process 123 on host since ...', before waiting for it."""


def no_wait(holder: str) -> None:
    """Wait without a message."""


class Holder(NamedTuple):
    """The process that holds a lock, as it wrote into the lock file."""

    pid: int
    host: str
    since: str
    """ISO 8601, UTC."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def this_process() -> Holder:
    """Return this process, as it signs a lock that it takes now."""
    return Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))


def parse_holder(text: bytes) -> Holder | None:
    """Return the process that signed a lock; None if the text is damaged."""
    try:
        entry = parse_object(text)
        found = Holder(pid=entry["pid"], host=entry["host"], since=entry["since"])
    except (ValueError, KeyError):
        return None
    return found if tuple(map(type, found)) == (int, str, str) else None


def read_holder(path: Path) -> Holder | None:
    """Return the last process that held a lock exclusively."""
    try:
        return parse_holder(read_bounded(path))
    except (OSError, ValueError):
        return None


def is_held(path: Path, *, exclusively: bool = False) -> bool:
    """Say whether some process holds a lock now, or only whether one holds it exclusively. Writes nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a link cannot be held
            raise
        return False
    try:
        for _ in range(3):  # another probe may hold it for an instant
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, (fcntl.LOCK_SH if exclusively else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return False
            sleep(0.05)
        return True
    finally:
        os.close(fd)


class FileLock:
    """An advisory lock that the kernel releases when its process ends, however it ends.

    The descriptor is close-on-exec, so a child that is started by exec never holds it. Do not fork without exec
    while holding one.
    """

    poll_seconds: ClassVar = 0.2

    def __init__(
        self,
        path: Path,
        *,
        shared: bool = False,
        on_wait: OnWait = no_wait,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Name the lock; `with` or `try_acquire` takes it."""
        self.path, self.shared = path, shared
        self.on_wait, self.should_stop = on_wait, should_stop
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock unless another process holds it in a conflicting way."""
        fd = self._open()
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        if not self.shared and os.fstat(fd).st_nlink <= 1:  # write who holds it, to be shown to people who wait
            with contextlib.suppress(OSError):  # a full disk, which gc is there to empty
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(this_process()._asdict()).encode(), 0)
        return True

    def _open(self) -> int:
        """Open the file, and make it if there is none; a link is not replaced, as two processes could each do so."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ArtifactsFolderError(f"{self.path}: is a link, which is not followed; remove it") from None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise ArtifactsFolderError(f"{self.path}: is not a plain file; remove it")

    def holder(self) -> str:
        """Return the last holder: 'process 123 on host since ...'."""
        return str(read_holder(self.path) or "another process")

    def release(self) -> None:
        """Release the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> FileLock:
        announced = False
        while not self.try_acquire():
            if not announced:
                self.on_wait(self.holder())
                announced = True
            if self.should_stop():
                raise StageInterruptedError(f"stopped on request while waiting for {self.path.name}")
            sleep(self.poll_seconds)
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
