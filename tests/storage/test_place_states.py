"""What every place, a folder as well as a bucket, says of what is stored there: states, damage, inventory, names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import Ref
from storage.artifacts import State
from storage.copying import copy_artifact
from storage.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactNewerError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
)
from storage.inventory import Found, Inventory, survey
from storage.locks import no_wait
from storage.manifest import FileEntry, InputEntry, Manifest, make_manifest
from storage.runs import begin_attempt, find_run
from support.artifacts import CONTENT, LOG
from support.house import plan_of
from support.places import OTHER, PLAN, REF, ROOMS, STAGE, STORE, Place, caught, contents, fill, refused, seal

pytestmark = pytest.mark.usefixtures("quick_disk", "no_patience")


# ---------------------------------------------------------------- state


def test_reading_needs_a_place_that_is_there(place: Place) -> None:
    with pytest.raises(ArtifactsFolderError, match=f"--artifacts {place.uri}: .*`stackwise train` makes") as found:
        place.unopened().existing()
    assert found.value.exit_code == 2
    seal(place.here)
    assert place.unopened().existing().state(REF) is State.SEALED


def test_what_is_absent(place: Place) -> None:
    assert place.here.state(REF) is State.ABSENT
    assert place.here.known(REF) is None
    assert place.here.everything() == []
    error = refused(ArtifactMissingError, place.here)
    assert str(error).startswith(f"{place.called(REF)}: there is no such artifact. ")
    assert "stackwise train" in error.remedy


def test_what_was_never_sealed_is_not_read(place: Place) -> None:
    place.write(place.key(REF, "stack.safetensors"), CONTENT["stack.safetensors"])
    assert place.here.state(REF) is State.ABSENT
    assert place.here.known(REF) is None
    assert place.here.everything() == []
    error = refused(ArtifactUnsealedError, place.here)
    assert str(error).startswith(f"{place.called(REF)}: was never sealed")
    assert "stackwise train" in error.remedy
    seal(place.here)
    assert contents(place.open()) == {**CONTENT, **LOG}


def test_what_is_being_made_is_seen_by_nobody(place: Place) -> None:
    fill(place.here, CONTENT)
    for artifacts in (place.here, place.there):
        assert artifacts.state(REF) is State.ABSENT
        assert artifacts.everything() == []


def test_what_is_sealed_is_the_same_for_everybody(place: Place) -> None:
    manifest = seal(place.here, steps=3)
    assert (manifest.ref, manifest.facts, manifest.fingerprint) == (REF, {"steps": 3}, {"torch": "x"})
    assert manifest.inputs == (InputEntry(ref=PLAN.data_ref, digest="d" * 64),)
    for artifacts in (place.here, place.there):
        assert artifacts.state(REF) is State.SEALED
        assert artifacts.manifest(REF) == artifacts.sealed(REF) == artifacts.known(REF) == manifest
        assert artifacts.input_entry(REF) == InputEntry(ref=REF, digest=manifest.digest)
        assert [folder.name for folder in artifacts.everything()] == [REF.name]
        assert contents(artifacts) == {**CONTENT, **LOG}
    stored = place.files(REF)
    assert Manifest.model_validate_json(stored.pop("manifest.json")) == manifest
    assert stored == {**CONTENT, **LOG}


@pytest.mark.parametrize(
    ("how", "name"),
    [("missing", "sub/deep/head.safetensors"), ("cut off", "metrics.jsonl"), ("longer", "stack.safetensors")],
)
def test_a_file_that_is_missing_or_of_another_size_is_damage(how: str, name: str, place: Place) -> None:
    manifest = seal(place.here)
    where = place.damage(REF, name, how)
    assert place.there.state(REF) is State.CORRUPT
    assert place.there.known(REF) == manifest
    error = refused(ArtifactCorruptError, place.there)
    assert str(error).startswith(f"{where}: ")
    assert error.problem.startswith("is missing" if how == "missing" else "has ")
    assert place.called(REF) in error.remedy
    assert "run the command that made it again" in error.remedy


@pytest.mark.parametrize("name", ["stack.safetensors", "metrics.jsonl"])
def test_a_flipped_bit_is_found_when_bytes_are_compared(name: str, place: Place) -> None:
    seal(place.here)
    assert contents(place.open("reader")) == {**CONTENT, **LOG}
    where = place.damage(REF, name, "flipped")
    assert place.there.state(REF) is State.SEALED  # sizes alone do not tell
    error = caught(ArtifactCorruptError, place.there.checked)
    assert str(error).startswith(f"{where}: checksum sha256:")
    assert place.called(REF) in error.remedy
    caught(ArtifactCorruptError, place.there.checked)  # not only the first time


def test_a_file_that_was_not_sealed(place: Place) -> None:
    seal(place.here)
    place.write(place.key(REF, "sub/stranger"), b"?")
    stopped = False
    try:
        found = contents(place.there)
    except ArtifactCorruptError as error:
        stopped, found = "not in the sealed list" in str(error), {**CONTENT, **LOG}
    assert stopped == place.expected.strangers_stop_readers
    assert found == {**CONTENT, **LOG}


def _edited(field: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), field: value}).encode()


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "no json": lambda text: b"{" + text,
    "no manifest": lambda text: b"{}",
    "facts": _edited("facts", {"steps": 4}),
    "files": _edited("files", {}),
    "recipe": _edited("numerics", 9),
}


def test_an_edited_manifest_is_no_seal(place: Place) -> None:
    seal(place.here, steps=3)
    key = place.key(REF, "manifest.json")
    text = place.stored(key)[key]
    for edit in EDITS.values():
        place.write(key, edit(text))
        assert place.there.state(REF) is State.CORRUPT
        error = refused(ArtifactCorruptError, place.there)
        assert str(error).startswith(f"{place.uri}/{key}: ")
        assert place.called(REF) in error.remedy
        caught(ArtifactCorruptError, place.there.known)
    place.write(key, text)
    assert place.there.state(REF) is State.SEALED


def test_a_manifest_of_newer_code_is_left_to_newer_code(place: Place) -> None:
    seal(place.here)
    key = place.key(REF, "manifest.json")
    place.write(key, _edited("format_version", 2)(place.stored(key)[key]))
    assert place.there.state(REF) is State.CORRUPT
    assert "Use the version of StackWise that wrote it" in refused(ArtifactNewerError, place.there).remedy


def test_an_artifact_of_another_id_under_this_name_is_not_it(place: Place) -> None:
    """Names carry 12 digits of the hash; the whole of it is compared."""
    seal(place.here)
    twin = REF.model_copy(update={"sha256": REF.sha256[:12] + "0" * 52})
    assert twin.name == REF.name
    for artifacts in (place.here, place.there):
        assert artifacts.state(twin) is State.CORRUPT
        assert f"belongs to {REF.name}" in str(refused(ArtifactCorruptError, artifacts, twin))
        assert artifacts.state(REF) is State.SEALED


def test_everything_names_what_is_damaged_too(place: Place) -> None:
    """`verify` and `push` go by it: what they are not told of they pass over in silence."""
    seal(place.here)
    seal(place.here, ref=OTHER)
    place.write(place.key(REF, "manifest.json"), b"{")
    assert {folder.name for folder in place.open().everything()} == {REF.name, OTHER.name}


# ---------------------------------------------------------------- what is there


def test_survey_tells_what_each_thing_is_and_how_large(place: Place) -> None:
    sealed, retired, damaged = seal(place.here), seal(place.here, ref=STORE), seal(place.here, ref=OTHER)
    assert damaged.ref == OTHER
    place.here.retire(STORE)
    place.write(place.key(OTHER, "manifest.json"), b"{")
    unsealed = STAGE.ref("build")
    place.write(place.key(unsealed, "file"), b"1234567")
    place.write("stacks/a-friend/of-mine", b"12345")
    place.write("stacks/notes.txt", b"123")
    before = place.sums()
    found = {entry.path.name: entry for entry in survey(place.there)}
    assert {name: entry.standing for name, entry in found.items()} == {
        REF.name: "sealed",
        STORE.name: "retired",
        OTHER.name: "damaged",
        unsealed.name: "unsealed",
        "a-friend": "foreign",
        "notes.txt": "foreign",
    }
    assert (found[REF.name].manifest, found[STORE.name].manifest) == (sealed, retired)
    assert [name for name, entry in found.items() if entry.problem] == [
        name for name, entry in found.items() if entry.standing in ("damaged", "foreign")
    ]
    for entry in found.values():
        assert entry.n_bytes == _bytes_below(place, entry) > 0
    assert Inventory(place.there).n_bytes("stacks") == sum(
        n for key, (n, _) in before.items() if key.startswith("stacks/")
    )
    assert place.sums() == before


def _bytes_below(place: Place, entry: Found) -> int:
    key = f"{entry.path.parent.name}/{entry.path.name}"
    return sum(n for each, (n, _) in place.sums().items() if f"{each}/".startswith(f"{key}/"))


def test_survey_goes_by_room_and_name(place: Place) -> None:
    refs = [REF, OTHER, STORE, PLAN.data_ref]
    for ref in refs:
        place.write(place.key(ref, "file"), b"1")
    assert [entry.path.name for entry in survey(place.here)] == [
        ref.name for ref in sorted(refs, key=lambda ref: (list(ROOMS).index(ref.kind), ref.name))
    ]


def test_survey_takes_a_manifest_in_the_place_of_another_for_damage(place: Place) -> None:
    seal(place.here)
    place.write(place.key(OTHER, "manifest.json"), place.files(REF)["manifest.json"])
    found = {entry.path.name: entry for entry in survey(place.there)}
    assert found[OTHER.name].standing == "damaged"
    assert f"belongs to {REF.name}" in found[OTHER.name].problem


# ---------------------------------------------------------------- names that lead out


@pytest.mark.parametrize("name", ["../outside", "..", "a/b", "", ".hidden"])
def test_the_name_of_a_run_stays_in_its_room(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        plan_of(name)


def test_a_run_is_not_looked_for_outside(place: Place, new_place: Callable[..., Place]) -> None:
    outside = new_place(place.kind, "outside")
    for each in (place, outside):
        with begin_attempt(each.here, *plan_of("r"), no_wait):
            pass
    own, other = (find_run(each.here, "r").folder for each in (place, outside))
    with pytest.raises(ConfigError, match="no such run"):
        find_run(place.here, os.path.relpath(other.parents[1], own.parents[2]))


@pytest.mark.parametrize("field", [{"sha256": "../../../outside"}, {"sha256": "A" * 64}, {"kind": "../outside"}])
def test_the_id_of_an_artifact_stays_in_its_room(field: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Ref.model_validate_json(json.dumps({"kind": "stack", "stage": 0, "sha256": "0" * 64, **field}))


def stranger(place: Place, name: str) -> None:
    """Put an artifact whose list names a file outside, sealed as a stranger would seal it."""
    data = b"outside"
    entry = FileEntry(size=len(data), checksum=f"sha256:{hashlib.sha256(data).hexdigest()}")
    manifest = make_manifest(REF, PLAN.recipes[REF], (), {name: entry}, {}, {})
    place.write(f"{place.room(REF)}/manifest.json", manifest.model_dump_json(indent=1).encode())


def test_a_list_of_files_that_leads_out_is_not_read(place: Place, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"outside")
    for name in ("../../../outside", str(tmp_path / "outside")):
        stranger(place, name)
        assert place.open().state(REF) is State.CORRUPT
        caught(ArtifactCorruptError, place.open().checked)


def test_a_list_of_files_that_leads_out_is_not_copied(place: Place, target: Place, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"outside")
    for name in ("../../../outside", str(tmp_path / "outside")):
        stranger(place, name)
        with pytest.raises(ArtifactCorruptError):
            copy_artifact(place.open(), target.here, REF, no_wait)
        assert target.there.state(REF) is State.ABSENT
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["outside"]
