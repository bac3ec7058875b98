"""Locks between real processes: who gets them, who is told, and that a killed holder frees them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stackwise_core.errors import StageInterruptedError
from storage import locks
from storage.locks import FileLock
from support.disk import ROOT, open_below

HOLD = """
import sys
from pathlib import Path
from storage.locks import FileLock

lock = FileLock(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
for line in sys.stdin:
    if line == "release\\n":
        lock.release()
        print("released", flush=True)
    else:
        print(lock.try_acquire(), flush=True)
"""


class Other:
    """Another process, which takes and releases a lock when told to."""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-c", HOLD, str(path), mode]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        return self.process.stdout.readline().strip()

    def acquires(self) -> bool:
        return self.ask("acquire") == "True"

    def release(self) -> None:
        assert self.ask("release") == "released"

    def end(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("locks")


@pytest.fixture(scope="module")
def others(folder: Path) -> Iterator[dict[str, Other]]:
    """One exclusive and one shared process for all tests: each releases what it took."""
    started = {mode: Other(folder / "lock", mode) for mode in ("exclusive", "shared")}
    yield started
    for other in started.values():
        other.end()


@pytest.mark.parametrize(("here", "there"), [(h, t) for h in ("exclusive", "shared") for t in ("exclusive", "shared")])
def test_exclusive_excludes_and_shared_shares(here: str, there: str, folder: Path, others: dict[str, Other]) -> None:
    together = here == there == "shared"
    lock = FileLock(folder / "lock", shared=here == "shared")
    assert others[there].acquires()
    assert lock.try_acquire() == together
    others[there].release()
    if not together:
        assert lock.try_acquire()
        assert not others[there].acquires()
    lock.release()
    assert others[there].acquires()
    others[there].release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    """Two attempts in one process, as a notebook may start them, are two holders."""
    with FileLock(tmp_path / "lock"):
        assert not FileLock(tmp_path / "lock").try_acquire()
        assert not FileLock(tmp_path / "lock", shared=True).try_acquire()
        assert FileLock(tmp_path / "another").try_acquire()


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    for mode in ("exclusive", "shared"):
        other = Other(tmp_path / mode, mode)
        assert other.acquires()
        assert not FileLock(tmp_path / mode).try_acquire()
        other.end()
        assert FileLock(tmp_path / mode).try_acquire()


def test_the_file_stays_and_its_old_signature_does_no_harm(tmp_path: Path) -> None:
    """A lock file that were deleted could be held twice, under one name and two inodes."""
    path = tmp_path / "lock"
    path.write_text("x" * 500)
    with FileLock(path):
        signature = json.loads(path.read_text())
    assert path.exists()
    assert (signature["pid"], signature["host"]) == (os.getpid(), socket.gethostname())
    assert datetime.fromisoformat(signature["since"]).tzinfo == UTC


def test_a_wait_says_once_who_holds_it(folder: Path, others: dict[str, Other], monkeypatch: pytest.MonkeyPatch) -> None:
    other, told, naps = others["exclusive"], [], []
    assert other.acquires()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 5
        if len(naps) == 3:
            other.release()

    monkeypatch.setattr(locks, "sleep", nap)  # not of `time`: the thread that keeps a server alive sleeps too
    with FileLock(folder / "lock", on_wait=told.append):
        assert len(naps) == 3
        assert max(naps) < 1
    (holder,) = told
    assert holder.startswith(f"process {other.process.pid} on {socket.gethostname()} since 2")


def test_a_free_lock_is_taken_without_a_word(tmp_path: Path) -> None:
    told: list[str] = []
    with FileLock(tmp_path / "lock", on_wait=told.append, should_stop=lambda: True):
        pass
    assert told == []


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}'])
def test_an_unreadable_signature_is_another_process(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    assert FileLock(tmp_path / "lock").holder() == "another process"
    assert FileLock(tmp_path / "none").holder() == "another process"


def test_a_request_to_stop_ends_the_wait(
    folder: Path, others: dict[str, Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert others["exclusive"].acquires()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 5

    monkeypatch.setattr(locks, "sleep", nap)  # not of `time`: the thread that keeps a server alive sleeps too
    lock = FileLock(folder / "lock", should_stop=lambda: len(naps) == 2)
    with pytest.raises(StageInterruptedError, match="stopped on request while waiting for lock"), lock:
        raise AssertionError("the other process holds it")
    others["exclusive"].release()
    assert lock.try_acquire()
    lock.release()


def test_a_failed_block_releases(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), FileLock(tmp_path / "lock"):
        raise ZeroDivisionError
    assert FileLock(tmp_path / "lock").try_acquire()


def test_waiting_leaks_no_descriptor(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        before = open_below(tmp_path)
        for _ in range(3):
            assert not FileLock(tmp_path / "lock").try_acquire()
        assert open_below(tmp_path) == before


def test_a_program_started_meanwhile_does_not_hold_it(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.try_acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"x")
        child.stdin.flush()
        assert child.stdout.read(1) == b"x"  # it is past its exec
        lock.release()
        assert FileLock(tmp_path / "lock").try_acquire()


def take(path: str) -> bool:
    return FileLock(Path(path)).try_acquire()


def test_a_spawned_worker_is_another_holder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with FileLock(tmp_path / "lock"):
            assert not pool.apply(take, [str(tmp_path / "lock")])
        assert pool.apply(take, [str(tmp_path / "lock")])
