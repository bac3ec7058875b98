"""Durable files: after a kill or a failed call at any step, the old file or the new one, whole.

`die_everywhere` kills a real process (SIGKILL) before every step by which it changes a folder, one process for
each step, and has the folder checked after each kill. Other test files use it too.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from storage import durable
from storage.durable import (
    explain_full_disk,
    remove_temporaries,
    replace_folder,
    settle_folder,
    sync_tree,
    write_bytes,
    write_durably,
    write_text,
)
from storage.errors import StoreSpaceError

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- killing a process before every step


class Story(Protocol):
    """Something a process does to a folder, and what must hold wherever it was killed."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """Set the scene."""
        ...

    @staticmethod
    def act(folder: Path) -> None:
        """What is killed."""
        ...

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        """What holds afterwards; `finished` if it was not killed."""
        ...


def die_everywhere(module: str, story: str) -> Counter[str]:
    """Tell a story in a process of its own, killing it before its first step, its second, and so on to its last.

    Returns:
        The steps it was killed at: how often each kind.
    """
    # A kill loses nothing that was written, so a file system in memory shows as much as a disk, and sooner.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        code = "import sys; sys.path[:0] = 'tests', 'tests/storage'; import test_durable as t;"
        code += f"t.tell{module, story, folder}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Counter(done.stdout.split())


def tell(module: str, name: str, folder: str) -> None:
    """Run in a fresh process, which has no threads and may therefore fork."""
    story: Story = getattr(importlib.import_module(module), name)
    finished, point = False, 0
    while not finished:
        point += 1
        here = Path(folder, str(point))
        here.mkdir(parents=True)
        story.prepare(here)
        steps, status = _killed_at(point, lambda: story.act(here), here)  # noqa: B023
        finished = status == 0
        if not finished:
            assert os.WIFSIGNALED(status), f"the act failed: {status}"
            print(steps[-1])
        try:
            story.check(here, finished)
        except BaseException as error:
            what = "at its end" if finished else f"killed at step {point}: {steps[-1]}, after {steps[:-1]}"
            raise AssertionError(f"{name}, {what}: left {sorted(map(str, here.rglob('*')))}") from error
        shutil.rmtree(here)


def _killed_at(point: int, act: Callable[[], None], folder: Path) -> tuple[list[str], int]:
    """Fork a process that dies before its step number `point`; return its steps and exit status."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            _hook(point, folder, into)
            act()
            code = 0
        os._exit(code)
    os.close(into)
    with os.fdopen(out) as told:
        steps = told.read().split()
    return steps, os.waitpid(pid, 0)[1]


