"""Artifacts on disk: sealed whole or not at all, wherever the process was killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.stages.identity import Ref
from storage import local
from storage.artifacts import SCRATCH, Artifacts, State, artifacts_at
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
)
from storage.manifest import MANIFEST, RETIRED, InputEntry, Manifest
from storage.place import FOLDERS
from support.artifacts import CONTENT, LOG, OTHER_CONTENT, PLAN, REF, STAGE, fill_work, seal
from support.disk import ROOT, Story, die_everywhere


def content(folder: Path, *without: str) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if name not in without}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """That bytes are flushed is the matter of test_durable and of the stories below; elsewhere it only takes time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts").open()


def test_a_home_is_found_without_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a field of a form names it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifacts_at("~/there").root == tmp_path / "there"
    assert artifacts_at("./~").root == Path("~").absolute()


# ---------------------------------------------------------------- from absent to sealed


def test_sealing_moves_the_work_folder_into_place(artifacts: Artifacts) -> None:
    assert artifacts.state(REF) is State.ABSENT
    with pytest.raises(ArtifactMissingError, match="there is no such artifact"):
        artifacts.manifest(REF)
    manifest = seal(artifacts)
    folder = artifacts.root / "stacks" / REF.name
    assert artifacts.folder(REF) == artifacts.checked(REF) == folder
    assert artifacts.state(REF) is State.SEALED
    assert content(folder, MANIFEST) == {**CONTENT, **LOG}
    assert os.listdir(artifacts.root / "work") == os.listdir(artifacts.root / "trash") == []
    assert artifacts.manifest(REF) == manifest == Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    assert (manifest.ref, manifest.facts, manifest.fingerprint) == (REF, {"steps": 3}, {"torch": "x"})
    assert manifest.inputs == (InputEntry(ref=PLAN.data_ref, digest="d" * 64),)
    assert artifacts.input_entry(REF) == InputEntry(ref=REF, digest=manifest.digest)
    assert artifacts.everything() == [folder]


def test_the_manifest_lists_every_file_with_size_and_checksum(artifacts: Artifacts) -> None:
    import hashlib

    listed = seal(artifacts).files
    assert set(listed) == {*CONTENT, *LOG}
    for name, data in {**CONTENT, **LOG}.items():
        assert (listed[name].size, listed[name].checksum) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
        assert listed[name].content == (name not in LOG)


def test_a_log_does_not_enter_the_digest_and_content_does(tmp_path: Path) -> None:
    digests = [
        seal(Artifacts(tmp_path / str(number)).open(), *files).digest
        for number, files in enumerate(
            [(CONTENT, LOG), (CONTENT, {"metrics.jsonl": b"other"}), (CONTENT, {}), (OTHER_CONTENT, LOG)]
        )
    ]
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_known_checksums_are_taken_as_they_are(artifacts: Artifacts) -> None:
    """The store writer hashed its bytes before they went to the disk; a disk that changed them must not bless them."""
    work = fill_work(artifacts, {"a": b"as the disk has it", "b": b"b"})
    known = {"a": (18, "sha256:" + "a" * 64), "not there": (1, "sha256:" + "b" * 64)}
    artifacts.seal(REF, STAGE.stack, (), {}, {}, checksums=known)
    assert not work.exists()
    assert artifacts.manifest(REF).checksums().keys() == {"a", "b"}
    assert artifacts.manifest(REF).files["a"].checksum == "sha256:" + "a" * 64
    with pytest.raises(ArtifactCorruptError, match="a: checksum sha256:"):
        artifacts.checked(REF)


def test_scratch_and_temporaries_are_never_sealed(artifacts: Artifacts) -> None:
    litter = {f"{SCRATCH}/checkpoint/state.json": b"{}", "a.tmp": b"half", "sub/b.tmp": b"", "c.tmp/d": b""}
    fill_work(artifacts, litter)
    assert set(seal(artifacts).files) == {*CONTENT, *LOG}
    assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}
    assert not (artifacts.folder(REF) / SCRATCH).exists()


def test_only_the_scratch_folder_is_left_out(artifacts: Artifacts) -> None:
    assert "scratchpad.txt" in seal(artifacts, {**CONTENT, "scratchpad.txt": b"kept"}).files


