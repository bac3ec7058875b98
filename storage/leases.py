"""Leases: objects that say which machine works on what, so that two machines do not do the same work.

A lease saves work; safety does not depend on it: a process that loses one, or takes a slow holder for dead, is stopped
by the seal, which is conditional. Clocks may differ by less than the minute and a half between renewal and staleness.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from stackwise_core.strict import parse_object
from storage.errors import ObjectStoreError
from storage.locks import FileLock, Holder, parse_holder, this_process
from storage.object_store import ObjectStore
from storage.place import Entry

FOLDER = "leases"
RENEW_SECONDS = 30.0
STALE_SECONDS = 120.0


def is_stale(entry: Entry) -> bool:
    """Say whether a lease was not renewed for so long that its holder must be dead."""
    return (datetime.now(UTC) - entry.modified).total_seconds() > STALE_SECONDS


class LeasedLock(FileLock):
    """A lock between the processes of this machine, and a lease between machines.

    The lock of this machine is taken first. Its holder knows that a lease of this machine belongs to a dead
    process, and takes it over at once: a killed run goes on without waiting.
    """

    poll_seconds: ClassVar = 2.0

    def __init__(self, path: Path, store: ObjectStore, machine: str, **how: Any) -> None:
        """Name the lock: `path` and `how` are as for FileLock, and the lease has the name of the file.

        `machine` distinguishes this machine (this scratch folder) from others. Give a store with few retries, because
        a lease is not worth a wait. Each holder of a shared lock has a separate lease, which says that it lives.
        """
        super().__init__(path, **how)
        self._store, self._machine = store, machine
        self._key = f"{FOLDER}/{path.name}"
        if self.shared:
            self._key += f"/{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the lock and the lease if both are free."""
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
        """Return the holder of the lease, or else of the lock."""
        return str(holder_of(self._store, self.path.name) or super().holder())

    def release(self) -> None:
        """Release both; a lease that cannot be deleted becomes stale."""
        if self._renewing is not None:
            self._ended.set()
            self._renewing.join()
            self._renewing = None
            with contextlib.suppress(ObjectStoreError, FileNotFoundError):
                if _machine_of(self._store.read(self._key)[0]) == self._machine:
                    self._store.delete([self._key])
        super().release()

    def _text(self) -> bytes:
        return json.dumps({"machine": self._machine, **this_process()._asdict()}).encode()

    def _take_lease(self) -> bool:
        if self._store.create(self._key, self._text()):
            return True
        try:
            text, entry = self._store.read(self._key)
        except FileNotFoundError:  # released just now; the next try will take it
            return False
        if _machine_of(text) != self._machine and not is_stale(entry):
            return False
        return self._store.replace(self._key, self._text(), entry.version)

    def _renew(self) -> None:
        """Write the lease again and again, until it is released or another machine took it."""
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(ObjectStoreError):  # the next try may do; if none does, the lease becomes stale
                try:
                    text, entry = self._store.read(self._key)
                except FileNotFoundError:
                    return
                if _machine_of(text) != self._machine:
                    return
                self._store.replace(self._key, text, entry.version)


def holder_of(store: ObjectStore, name: str) -> Holder | None:
    """Return the process that holds an exclusive lease now."""
    try:
        text, entry = store.read(f"{FOLDER}/{name}")
    except FileNotFoundError:
        return None
    return None if is_stale(entry) else parse_holder(text)


def is_held_by_another(store: ObjectStore, name: str, machine: str) -> bool:
    """Say whether a process of another machine holds a lease of a name, exclusive or shared."""
    key = f"{FOLDER}/{name}"
    for each in (key, *(f"{key}/{holder}" for holder in store.list(key))):
        with contextlib.suppress(FileNotFoundError):
            text, entry = store.read(each)
            if _machine_of(text) not in (None, machine) and not is_stale(entry):
                return True
    return False


def _machine_of(text: bytes) -> str | None:
    """Return which machine a lease names; None if its text is damaged."""
    try:
        machine = parse_object(text)["machine"]
    except (ValueError, KeyError):
        return None
    return machine if isinstance(machine, str) else None
