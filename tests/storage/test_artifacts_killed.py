"""Artifacts in a folder are sealed completely or not at all, wherever the process was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage import local
from storage.artifacts import SCRATCH, Artifacts, State
from storage.errors import ArtifactMissingError, ArtifactUnsealedError
from storage.manifest import MANIFEST
from storage.retirement import RETIRED
from support.artifacts import CONTENT, LOG, OTHER_CONTENT, REF, STAGE, STORE, content, fill_work, seal
from support.disk import ROOT, Story, die_everywhere

pytestmark = pytest.mark.usefixtures("quick_disk")


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
        seal(Artifacts(folder).open(), ref=STORE)

    @staticmethod
    def act(folder: Path) -> None:
        Artifacts(folder).retire(STORE)

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        state = artifacts.state(STORE)
        assert state in ((State.RETIRED,) if finished else (State.SEALED, State.RETIRED))
        if state is State.SEALED:
            found = content(artifacts.folder(STORE), MANIFEST, f"{RETIRED}.tmp")
            assert found == {**CONTENT, **LOG}
        artifacts.retire(STORE)
        assert {path.name for path in artifacts.folder(STORE).iterdir()} == {MANIFEST, RETIRED}


class RetireStaysChecked(Retire):
    """While it is not yet retired it can be read."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder)
        if artifacts.state(STORE) is State.SEALED:
            artifacts.checked(STORE)


class RetireLeavesNoTrash(Retire):
    """What a killed process had thrown away does not fill the disk for ever."""

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        artifacts = Artifacts(folder).open()
        artifacts.retire(STORE)
        assert content(folder / "trash") == {}


class Quarantine:
    """A sealed artifact that is put away."""

    @staticmethod
    def prepare(folder: Path) -> None:
        seal(Artifacts(folder).open())

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
    seal(artifacts, CONTENT if what == "a folder" else {"file": b"x"}, {}, STORE)
    sync = local.sync

    def sync_while_another_run_starts(path: Path) -> None:
        sync(path)
        Artifacts(artifacts.root).open()

    monkeypatch.setattr(local, "sync", sync_while_another_run_starts)
    artifacts.retire(STORE) if what == "a file" else artifacts.discard(STORE)
    assert artifacts.state(STORE) is (State.RETIRED if what == "a file" else State.ABSENT)
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
