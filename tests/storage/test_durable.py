"""Durable files: after a kill or a failed call at any step, the complete old file or the complete new one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_core import files
from stackwise_core.files import recover_folder, replace_folder, sync_tree
from storage.errors import StoreSpaceError
from storage.files import (
    explain_full_disk,
    remove_temporaries,
    write_bytes,
    write_durably,
    write_text,
)
from support.disk import ROOT, Story, die_everywhere, open_below, recorded

# ---------------------------------------------------------------- killing a process before every step


def test_the_killer_kills_before_every_step() -> None:
    assert die_everywhere(TwoFiles) == {"open": 2, "write": 2, "fsync": 1, "rename": 1}
    with pytest.raises(AssertionError, match="killed at step 5: rename"):
        die_everywhere(AsIfRenamed)


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


@pytest.mark.parametrize("story", [Create, Replace])
def test_a_kill_leaves_the_old_file_or_the_new_one(story: type[Story]) -> None:
    died = die_everywhere(story)
    assert died == {"open": 1, "write": 1, "fsync": 2, "rename": 1}


CALLS = ["open", "write", "fsync", "close", "replace"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_old_file_and_nothing_else(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
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
    assert open_below(tmp_path) == []


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
        recover_folder(folder / "target")
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
        recover_folder(folder / "target")
        assert read_pair(folder / "target") == ("newer", "newer")
        assert [p.name for p in folder.iterdir()] == ["target"]


def test_a_kill_leaves_the_old_folder_or_the_new_one() -> None:
    died = die_everywhere(ReplaceFolder)
    assert died["rename"] == 2
    assert died["write"] == 2
    assert died["remove"] == 2  # the old files, once the new ones are in place


def test_a_folder_is_replaced_even_if_a_kill_left_the_one_before_aside() -> None:
    die_everywhere(ReplaceFolderUnsettled)


def test_the_first_folder_and_its_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    recover_folder(target)
    assert list(tmp_path.iterdir()) == []
    fresh = write_pair(tmp_path / "fresh", "new")
    with recorded(monkeypatch) as seen:
        files.replace_folder(fresh, target)
    assert read_pair(target) == ("new", "new")
    renamed = seen.index(("rename", str(target)))
    assert {path for _, path in seen[:renamed]} == {str(fresh), str(fresh / "one"), str(fresh / "two")}
    assert seen[renamed + 1 :] == [("fsync", str(tmp_path))]