def test_an_unsealed_folder_in_the_final_place_is_never_read_and_gets_replaced(artifacts: Artifacts) -> None:
    folder = artifacts.folder(REF)
    (folder / "sub").mkdir(parents=True)
    (folder / "stack.safetensors").write_bytes(CONTENT["stack.safetensors"])
    (folder / "sub/stranger").write_bytes(b"?")
    assert artifacts.state(REF) is State.ABSENT
    for read in (artifacts.manifest, artifacts.checked, artifacts.input_entry):
        with pytest.raises(ArtifactUnsealedError, match="was never sealed") as caught:
            read(REF)
        assert str(folder) in str(caught.value)
        assert "stackwise train" in caught.value.remedy
    assert artifacts.everything() == []
    seal(artifacts)
    assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}
    assert os.listdir(artifacts.root / "trash") == []


def test_a_sealed_artifact_of_another_id_under_this_name_is_not_it(artifacts: Artifacts) -> None:
    """Names carry 12 digits of the hash; the whole of it is compared on opening."""
    seal(artifacts)
    twin = REF.model_copy(update={"sha256": REF.sha256[:12] + "0" * 52})
    assert artifacts.folder(twin) == artifacts.folder(REF)
    assert artifacts.state(twin) is State.CORRUPT
    with pytest.raises(ArtifactCorruptError, match=f"belongs to {REF.name}"):
        artifacts.checked(twin)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [name for name, data in {**CONTENT, **LOG}.items() if data])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "longer", "a folder"])
def test_a_file_of_another_size_is_corrupt(name: str, damage: str, artifacts: Artifacts) -> None:
    seal(artifacts)
    path = artifacts.folder(REF) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "deleted":
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"x"}[damage])
    assert artifacts.state(REF) is State.CORRUPT
    problem = "is missing from a sealed artifact" if damage == "deleted" else rf"bytes, sealed with {len(data)}"
    for read in (artifacts.manifest, artifacts.checked, artifacts.input_entry):
        with pytest.raises(ArtifactCorruptError, match=problem) as caught:
            read(REF)
        assert caught.value.path == path
        assert f"Remove {artifacts.folder(REF)} and run the same command again" in str(caught.value)
        assert caught.value.exit_code == 3


def test_a_folder_that_became_a_file_is_corrupt(artifacts: Artifacts) -> None:
    seal(artifacts)
    shutil.rmtree(artifacts.folder(REF) / "sub")
    assert artifacts.state(REF) is State.CORRUPT


def test_a_file_in_the_place_of_a_subfolder_is_corrupt(artifacts: Artifacts) -> None:
    seal(artifacts)
    shutil.rmtree(artifacts.folder(REF) / "sub")
    (artifacts.folder(REF) / "sub").touch()
    assert artifacts.state(REF) is State.CORRUPT


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_damaged_manifest_is_corrupt(text: str, artifacts: Artifacts) -> None:
    seal(artifacts)
    (artifacts.folder(REF) / MANIFEST).write_text(text)
    assert artifacts.state(REF) is State.CORRUPT
    with pytest.raises(ArtifactCorruptError, match="is no manifest"):
        artifacts.manifest(REF)


def test_one_flipped_bit_in_any_file_is_caught(artifacts: Artifacts) -> None:
    seal(artifacts)
    folder = artifacts.folder(REF)
    for name, data in {**CONTENT, **LOG}.items():
        for position in range(len(data)):
            flip(folder / name, position)
            with pytest.raises(ArtifactCorruptError, match=r"checksum sha256:\w+, sealed with sha256:") as caught:
                Artifacts(artifacts.root).checked(REF)
            assert caught.value.path == folder / name
            flip(folder / name, position)
    assert Artifacts(artifacts.root).checked(REF) == folder


def test_a_file_that_was_not_sealed_is_caught(artifacts: Artifacts) -> None:
    seal(artifacts)
    (artifacts.folder(REF) / "sub/planted").touch()
    with pytest.raises(ArtifactCorruptError, match="sub/planted: not in the sealed list"):
        artifacts.checked(REF)


def test_bytes_are_compared_again_after_a_remake(artifacts: Artifacts) -> None:
    """Once per digest, so that loading a rack of many stacks reads each file twice, not more often."""
    seal(artifacts)
    artifacts.checked(REF)
    artifacts.discard(REF)
    seal(artifacts, OTHER_CONTENT)
    flip(artifacts.folder(REF) / "fresh", 0)
    with pytest.raises(ArtifactCorruptError, match="fresh: checksum"):
        artifacts.checked(REF)


# ---------------------------------------------------------------- a forced attempt


