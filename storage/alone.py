"""Who may change what lies in an artifacts folder: everybody who makes, or one process that removes."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Generator

from storage.errors import ArtifactsFolderError, RunBusyError
from storage.layout import FOLDERS, Artifacts
from storage.locks import is_held, no_wait
from storage.runs import live_runs

_ROOMS = (*FOLDERS.values(), "runs", "work", "locks", "trash", "quarantine")


@contextlib.contextmanager
def alone(artifacts: Artifacts) -> Generator[None]:
    """Keep every run, copy and other gc out for as long as the block lasts.

    Raises:
        RunBusyError: one is at work; it is named.
        ArtifactsFolderError: this is no artifacts folder, or it cannot be written.
    """
    lacking = [name for name in _ROOMS if not (artifacts.root / name).is_dir()]
    if lacking:  # a mistyped folder: what lies in its work/ or trash/ is none of ours
        raise ArtifactsFolderError(
            f"--artifacts {artifacts.root}: is no artifacts folder (it has no {lacking[0]}/); nothing was removed"
        )
    lock = artifacts.lock("gc")
    with _writable(artifacts):
        free = lock.try_acquire()
    if not free:
        raise RunBusyError(
            f"{artifacts.root} is in use by {_holder(artifacts)}; wait for its end, or stop it. Nothing was removed"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def among_others(artifacts: Artifacts, on_wait: Callable[[str], None] = no_wait) -> Generator[None]:
    """Keep gc out for as long as the block lasts, having waited for its end."""
    with contextlib.ExitStack() as stack:
        with _writable(artifacts):
            stack.enter_context(artifacts.lock("gc", shared=True, on_wait=on_wait))
        yield


def at_work(artifacts: Artifacts) -> str:
    """Name who would keep us out now; empty: nobody. Writes nothing."""
    return _holder(artifacts) if is_held(artifacts.root / "locks" / "gc") else ""


def _holder(artifacts: Artifacts) -> str:
    """Name who keeps us out: the live runs, else the process that holds the lock alone."""
    live = live_runs(artifacts)
    if live:
        return ", ".join(f"run {name} ({holder})" for name, holder in live.items())
    gc = artifacts.lock_holder("gc")
    return f"`stackwise gc` ({gc})" if gc else "another process of StackWise"


@contextlib.contextmanager
def _writable(artifacts: Artifacts) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):  # ENOENT: it has no locks/
            raise
        raise ArtifactsFolderError(
            f"--artifacts {artifacts.root}: cannot be written ({error.strerror}); give a folder this user may write to"
        ) from None