def _hook(point: int, folder: Path, told: int) -> None:
    """Count every open for writing, rename, remove, write and fsync in the folder, and die before one of them."""
    write, fsync = os.write, os.fsync
    n_steps = 0

    def step(kind: str, before: Callable[[], Any] = lambda: None) -> None:
        nonlocal n_steps
        n_steps += 1
        write(told, f"{kind}\n".encode())
        if n_steps == point:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            # A path without a folder is relative to a descriptor: shutil.rmtree works like that.
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else "/"
            if not path.startswith("/") or f"{path}/".startswith(f"{folder}/"):
                step(event.removeprefix("os."))

    def half_write(fd: int, data: Any) -> int:
        step("write", lambda: write(fd, data[: len(data) // 2]))
        return write(fd, data)

    def counted_fsync(fd: int) -> None:
        step("fsync")
        fsync(fd)

    def half_write_bytes(path: Path, data: bytes) -> int:
        with path.open("wb", buffering=0) as file:
            return half_write(file.fileno(), data)

    os.write, os.fsync = half_write, counted_fsync
    pathlib.Path.write_bytes = half_write_bytes  # type: ignore[method-assign]
    pathlib.Path.write_text = lambda path, text: half_write_bytes(path, text.encode())  # type: ignore
    sys.addaudithook(on_event)


def test_the_killer_kills_before_every_step() -> None:
    assert die_everywhere("test_durable", "TwoFiles") == {"open": 2, "write": 2, "fsync": 1, "rename": 1}
    with pytest.raises(AssertionError, match="killed at step 5: rename"):
        die_everywhere("test_durable", "AsIfRenamed")


class TwoFiles:
    """open a, write a, open b, write b, rename b, fsync: what is there after n of them is known."""

    prepare = staticmethod(lambda folder: None)

    @staticmethod
    def act(folder: Path) -> None:
        (folder / "a").write_bytes(b"ab")
        (folder / "b").write_text("cd")
        (folder / "b").rename(folder / "c")
        fd = os.open(ROOT, os.O_RDONLY)
        os.fsync(fd)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        states = ({}, {"a": "a"}, {"a": "ab"}, {"a": "ab", "b": "c"}, {"a": "ab", "b": "cd"}, {"a": "ab", "c": "cd"})
        point = int(folder.name)
        assert {p.name: p.read_text() for p in folder.iterdir()} == states[min(point - 1, 5)]
        assert finished == (point == 7)


class AsIfRenamed(TwoFiles):
    """What would hold if the rename had been done before it was."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        assert int(folder.name) < 5 or (folder / "c").exists()


# ---------------------------------------------------------------- one file

OLD, NEW = b"the old file", b"the new one, of another length"


class Create:
    """A new file."""

    prepare = staticmethod(lambda folder: None)

    @staticmethod
    def act(folder: Path) -> None:
        write_bytes(folder / "file", NEW)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        found = (folder / "file").read_bytes() if (folder / "file").exists() else None
        assert found == NEW or (found is None and not finished)
        assert {p.name for p in folder.iterdir()} <= {"file", "file.tmp"}
        assert not (finished and (folder / "file.tmp").exists())
        write_bytes(folder / "file", NEW)  # what the killed process left is no obstacle
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"file": NEW}


class Replace(Create):
    """A file in the place of another."""

    @staticmethod
    def prepare(folder: Path) -> None:
        (folder / "file").write_bytes(OLD)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        assert (folder / "file").read_bytes() in ((NEW,) if finished else (OLD, NEW))
        remove_temporaries(folder)
        assert [p.name for p in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("story", ["Create", "Replace"])
def test_a_kill_leaves_the_old_file_or_the_new_one(story: str) -> None:
    died = die_everywhere("test_durable", story)
    assert died == {"open": 1, "write": 1, "fsync": 2, "rename": 1}


CALLS = ["open", "write", "fsync", "close", "replace"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_old_file_and_nothing_else(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    n_open = len(os.listdir("/proc/self/fd"))
    real_close = os.close

    def fail(*args: Any) -> None:
        if call == "close":
            real_close(args[0])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=os.strerror(number) if number == errno.EIO else "no space left") as caught:
            write_bytes(path, NEW)
    full = number != errno.EIO
    assert isinstance(caught.value, StoreSpaceError) == full
    if full:
        assert f"{path} ({len(NEW)} bytes)" in str(caught.value)
        assert caught.value.exit_code == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": OLD}
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int, data: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", NEW)
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    data = np.arange(200, dtype=np.uint8)
    write_durably(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == bytes(range(200))
    write_text(tmp_path / "text", "ä" * 20)
    assert (tmp_path / "text").read_text(encoding="utf-8") == "ä" * 20
    write_bytes(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """List (what, path) of every flush and rename."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def on_fsync(fd: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def on_rename(source: Any, target: Any) -> None:
        seen.append(("rename", str(target)))
        rename(source, target)

    def on_replace(source: Any, target: Any) -> None:
        seen.append(("rename", str(target)))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", on_fsync)
        patch.setattr(os, "rename", on_rename)
        patch.setattr(os, "replace", on_replace)
        yield seen


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "file")
    with recorded(monkeypatch) as seen:
        write_bytes(Path(path), NEW)
    assert seen == [("fsync", path + ".tmp"), ("rename", path), ("fsync", str(tmp_path))]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A real one: a file system of 64 KiB in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        write_bytes(tmp_path / "first", bytes(20_000))
        path = tmp_path / "second"
        with pytest.raises(StoreSpaceError, match=r"100,000 bytes\): no space left .* free some space") as caught:
            write_bytes(path, bytes(100_000))
        assert str(path) in str(caught.value)
        assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"first": 20_000}
        write_bytes(path, bytes(30_000))  # the space of the failed attempt is free again
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_only_full_disks_are_explained(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    with pytest.raises(StoreSpaceError, match=r"^/x: no space left"), explain_full_disk(Path("/x")):
        raise OSError(errno.EDQUOT, "quota")


# ---------------------------------------------------------------- folders


def test_a_tree_is_flushed_children_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()
    with recorded(monkeypatch) as seen:
        sync_tree(tmp_path)
    order = [Path(path).relative_to(tmp_path).as_posix() for _, path in seen]
    assert sorted(order) == sorted([".", "x", "a", "a/y", "a/b", "a/b/z"])
    assert all(order.index(parent) > order.index(child) for child in order for parent in _parents(child))


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in Path(name).parents]


def test_temporaries_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    kept = ["file", "a/tmp", "a/file.tmp.old"]
    for name in (*kept, "file.tmp", "a/b.tmp/c/d.tmp", "a/b.tmp/e", "a/f.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    assert not (tmp_path / "a/b.tmp").exists()


def write_pair(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (folder / name).write_bytes(text.encode())
    return folder


def read_pair(folder: Path) -> tuple[str, str]:
    return (folder / "one").read_text(), (folder / "two").read_text()


class ReplaceFolder:
    """Two files that belong together, replaced together."""

    @staticmethod
    def prepare(folder: Path) -> None:
        write_pair(folder / "target", "old")

    @staticmethod
    def act(folder: Path) -> None:
        replace_folder(write_pair(folder / "fresh", "new"), folder / "target")

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        settle_folder(folder / "target")
        found = read_pair(folder / "target")
        assert found == ("new", "new") or (found == ("old", "old") and not finished)
        assert {p.name for p in folder.iterdir()} <= {"target", "fresh"}
        replace_folder(write_pair(folder / "fresh", "newer"), folder / "target")
        assert read_pair(folder / "target") == ("newer", "newer")
        assert [p.name for p in folder.iterdir()] == ["target"]


class ReplaceFolderUnsettled(ReplaceFolder):
    """As above, but replaced again before anyone settled what the kill left."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        replace_folder(write_pair(folder / "fresh", "newer"), folder / "target")
        settle_folder(folder / "target")
        assert read_pair(folder / "target") == ("newer", "newer")
        assert [p.name for p in folder.iterdir()] == ["target"]


def test_a_kill_leaves_the_old_folder_or_the_new_one() -> None:
    died = die_everywhere("test_durable", "ReplaceFolder")
    assert died["rename"] == 2
    assert died["write"] == 2
    assert died["remove"] == 2  # the old files, once the new ones are in place


def test_a_folder_is_replaced_even_if_a_kill_left_the_one_before_aside() -> None:
    die_everywhere("test_durable", "ReplaceFolderUnsettled")


def test_the_first_folder_and_its_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    settle_folder(target)
    assert list(tmp_path.iterdir()) == []
    fresh = write_pair(tmp_path / "fresh", "new")
    with recorded(monkeypatch) as seen:
        durable.replace_folder(fresh, target)
    assert read_pair(target) == ("new", "new")
    renamed = seen.index(("rename", str(target)))
    assert {path for _, path in seen[:renamed]} == {str(fresh), str(fresh / "one"), str(fresh / "two")}
    assert seen[renamed + 1 :] == [("fsync", str(tmp_path))]
