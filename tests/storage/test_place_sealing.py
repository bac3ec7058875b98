"""How every place, a folder as well as a bucket, seals artifacts, retires and quarantines them, and serves stores."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import Ref
from storage.artifacts import State
from storage.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingError
from storage.inventory import survey
from storage.quarantine import drop, find_quarantined, quarantined, release
from storage.stores import open_store
from support.artifacts import CONTENT, LOG, OTHER_CONTENT
from support.places import (
    OTHER,
    PLAN,
    REF,
    STAGE,
    STORE,
    Place,
    caught,
    contents,
    damage,
    fill,
    killed_at,
    meanwhile,
    only_in_a_bucket,
    refused,
    seal,
)
from support.stores import same_bits, small_store

pytestmark = pytest.mark.usefixtures("quick_disk", "no_patience")


# ---------------------------------------------------------------- seal


def test_litter_is_never_sealed(place: Place) -> None:
    litter = ["a.tmp", "sub/b.tmp", "c.tmp/d", ".DS_Store", "sub/.hidden", ".git/config", "scratch/checkpoint/state"]
    fill(place.here, dict.fromkeys(litter, b"litter"))
    seal(place.here, {**CONTENT, "scratchpad": b"kept", "sub/scratch": b"kept"})
    kept = {"scratchpad": b"kept", "sub/scratch": b"kept"}
    assert place.files(REF).keys() - {"manifest.json"} == {*CONTENT, *LOG, *kept}
    assert contents(place.there) == {**CONTENT, **LOG, **kept}


def test_content_is_in_the_digest_and_records_are_not(place: Place) -> None:
    first = seal(place.here)
    assert {name for name, entry in first.files.items() if entry.content} == {*CONTENT}
    for name, data in {**CONTENT, **LOG}.items():
        assert first.checksums()[name] == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    other_log = seal(place.here, {**CONTENT, "metrics.jsonl": b"slower"}, OTHER)
    assert other_log.digest == first.digest
    place.here.discard(OTHER)
    assert seal(place.here, {**CONTENT, "empty": b"x"}, OTHER).digest != first.digest


def test_checksums_that_are_given_are_not_made_again(place: Place) -> None:
    """The writer of a store hashes what it writes; a disk that changed it since must not bless it."""
    fill(place.here, {"a": b"as the disk has it"})
    checksums = {"a": (18, "sha256:" + "a" * 64), "not there": (1, "sha256:" + "b" * 64)}
    manifest = place.here.seal(REF, STAGE.stack, (), {}, {}, checksums=checksums)
    assert manifest.checksums() == {"a": checksums["a"]}
    assert "checksum sha256:" in caught(ArtifactCorruptError, place.there.checked).problem


def test_an_equal_forced_attempt_keeps_the_first(place: Place) -> None:
    first, before = seal(place.here, attempt=1), place.sums()
    assert seal(place.here, attempt=2) == first
    assert place.sums() == before


def test_an_equal_attempt_of_another_machine_is_the_first_ones(place: Place) -> None:
    place.there.work(REF)  # both began while there was nothing
    first, before = seal(place.here, attempt=1), place.sums()
    assert seal(place.there, attempt=2) == first
    assert place.sums() == before
    assert contents(place.there) == contents(place.here) == {**CONTENT, **LOG}


def test_of_two_who_made_other_bytes_one_is_sealed_whole(place: Place) -> None:
    place.there.work(REF)
    made = [CONTENT, OTHER_CONTENT]
    found = [seal(artifacts, files) for artifacts, files in zip((place.here, place.there), made, strict=True)]
    won = place.expected.winner
    assert found[1] == found[won] == place.open().manifest(REF)
    for artifacts in (place.here, place.there, place.open()):
        assert contents(artifacts) == {**made[won], **LOG}
    assert place.files(REF).keys() == {*made[won], *LOG, "manifest.json"}


@only_in_a_bucket
@pytest.mark.parametrize("before", ["nothing", "sealed", "retired"])
def test_who_seals_at_the_last_moment_has_won(before: str, place: Place) -> None:
    if before != "nothing":
        seal(place.here, {"first": b"1"}, STORE)
    if before == "retired":
        place.here.retire(STORE)
    place.there.work(STORE)  # both began when it was so; then all is put, but for the manifest
    with meanwhile("upload-activations:4", lambda: seal(place.there, OTHER_CONTENT, STORE)):
        found = seal(place.here, ref=STORE)
    for artifacts in (place.here, place.there):
        assert artifacts.manifest(STORE) == found
        assert contents(artifacts, STORE) == {**OTHER_CONTENT, **LOG}
    assert place.files(STORE).keys() == {*OTHER_CONTENT, *LOG, "manifest.json"}


@pytest.mark.parametrize("by", ["here", "there"])
def test_a_forced_attempt_with_other_bytes_replaces(by: str, place: Place) -> None:
    first = seal(place.here)
    assert contents(place.there) == {**CONTENT, **LOG}
    second = seal(getattr(place, by), OTHER_CONTENT)
    assert second.digest != first.digest
    for artifacts in (place.here, place.there, place.open()):
        assert artifacts.manifest(REF) == second
        assert contents(artifacts) == {**OTHER_CONTENT, **LOG}
    assert place.files(REF).keys() == {*OTHER_CONTENT, *LOG, "manifest.json"}


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_an_equal_attempt_mends_what_is_no_longer_whole(how: str, place: Place) -> None:
    seal(place.here, attempt=1)
    place.damage(REF, "stack.safetensors", how)
    seal(place.there, attempt=2)
    assert contents(place.open()) == {**CONTENT, **LOG}
    assert place.files(REF).keys() == {*CONTENT, *LOG, "manifest.json"}


def test_an_attempt_replaces_what_has_a_damaged_manifest(place: Place) -> None:
    seal(place.here)
    place.write(place.key(REF, "manifest.json"), b"{")
    seal(place.there)
    assert contents(place.open()) == {**CONTENT, **LOG}


def test_what_was_discarded_is_absent_for_everybody(place: Place) -> None:
    place.here.discard(REF)  # nothing there: nothing happens
    seal(place.here)
    assert place.there.state(REF) is State.SEALED
    place.there.discard(REF)
    for artifacts in (place.here, place.there):
        refused(ArtifactMissingError, artifacts)
    assert place.sums() == {}


# ---------------------------------------------------------------- killed before the seal


def test_promote_needs_a_manifest(place: Place) -> None:
    assert not place.here.promote(REF)
    fill(place.here, CONTENT)
    assert not place.here.promote(REF)
    assert place.here.state(REF) is State.ABSENT
    assert {name: (place.here.work(REF) / name).read_bytes() for name in CONTENT} == CONTENT


def test_killed_before_the_seal_the_next_process_finishes_it(place: Place) -> None:
    for number, failpoint in enumerate(place.expected.kills):
        with killed_at(failpoint):
            seal(place.here, number=number)
        assert place.there.state(REF) is State.ABSENT
        assert place.there.everything() == []
        again = place.open("here")
        assert again.state(REF) is State.ABSENT
        assert again.promote(REF)  # what a task calls before it begins
        assert not again.promote(REF)
        assert place.there.manifest(REF).facts == {"number": number}
        assert contents(place.there) == {**CONTENT, **LOG}
        assert place.files(REF).keys() == {*CONTENT, *LOG, "manifest.json"}
        again.discard(REF)


def test_promote_refuses_the_work_of_another_id(place: Place) -> None:
    seal(place.here)
    (place.here.work(OTHER) / "manifest.json").write_bytes(place.files(REF)["manifest.json"])
    assert f"belongs to {REF.name}" in str(caught(ArtifactCorruptError, place.here.promote, OTHER))
    assert place.there.state(OTHER) is State.ABSENT


def test_work_that_was_discarded_begins_at_the_beginning(place: Place) -> None:
    fill(place.here, OTHER_CONTENT)
    place.here.discard_work(REF)
    seal(place.here)
    assert contents(place.there) == {**CONTENT, **LOG}


# ---------------------------------------------------------------- retire


def test_what_is_retired_is_read_by_nobody_and_still_known(place: Place) -> None:
    place.here.retire(STORE)  # nothing there: nothing happens
    assert place.sums() == {}
    manifest = seal(place.here, ref=STORE)
    assert contents(place.there, STORE) == {**CONTENT, **LOG}
    place.here.retire(STORE)
    for artifacts in (place.here, place.there, place.open()):
        assert artifacts.state(STORE) is State.RETIRED
        error = refused(ArtifactMissingError, artifacts, STORE)
        assert str(error).startswith(f"{place.called(STORE)}: was retired: its data was dropped on purpose. ")
        assert "stackwise train" in error.remedy
        assert artifacts.known(STORE) == manifest
        assert [folder.name for folder in artifacts.everything()] == [STORE.name]
    assert place.files(STORE).keys() == {"manifest.json", "retired.json"}


def test_retiring_twice_changes_nothing_and_once_more_finishes(place: Place) -> None:
    seal(place.here, ref=STORE)
    place.here.retire(STORE)
    before = place.sums()
    place.there.retire(STORE)
    assert place.sums() == before
    place.write(place.key(STORE, "stack.safetensors"), b"left by a kill")
    assert place.there.state(STORE) is State.RETIRED
    place.there.retire(STORE)
    assert place.sums() == before


@pytest.mark.parametrize(("ref", "marker"), [(REF, b'{"retired": "2026-01-31T09:30:00+00:00"}'), (STORE, b"")])
def test_a_stray_marker_retires_nothing_anywhere(ref: Ref, marker: bytes, place: Place) -> None:
    seal(place.here, ref=ref)
    place.write(place.key(ref, "retired.json"), marker)
    for artifacts in (place.here, place.there):
        assert artifacts.state(ref) is State.SEALED
        assert [found.standing for found in survey(artifacts)] == ["sealed"]
        (problem,) = artifacts.verify(artifacts.folder(ref))[0]
        assert "retired.json: not in the sealed list" in problem


@pytest.mark.parametrize("files", [CONTENT, OTHER_CONTENT])
def test_what_was_retired_can_be_made_again(files: dict[str, bytes], place: Place) -> None:
    seal(place.here, ref=STORE, attempt=1)
    place.here.retire(STORE)
    manifest = seal(place.there, files, STORE, attempt=2)
    for artifacts in (place.here, place.there):
        assert artifacts.state(STORE) is State.SEALED
        assert artifacts.manifest(STORE) == manifest
        assert contents(artifacts, STORE) == {**files, **LOG}
    assert place.files(STORE).keys() == {*files, *LOG, "manifest.json"}


# ---------------------------------------------------------------- quarantine


def test_quarantined_it_is_out_of_reach_listed_and_released_as_it_was(place: Place) -> None:
    manifest, before = seal(place.here), place.sums()
    where = place.here.quarantine(REF, "two rows differ")
    for artifacts in (place.here, place.there):
        assert artifacts.state(REF) is State.ABSENT
        assert artifacts.everything() == []
    refused(ArtifactMissingError, place.there)
    (entry,) = quarantined(place.there)
    assert str(where) == f"{place.uri}/quarantine/{entry.path.name}"
    assert entry.path.name.startswith(REF.name)
    assert (entry.reason, entry.n_bytes) == ("two rows differ", place.n_bytes)
    assert find_quarantined(place.there, REF.name) == entry.path
    assert release(place.there, entry.path) == manifest
    assert place.sums() == before
    assert quarantined(place.here) == []
    assert contents(place.open()) == {**CONTENT, **LOG}


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("flipped", "stack.safetensors"),
        ("cut off", "metrics.jsonl"),
        ("missing", "sub/deep/head.safetensors"),
        ("flipped", "manifest.json"),
        ("missing", "manifest.json"),
    ],
)
def test_what_was_damaged_in_quarantine_is_not_released(how: str, name: str, place: Place) -> None:
    seal(place.here)
    place.here.quarantine(REF, "two rows differ")
    (key,) = (key for key in place.sums() if key.endswith(f"/{name}"))
    damage(place, key, how)
    before = place.sums()
    with pytest.raises(ArtifactError) as found:
        release(place.there, find_quarantined(place.there, REF.name))
    assert found.value.exit_code == 3
    assert f"{place.uri}/{key.partition(name)[0]}".rstrip("/") in f"{found.value.path}"
    assert place.sums() == before
    assert place.open().state(REF) is State.ABSENT


def test_it_is_not_released_over_another(place: Place) -> None:
    seal(place.here)
    place.here.quarantine(REF, "two rows differ")
    seal(place.here, OTHER_CONTENT)
    before = place.sums()
    with pytest.raises(ConfigError, match="is there, sealed") as found:
        release(place.there, find_quarantined(place.there, REF.name))
    assert found.value.exit_code == 2
    assert place.called(REF) in str(found.value)
    assert place.sums() == before


def test_dropped_it_is_gone_and_a_name_must_tell_which(place: Place) -> None:
    for attempt in (1, 2):
        seal(place.here, attempt=attempt)
        place.here.quarantine(REF, f"attempt {attempt}")
    assert {entry.reason for entry in quarantined(place.there)} == {"attempt 1", "attempt 2"}
    with pytest.raises(ConfigError, match="2 in quarantine begin so"):
        find_quarantined(place.there, REF.name)
    first = next(entry for entry in quarantined(place.there) if entry.reason == "attempt 1")
    drop(place.there, find_quarantined(place.there, first.path.name))
    assert [entry.reason for entry in quarantined(place.here)] == ["attempt 2"]
    drop(place.here, find_quarantined(place.here, REF.name))
    assert place.sums() == {}
    with pytest.raises(ArtifactMissingError, match=f"{place.uri}/quarantine"):
        find_quarantined(place.here, REF.name)


def test_what_is_absent_is_not_quarantined(place: Place) -> None:
    with pytest.raises(ArtifactMissingError, match=place.called(REF)):
        place.here.quarantine(REF, "two rows differ")
    assert place.sums() == {}


# ---------------------------------------------------------------- activation stores


@pytest.fixture
def with_store(place: Place) -> Place:
    checksums = small_store().write(place.here.work(STORE))
    place.here.seal(STORE, PLAN.recipes[STORE], (), {}, {}, checksums=checksums)
    return place


def test_a_store_gives_the_rows_that_were_written(with_store: Place) -> None:
    store = small_store()
    for artifacts in (with_store.here, with_store.there):
        with open_store(artifacts, STORE) as reader:
            for group, spec in store.specs.items():
                for rows in (np.arange(spec.rows), np.array([2, 0, 2, 1])):
                    assert same_bits(reader.read(group, rows), store.values[group][rows])


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_a_damaged_shard_gives_an_error_and_no_rows(how: str, with_store: Place) -> None:
    (name,) = (name for name in with_store.files(STORE) if name.endswith("zarr/activations/c.1.0.0"))
    where = with_store.damage(STORE, name, how)

    def read() -> None:
        with open_store(with_store.there, STORE) as reader:
            reader.read("train", [0, 4])

    with pytest.raises(ArtifactCorruptError) as found:
        read()
    assert where in str(found.value)
    assert with_store.called(STORE) in found.value.remedy


def test_a_retired_store_is_not_opened(with_store: Place) -> None:
    with_store.here.retire(STORE)
    with pytest.raises(ArtifactMissingError, match="was retired"):
        open_store(with_store.there, STORE)
