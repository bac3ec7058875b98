"""The root folder of artifacts: opened, found unusable, and never left by a name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.stages.identity import Ref
from storage.artifacts import Artifacts, artifacts_at
from storage.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError, ArtifactsFolderError
from storage.local import LocalPlace
from storage.place import FOLDERS
from support.artifacts import PLAN

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_a_home_is_found_without_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a field of a form names it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifacts_at("~/there").root == tmp_path / "there"
    assert artifacts_at("./~").root == Path("~").absolute()


def test_opening_makes_every_room_and_leaves_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "a/b"
    for _ in range(2):
        assert Artifacts(root).open().root == root
    rooms = {*FOLDERS.values(), "runs", "work", "locks", "trash", "quarantine"}
    assert {path.relative_to(root).as_posix() for path in root.rglob("*")} == rooms
    assert Artifacts(root).existing().root == root


def unusable(root: Path) -> ArtifactsFolderError:
    with pytest.raises(ArtifactsFolderError) as caught:
        Artifacts(root).open()
    assert isinstance(caught.value, OSError)
    assert caught.value.exit_code == 2
    assert f"--artifacts {root}: cannot be written" in str(caught.value)
    return caught.value


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable(tmp_path / "file")
    unusable(tmp_path / "file/below")
    unusable(Path("/proc/artifacts"))
    assert (tmp_path / "file").is_file()


def test_a_read_only_folder_is_found_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rooms are there, but not a file can be made in them."""
    root = tmp_path / "artifacts"
    Artifacts(root).open()

    def read_only(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    assert "Read-only file system" in str(unusable(root))


def test_rooms_on_two_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root can mount; a link does the same, once links are not refused themselves."""
    monkeypatch.setattr(LocalPlace, "check_rooms", lambda place: None)
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    elsewhere = Path("/dev/shm", f"stackwise-test-{os.getpid()}")
    elsewhere.mkdir()
    try:
        (tmp_path / "stacks").symlink_to(elsewhere)
        with pytest.raises(ArtifactsFolderError, match="work/ and stacks/ lie on different file systems") as caught:
            Artifacts(tmp_path).open()
        assert caught.value.exit_code == 2
    finally:
        elsewhere.rmdir()


def test_reading_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, problem in {"nothing": "there is no such folder", "file": "it is a file, not a folder"}.items():
        with pytest.raises(ArtifactsFolderError, match=f"--artifacts {tmp_path / name}: {problem}"):
            Artifacts(tmp_path / name).existing()
    assert not (tmp_path / "nothing").exists()


def test_names_tell_what_they_are_and_stay_in_their_room(artifacts: Artifacts) -> None:
    made = (stage.ref(kind) for stage in PLAN.stages[:2] for kind in list(FOLDERS)[1:] if stage.recipe(kind))
    for ref in (PLAN.data_ref, *made):
        folder = artifacts.folder(ref)
        assert folder.parent == artifacts.root / FOLDERS[ref.kind]
        assert (
            folder.name
            == ref.name
            == "-".join([ref.kind, *([] if ref.stage < 0 else [str(ref.stage)]), ref.sha256[:12]])
        )


@pytest.mark.parametrize("sha256", ["x/../../../y", "../../../../", "a/b", "", "A" * 64, "0" * 63])
def test_a_reference_of_a_stranger_cannot_leave_the_root(sha256: str) -> None:
    """Manifests hold references; opening one that somebody crafted must not look outside."""
    with pytest.raises(ValueError, match="sha256"):
        Ref.model_validate_json(json.dumps({"kind": "stack", "stage": 0, "sha256": sha256}))


def test_errors_are_what_a_caller_would_catch() -> None:
    assert issubclass(ArtifactMissingError, (ArtifactError, FileNotFoundError))
    assert issubclass(ArtifactCorruptError, ValueError)
    error = ArtifactMissingError(Path("/a/b"), "is gone", "Make it")
    assert (str(error), error.path, error.exit_code) == ("/a/b: is gone. Make it", Path("/a/b"), 3)