def test_an_equal_forced_attempt_leaves_the_old_folder_untouched(artifacts: Artifacts) -> None:
    first = seal(artifacts)
    folder = artifacts.folder(REF)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}
    again = seal(artifacts, logs={"metrics.jsonl": b"other timings"})
    assert again == first
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))} == before
    assert os.listdir(artifacts.root / "work") == os.listdir(artifacts.root / "trash") == []


def test_a_different_forced_attempt_takes_the_place(artifacts: Artifacts) -> None:
    first = seal(artifacts)
    second = seal(artifacts, OTHER_CONTENT)
    assert second.digest != first.digest
    assert content(artifacts.checked(REF), MANIFEST) == {**OTHER_CONTENT, **LOG}
    assert os.listdir(artifacts.root / "trash") == []


@pytest.mark.parametrize("damage", ["truncated", "retired", "manifest"])
def test_an_equal_attempt_replaces_what_is_no_longer_whole(damage: str, artifacts: Artifacts) -> None:
    seal(artifacts)
    folder = artifacts.folder(REF)
    if damage == "truncated":
        os.truncate(folder / "stack.safetensors", 3)
    elif damage == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        artifacts.retire(REF)
    assert artifacts.state(REF) is not State.SEALED
    seal(artifacts)
    assert artifacts.state(REF) is State.SEALED
    assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}


def test_an_equal_attempt_mends_a_flipped_bit(artifacts: Artifacts) -> None:
    seal(artifacts)
    flip(artifacts.folder(REF) / "stack.safetensors", 5)
    seal(artifacts)
    assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}


def test_promote_finishes_a_seal_and_does_nothing_without_a_manifest(artifacts: Artifacts) -> None:
    assert not artifacts.promote(REF)
    work = fill_work(artifacts, CONTENT)
    assert not artifacts.promote(REF)
    assert content(work) == CONTENT
    seal(artifacts)
    os.replace(artifacts.folder(REF), work)  # as if killed just before the rename
    (work / SCRATCH).mkdir()
    assert artifacts.state(REF) is State.ABSENT
    assert artifacts.promote(REF)
    assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}
    assert not artifacts.promote(REF)


def test_promote_refuses_the_work_of_another_id(artifacts: Artifacts) -> None:
    seal(artifacts)
    other = PLAN.stages[0].ref("stack")
    os.replace(artifacts.folder(REF), artifacts.root / "work" / other.name)
    with pytest.raises(ArtifactCorruptError, match="belongs to"):
        artifacts.promote(other)
    assert artifacts.state(other) is State.ABSENT


# ---------------------------------------------------------------- retire, quarantine, discard


def test_retiring_keeps_the_manifest_and_drops_the_data(artifacts: Artifacts) -> None:
    artifacts.retire(REF)  # nothing there: nothing happens
    assert not artifacts.folder(REF).exists()
    manifest = seal(artifacts)
    artifacts.retire(REF)
    folder = artifacts.folder(REF)
    assert artifacts.state(REF) is State.RETIRED
    assert {path.name for path in folder.iterdir()} == {MANIFEST, RETIRED}
    assert Manifest.model_validate_json((folder / MANIFEST).read_bytes()) == manifest
    for read in (artifacts.manifest, artifacts.checked, artifacts.input_entry):
        with pytest.raises(ArtifactMissingError, match="was retired: its data was dropped on purpose"):
            read(REF)
    when = (folder / RETIRED).read_bytes()
    artifacts.retire(REF)
    assert (folder / RETIRED).read_bytes() == when
    assert artifacts.state(REF) is State.RETIRED
    assert os.listdir(artifacts.root / "trash") == []


def test_retiring_goes_on_where_a_kill_stopped_it(artifacts: Artifacts) -> None:
    seal(artifacts)
    folder = artifacts.folder(REF)
    (folder / RETIRED).write_text("{}")  # marked, and nothing dropped yet
    assert artifacts.state(REF) is State.RETIRED
    artifacts.retire(REF)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, RETIRED}


def test_quarantine_keeps_everything_and_the_reason(artifacts: Artifacts) -> None:
    seal(artifacts)
    target = Path(artifacts.quarantine(REF, "row 3 differs"))
    assert target.parent == artifacts.root / "quarantine"
    assert artifacts.state(REF) is State.ABSENT
    assert (target / "reason.txt").read_text() == "row 3 differs\n"
    assert content(target, MANIFEST, "reason.txt") == {**CONTENT, **LOG}
    assert artifacts.everything() == []
    seal(artifacts)
    second = Path(artifacts.quarantine(REF, "again"))
    assert second != target
    assert (target / "reason.txt").read_text() == "row 3 differs\n"


