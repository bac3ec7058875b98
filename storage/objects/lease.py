"""Leases: an object that says who works on what, so that two machines do not do the same work.

A lease saves work and no more: whoever loses one, or believes a slow holder dead, is stopped by the seal, which
is conditional. So clocks may differ by less than the minute and a half between a renewal and staleness.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from storage.errors import ObjectStoreError
from storage.locks import FileLock, Holder
from storage.objects.bucket import Bucket, Entry

FOLDER = "leases"
RENEW_SECONDS = 30.0
STALE_SECONDS = 120.0


def is_stale(entry: Entry) -> bool:
    """Say whether the holder of a lease has not renewed it for so long that it must be dead."""
    return (datetime.now(UTC) - entry.modified).total_seconds() > STALE_SECONDS


class LeasedLock(FileLock):
    """A lock between the processes of this machine, and a lease between machines.

    The lock of this machine is taken first. So whoever holds it knows that a lease of this machine's is
    a dead process's, and takes it over at once: a killed run goes on without waiting.
    """

    poll_seconds: ClassVar = 2.0

    def __init__(self, path: Path, bucket: Bucket, machine: str, **how: object) -> None:
        """Name the lock.

        Args:
            path: file of the lock between processes; its name is the lease's.
            bucket: where leases are. Best one that does not repeat requests for long: no lease is worth a wait.
            machine: what tells this machine (this scratch folder) from others.
            how: `shared`, `on_wait` and `should_stop`, as for FileLock. Of a shared lock every holder has a
                lease of its own, which only says that it lives.
        """
        super().__init__(path, **how)  # pyright: ignore[reportArgumentType]
        self._bucket, self._machine = bucket, machine
        self._key = f"{FOLDER}/{path.name}"
        if self.shared:
            self._key += f"/{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the lock and the lease if nobody holds either."""
        if not super().try_acquire():
            return False
        try:
            if not self._take_lease():
                super().release()
                return False
        except BaseException:
            super().release()
            raise
        self._ended.clear()
        self._renewing = threading.Thread(target=self._renew, daemon=True, name=f"lease {self.path.name}")
        self._renewing.start()
        return True

    def holder(self) -> str:
        """Return who holds the lease, or else the lock."""
        return str(holder_of(self._bucket, self.path.name) or super().holder())

    def release(self) -> None:
        """Give both back. A lease that cannot be given back goes stale."""
        if self._renewing is not None:
            self._ended.set()
            self._renewing.join()
            self._renewing = None
            with contextlib.suppress(ObjectStoreError, FileNotFoundError):
                if self._is_mine(self._bucket.read(self._key)[0]):
                    self._bucket.delete([self._key])
        super().release()

    def _text(self) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"machine": self._machine, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
        return json.dumps(entry).encode()

    def _is_mine(self, text: bytes) -> bool:
        try:
            return json.loads(text)["machine"] == self._machine
        except (ValueError, KeyError, TypeError):
            return False

    def _take_lease(self) -> bool:
        if self._bucket.create(self._key, self._text()):
            return True
        try:
            text, entry = self._bucket.read(self._key)
        except FileNotFoundError:  # given back this moment; the next try will do
            return False
        if not self._is_mine(text) and not is_stale(entry):
            return False
        return self._bucket.replace(self._key, self._text(), entry)

    def _renew(self) -> None:
        """Write the lease anew, time and again, until it is given back or another machine took it."""
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(ObjectStoreError):  # the next time may do; if none does, it goes stale
                try:
                    text, entry = self._bucket.read(self._key)
                except FileNotFoundError:
                    return
                if not self._is_mine(text):
                    return
                self._bucket.replace(self._key, text, entry)


def holder_of(bucket: Bucket, name: str) -> Holder | None:
    """Return the process that holds a lease alone now."""
    try:
        text, entry = bucket.read(f"{FOLDER}/{name}")
        signed = json.loads(text)
        holder = Holder(pid=signed["pid"], host=signed["host"], since=signed["since"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None if is_stale(entry) else holder


def is_held(bucket: Bucket, name: str, machine: str) -> bool:
    """Say whether a process of another machine holds a lease of a name: one that several may hold, or one."""
    key = f"{FOLDER}/{name}"
    for each in (key, *(f"{key}/{holder}" for holder in bucket.list(key))):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            text, entry = bucket.read(each)
            if json.loads(text)["machine"] != machine and not is_stale(entry):
                return True
    return False
