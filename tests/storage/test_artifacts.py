"""Artifacts in a folder, from absent to sealed: damage, forced attempts, retirement, quarantine, removal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from stackwise_core.stages.identity import Ref
from storage.artifacts import SCRATCH, Artifacts, State
from storage.errors import ArtifactCorruptError, ArtifactMissingError, ArtifactUnsealedError
from storage.inventory import survey
from storage.manifest import MANIFEST, InputEntry, Manifest
from storage.retirement import RETIRED
from support.artifacts import CONTENT, LOG, OTHER_CONTENT, PLAN, REF, STAGE, STORE, content, fill_work, flip, seal

pytestmark = pytest.mark.usefixtures("quick_disk")


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
    is_there = damage not in ("deleted", "a folder")
    problem = "is missing from a sealed artifact" if not is_there else rf"bytes, sealed with {len(data)}"
    for read in (artifacts.manifest, artifacts.checked, artifacts.input_entry):
        with pytest.raises(ArtifactCorruptError, match=problem) as caught:
            read(REF)
        assert caught.value.path == path
        assert f"Remove {artifacts.folder(REF)} and run the command that made it again" in str(caught.value)
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
    seal(artifacts, ref=STORE)
    folder = artifacts.folder(STORE)
    if damage == "truncated":
        os.truncate(folder / "stack.safetensors", 3)
    elif damage == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        artifacts.retire(STORE)
    assert artifacts.state(STORE) is not State.SEALED
    seal(artifacts, ref=STORE)
    assert artifacts.state(STORE) is State.SEALED
    assert content(artifacts.checked(STORE), MANIFEST) == {**CONTENT, **LOG}


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
    artifacts.retire(STORE)  # nothing there: nothing happens
    assert not artifacts.folder(STORE).exists()
    manifest = seal(artifacts, ref=STORE)
    artifacts.retire(STORE)
    folder = artifacts.folder(STORE)
    assert artifacts.state(STORE) is State.RETIRED
    assert {path.name for path in folder.iterdir()} == {MANIFEST, RETIRED}
    assert Manifest.model_validate_json((folder / MANIFEST).read_bytes()) == manifest
    for read in (artifacts.manifest, artifacts.checked, artifacts.input_entry):
        with pytest.raises(ArtifactMissingError, match="was retired: its data was dropped on purpose"):
            read(STORE)
    when = (folder / RETIRED).read_bytes()
    artifacts.retire(STORE)
    assert (folder / RETIRED).read_bytes() == when
    assert artifacts.state(STORE) is State.RETIRED
    assert os.listdir(artifacts.root / "trash") == []


def test_retiring_goes_on_where_a_kill_stopped_it(artifacts: Artifacts) -> None:
    seal(artifacts, ref=STORE)
    folder = artifacts.folder(STORE)
    artifacts.mark_retired(STORE)  # and nothing dropped yet
    assert artifacts.state(STORE) is State.RETIRED
    artifacts.retire(STORE)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, RETIRED}


OLD = b'{"retired": "2026-01-31T09:30:00+00:00"}'
"""What version 0.1 wrote."""


def test_a_store_that_an_older_version_retired_stays_so(artifacts: Artifacts) -> None:
    seal(artifacts, ref=STORE)
    (artifacts.folder(STORE) / RETIRED).write_bytes(OLD)
    assert artifacts.state(STORE) is State.RETIRED


@pytest.mark.parametrize(
    ("ref", "marker"),
    [
        (REF, OLD),
        (REF, b""),
        (STORE, b""),
        (STORE, b"{}"),
        (STORE, OLD[:-9] + b'x"}'),
        (STORE, OLD[:-1] + b', "seal": ""}'),
    ],
)
def test_a_stray_marker_retires_nothing_and_is_told(ref: Ref, marker: bytes, artifacts: Artifacts) -> None:
    """Neither does it hide a flipped bit, nor does gc drop what it stands beside."""
    seal(artifacts, ref=ref)
    folder = artifacts.folder(ref)
    (folder / RETIRED).write_bytes(marker)
    flip(folder / "stack.safetensors", 5)
    assert artifacts.state(ref) is State.SEALED
    problems, _ = artifacts.verify(folder)
    assert ["checksum" in problem for problem in problems] == [True, False]
    assert problems[1].startswith(f"{folder / RETIRED}: not in the sealed list. Remove it")
    (found,) = survey(artifacts)
    assert list(artifacts.place.leftovers(found.key, found.manifest, found.entries, found.standing == "retired")) == []


@pytest.mark.parametrize("position", range(0, 190, 19))
def test_a_statement_of_retirement_that_was_changed_is_none(position: int, artifacts: Artifacts) -> None:
    """The data is gone, so that the store is damaged; it is not taken for one that was retired at another time."""
    seal(artifacts, ref=STORE)
    artifacts.retire(STORE)
    flip(artifacts.folder(STORE) / RETIRED, position)
    assert artifacts.state(STORE) is State.CORRUPT


def test_what_cannot_be_made_again_from_the_rest_is_not_retired(artifacts: Artifacts) -> None:
    seal(artifacts)
    with pytest.raises(ValueError, match="not retired"):
        artifacts.retire(REF)
    assert artifacts.checked(REF)


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
