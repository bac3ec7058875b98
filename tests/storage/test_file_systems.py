"""Which file system a path lies on."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import files
from storage.files import file_system_of, is_local


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = tmp_path / "mounts"
    table.write_text(
        "overlay / overlay rw 0 0\n"
        f"server:/home {tmp_path} nfs4 rw 0 0\n"
        f"/dev/sda1 {tmp_path}/a\\040disk xfs rw 0 0\n"
        f"tmpfs {tmp_path}/twice tmpfs rw 0 0\n"
        f"sshfs {tmp_path}/twice fuse.sshfs rw 0 0\n"
    )
    monkeypatch.setattr(files, "_MOUNTS", table)
    return tmp_path


def test_the_innermost_and_newest_mount_counts(mounts: Path) -> None:
    found = {name: file_system_of(mounts / name) for name in ("x", "a disk/x", "a disks", "twice")}
    assert found == {"x": "nfs4", "a disk/x": "xfs", "a disks": "nfs4", "twice": "fuse.sshfs"}
    assert file_system_of(Path("/")) == "overlay"


def test_a_link_lies_where_it_leads(mounts: Path) -> None:
    (mounts / "a disk").mkdir()
    (mounts / "link").symlink_to(mounts / "a disk")
    assert file_system_of(mounts / "link/store") == "xfs"


def test_what_another_machine_may_take_away_is_not_local(mounts: Path) -> None:
    assert [is_local(mounts / name) for name in ("x", "a disk", "twice")] == [False, True, False]
    assert is_local(Path("/"))


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOUNTS", Path("/proc/none"))
    assert (file_system_of(Path("/")), is_local(Path("/"))) == ("", True)