def test_discarding_removes_sealed_and_unsealed_and_forgives_absence(artifacts: Artifacts) -> None:
    artifacts.discard(REF)
    seal(artifacts)
    artifacts.discard(REF)
    assert artifacts.state(REF) is State.ABSENT
    work = fill_work(artifacts, {**CONTENT, f"{SCRATCH}/x": b""})
    artifacts.discard_work(REF)
    assert not work.exists()
    artifacts.discard_work(REF)
    assert content(artifacts.root / "trash") == {}


# ---------------------------------------------------------------- killed at every step


def assert_sealed(artifacts: Artifacts, files: dict[str, bytes] = CONTENT) -> None:
    assert artifacts.state(REF) is State.SEALED
    assert content(Artifacts(artifacts.root).checked(REF), MANIFEST) == {**files, **LOG}
    assert not (artifacts.root / "work" / REF.name).exists()


class Seal:
    """Two files and a log, sealed; a checkpoint lies in scratch."""

    files = CONTENT

    @staticmethod
    def prepare(folder: Path) -> None:
        fill_work(Artifacts(folder).open(), {**CONTENT, **LOG, f"{SCRATCH}/state": b"step 7"})

    @classmethod
    def act(cls, folder: Path) -> None:
        Artifacts(folder).seal(REF, STAGE.stack, (), {}, {}, records=tuple(LOG))

    @classmethod
    def check(cls, folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        state, work = artifacts.state(REF), folder / "work" / REF.name
        assert state in ((State.SEALED,) if finished else (State.ABSENT, State.SEALED))
        if state is State.ABSENT:
            data = content(work, MANIFEST, f"{MANIFEST}.tmp")
            assert data.pop(f"{SCRATCH}/state", b"step 7") == b"step 7"
            assert data == {**cls.files, **LOG}
            with pytest.raises((ArtifactMissingError, ArtifactUnsealedError)):
                artifacts.manifest(REF)
            if not artifacts.promote(REF):  # as every task begins
                assert content(work)[f"{SCRATCH}/state"] == b"step 7"  # a task goes on from here
                cls.act(folder)
        assert_sealed(artifacts, cls.files)


class SealOverLitter(Seal):
    """The same, where an unsealed folder stands in the final place."""

    @staticmethod
    def prepare(folder: Path) -> None:
        Seal.prepare(folder)
        (folder / "stacks" / REF.name / "sub").mkdir(parents=True)
        (folder / "stacks" / REF.name / "sub/stranger").touch()


class SealAgain(Seal):
    """A forced attempt that gives the same bytes."""

    @staticmethod
    def prepare(folder: Path) -> None:
        seal(Artifacts(folder).open())
        Seal.prepare(folder)

    @classmethod
    def check(cls, folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        assert artifacts.state(REF) is State.SEALED
        assert content(artifacts.checked(REF), MANIFEST) == {**CONTENT, **LOG}
        artifacts.promote(REF)
        artifacts.discard_work(REF)  # as a forced attempt begins
        assert_sealed(artifacts)


class SealAnother(Seal):
    """A forced attempt that gives other bytes."""

    files = OTHER_CONTENT

    @staticmethod
    def prepare(folder: Path) -> None:
        seal(Artifacts(folder).open())
        fill_work(Artifacts(folder), {**OTHER_CONTENT, **LOG})

    @classmethod
    def check(cls, folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        if artifacts.state(REF) is State.ABSENT:
            assert artifacts.promote(REF)  # the old one goes only when the new one is whole
            assert_sealed(artifacts, OTHER_CONTENT)
            return
        assert artifacts.state(REF) is State.SEALED
        found = content(artifacts.checked(REF), MANIFEST)
        assert found == {**OTHER_CONTENT, **LOG} or (found == {**CONTENT, **LOG} and not finished)
        if found == {**CONTENT, **LOG}:
            assert content(folder / "work" / REF.name, MANIFEST, f"{MANIFEST}.tmp") == {**OTHER_CONTENT, **LOG}


class Retire:
    """A sealed artifact that is retired."""

    @staticmethod
    def prepare(folder: Path) -> None:
        seal(Artifacts(folder).open())

    @staticmethod
    def act(folder: Path) -> None:
        Artifacts(folder).retire(REF)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        state = artifacts.state(REF)
        assert state in ((State.RETIRED,) if finished else (State.SEALED, State.RETIRED))
        if state is State.SEALED:
            found = content(artifacts.folder(REF), MANIFEST, f"{RETIRED}.tmp")
            assert found == {**CONTENT, **LOG}
        artifacts.retire(REF)
        assert {path.name for path in artifacts.folder(REF).iterdir()} == {MANIFEST, RETIRED}


class RetireStaysChecked(Retire):
    """While it is not yet retired it can be read."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        if artifacts.state(REF) is State.SEALED:
            artifacts.checked(REF)


class RetireLeavesNoTrash(Retire):
    """What a killed process had thrown away does not fill the disk for ever."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder).open()
        artifacts.retire(REF)
        assert content(folder / "trash") == {}


class Quarantine:
    """A sealed artifact that is put away."""

    prepare = Retire.prepare

    @staticmethod
    def act(folder: Path) -> None:
        Artifacts(folder).quarantine(REF, "row 3 differs")

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        if artifacts.state(REF) is State.SEALED:
            assert not finished
            artifacts.quarantine(REF, "row 3 differs")
        assert artifacts.state(REF) is State.ABSENT
        (target,) = (folder / "quarantine").iterdir()
        assert content(target, MANIFEST) == {**CONTENT, **LOG, "reason.txt": b"row 3 differs\n"}
        seal(artifacts)
        assert_sealed(artifacts)


@pytest.mark.parametrize(
    ("story", "least"),
    [
        (Seal, {"rename": 2, "fsync": 10, "write": 1}),
        (SealOverLitter, {"rename": 3, "fsync": 11, "rmdir": 2}),
        (SealAgain, {"rename": 2, "fsync": 10, "remove": 5}),
        (SealAnother, {"rename": 3, "fsync": 9, "remove": 5}),
        (Retire, {"rename": 5, "remove": 4}),
        (Quarantine, {"rename": 2, "fsync": 4}),
    ],
)
def test_killed_at_any_step_it_is_sealed_whole_or_can_be_made_again(story: type[Story], least: dict[str, int]) -> None:
    died = die_everywhere(story)
    assert {kind: died[kind] for kind in least if died[kind] < least[kind]} == {}, died


def test_killed_while_retiring_it_is_still_as_sealed() -> None:
    die_everywhere(RetireStaysChecked)


def test_trash_of_a_killed_process_is_emptied() -> None:
    die_everywhere(RetireLeavesNoTrash)


@pytest.mark.parametrize("what", ["a folder", "a file"])
def test_trash_that_another_process_emptied_is_gone_as_it_should_be(
    what: str, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may start at any moment, and so also between a rename into trash/ and its deletion."""
    seal(artifacts, CONTENT if what == "a folder" else {"file": b"x"}, {})
    sync = local.sync

    def sync_while_another_run_starts(path: Path) -> None:
        sync(path)
        Artifacts(artifacts.root).open()

    monkeypatch.setattr(local, "sync", sync_while_another_run_starts)
    artifacts.retire(REF) if what == "a file" else artifacts.discard(REF)
    assert artifacts.state(REF) is (State.RETIRED if what == "a file" else State.ABSENT)
    assert content(artifacts.root / "trash") == {}


def test_the_failpoint_kills_between_manifest_and_rename(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    for elsewhere in ("promote-build:1:KILL", "promote-stack:0:KILL", "seal-stack:1:KILL"):
        monkeypatch.setenv("STACKWISE_FAILPOINT", elsewhere)
        seal(artifacts)  # this very process goes on
        artifacts.discard(REF)
    code = "import sys; sys.path.insert(0, 'tests');"
    code += "from support.artifacts import Artifacts, seal; seal(Artifacts(sys.argv[1]))"
    monkeypatch.setenv("STACKWISE_FAILPOINT", "promote-stack:1:KILL")
    done = subprocess.run([sys.executable, "-c", code, str(artifacts.root)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert artifacts.state(REF) is State.ABSENT
    assert (artifacts.work(REF) / MANIFEST).exists()
    assert artifacts.promote(REF)
    assert_sealed(artifacts)


# ---------------------------------------------------------------- the folder itself


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


def test_rooms_on_two_file_systems_are_refused(tmp_path: Path) -> None:
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
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ArtifactsFolderError, match=f"--artifacts {path}: there is no such folder"):
            Artifacts(path).existing()
    assert not (tmp_path / "nothing").exists()


def test_names_tell_what_they_are_and_stay_in_their_room(artifacts: Artifacts) -> None:
    for ref in (PLAN.data_ref, *(stage.ref(kind) for stage in PLAN.stages[:2] for kind in list(FOLDERS)[1:])):
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
