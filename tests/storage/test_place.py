"""What every place of artifacts does, a folder as well as a bucket: sealed folders, runs, housekeeping, copies.

One suite for all places, so that a place can be written anew, or a third one added, and be held to the same
behaviour. What is stored is looked at, and damaged, by other means than our code: the file system, or boto3. Where
places differ on purpose, `Expected` says how; where one is wrong today, the test says what is right and is marked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_core.errors import ConfigError, CorpusError, StageInterruptedError
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts, State, artifacts_at
from storage.collect import Collection, collect, plan_collection, without_gc
from storage.copying import attempts_to_copy, check_room, copy_artifact, copy_run, to_copy
from storage.demand import compute_demand
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactNewerError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
    RunBusyError,
)
from storage.inventory import Found, Inventory, survey
from storage.locks import no_wait
from storage.manifest import FileEntry, InputEntry, Manifest, make_manifest
from storage.quarantine import drop, find_quarantined, quarantined, release
from storage.reachability import find_reachable, made_from, pin, pins, planned, unpin
from storage.runs import (
    asked_before,
    asking,
    attempts,
    begin_attempt,
    find_run,
    is_live,
    live_runs,
    retire_unless_read,
    run_names,
)
from storage.stores import open_store
from support.house import CORPUS, plan_of, pretend, put
from support.s3_server import client_of
from support.s3_server import machine as being
from support.stores import same_bits, small_store

pytestmark = pytest.mark.usefixtures("quick_disk", "no_patience")

LESS: dict[str, Any] = {"training": {"progressive": {"target_stacks": 1}}}
FASTER: dict[str, Any] = {"training": {"learning_rate": 0.5, **LESS["training"]}}
TWO: dict[str, Any] = {"training": {"progressive": {"target_stacks": 2}}}
PLAN = plan_of(**TWO)[1]
STAGE = PLAN.stages[0]
REF, STORE, OTHER = STAGE.ref("stack"), STAGE.ref("activations"), PLAN.stages[1].ref("stack")

CONTENT = {"stack.safetensors": b"weights " * 9, "sub/deep/head.safetensors": b"head", "empty": b""}
OTHER_CONTENT = {"stack.safetensors": b"other weights", "fresh": b"x"}
LOG = {"metrics.jsonl": b'{"seconds": 1}\n'}

ROOMS = {
    "data": "data",
    "build": "builds",
    "trunk": "trunks",
    "stack": "stacks",
    "activations": "activations",
    "validation": "validations",
}


# ---------------------------------------------------------------- places


@dataclasses.dataclass(frozen=True)
class Expected:
    """In what places differ, each by design."""

    kills: tuple[str, ...]
    """Failpoints between the manifest in work and the seal of a stack of stage 0."""
    winner: int
    """Of two who made different bytes at once: whose stay, the first's to seal (0) or the last's (1). In a folder the
    lock of the artifact lets nobody begin while another makes it; in a bucket a lease may go stale (decision 15)."""
    young_stays: bool
    """Whether gc leaves what is younger than its grace: in a bucket a run may not have been heard of (decision 18)."""
    gc_beside_a_run: Callable[[], contextlib.AbstractContextManager[Any]]
    """What meets a gc while a run is live: it is refused where there is a lock, else it goes by the plans of runs."""
    strangers_stop_readers: bool
    """Whether a file that is not in the sealed list does: in a bucket nobody but `verify` meets it."""
    sharers_keep_machines_out: bool
    """Whether a lock that one machine shares is refused to another that wants it alone: a lease says who lives."""


class Place:
    """An artifacts root, whoever opens it, and what is stored there, whoever wrote it."""

    kind: str
    expected: Expected
    uri: str

    @functools.cached_property
    def here(self) -> Artifacts:
        """Opened by a first machine, or process."""
        return self.open("here")

    @functools.cached_property
    def there(self) -> Artifacts:
        """Opened by another."""
        return self.open("there")

    def unopened(self, machine: str = "yet another") -> Artifacts:
        """Name it as a new process of a machine."""
        raise NotImplementedError

    def open(self, machine: str = "yet another") -> Artifacts:
        """Open it as a new process of a machine."""
        return self.unopened(machine).open()

    def stored(self, below: str = "") -> dict[str, bytes]:
        """Return all that is stored under a key, by key; not locks, which a look may leave."""
        raise NotImplementedError

    def sums(self) -> dict[str, tuple[int, str]]:
        """Return size and hash of all that is stored, by key; not locks."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def wipe(self, key: str) -> None:
        """Delete a file, or all below a key."""
        raise NotImplementedError

    def key(self, ref: Ref, name: str) -> str:
        """Return the key of a file of an artifact, sealed or not."""
        raise NotImplementedError

    def pass_a_day(self) -> None:
        """Let all that is stored be older than any grace."""

    # What follows is the same wherever it is.

    def room(self, ref: Ref) -> str:
        return f"{ROOMS[ref.kind]}/{ref.name}"

    def called(self, ref: Ref) -> str:
        """Return what messages call an artifact."""
        return f"{self.uri}/{self.room(ref)}"

    def files(self, ref: Ref) -> dict[str, bytes]:
        """Return the files of an artifact by name, those of any other attempt at it by key."""
        found, own = self.stored(f"{self.room(ref)}/"), self.key(ref, "")
        manifest = f"{self.room(ref)}/manifest.json"
        return {"manifest.json" if key == manifest else key.removeprefix(own): data for key, data in found.items()}

    def damage(self, ref: Ref, name: str, how: str) -> str:
        """Damage a file where it is stored; return what messages call it."""
        key = self.key(ref, name)
        damage(self, key, how)
        return f"{self.uri}/{key}"

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _ in self.sums().values())


class FolderPlace(Place):
    kind = "folder"
    expected = Expected(
        kills=("promote-stack:0",),
        winner=1,
        young_stays=False,
        gc_beside_a_run=lambda: pytest.raises(RunBusyError, match="run live"),
        strangers_stop_readers=True,
        sharers_keep_machines_out=True,
    )

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def unopened(self, machine: str = "yet another") -> Artifacts:
        return artifacts_at(self.uri)

    def _paths(self) -> Iterator[tuple[str, Path]]:
        found = ((path.relative_to(self.root).as_posix(), path) for path in self.root.rglob("*") if path.is_file())
        return ((key, path) for key, path in found if not key.startswith("locks/"))

    def stored(self, below: str = "") -> dict[str, bytes]:
        return {key: path.read_bytes() for key, path in self._paths() if key.startswith(below)}

    def sums(self) -> dict[str, tuple[int, str]]:
        return {key: (len(data), hashlib.sha256(data).hexdigest()) for key, data in self.stored().items()}

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def wipe(self, key: str) -> None:
        path = self.root / key
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def key(self, ref: Ref, name: str) -> str:
        return f"{self.room(ref)}/{name}"


class BucketPlace(Place):
    kind = "bucket"
    expected = Expected(
        kills=("promote-stack:0", "upload-stack:1", "upload-stack:4"),
        winner=0,
        young_stays=True,
        gc_beside_a_run=contextlib.nullcontext,
        strangers_stop_readers=False,
        sharers_keep_machines_out=False,
    )

    def __init__(self, uri: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self._scratch, self._monkeypatch = uri, scratch, monkeypatch

    def unopened(self, machine: str = "yet another") -> Artifacts:
        with being(self._scratch / machine):
            return artifacts_at(self.uri)

    def _list(self, below: str) -> Iterator[tuple[str, Any]]:
        client, bucket, prefix = client_of(self.uri)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + below):
            found = ((entry["Key"].removeprefix(prefix), entry) for entry in page.get("Contents", ()))
            yield from ((key, entry) for key, entry in found if not key.startswith("leases/"))

    def stored(self, below: str = "") -> dict[str, bytes]:
        client, bucket, prefix = client_of(self.uri)
        return {key: client.get_object(Bucket=bucket, Key=prefix + key)["Body"].read() for key, _ in self._list(below)}

    def sums(self) -> dict[str, tuple[int, str]]:
        return {key: (entry["Size"], entry["ETag"]) for key, entry in self._list("")}

    def write(self, key: str, data: bytes) -> None:
        client, bucket, prefix = client_of(self.uri)
        client.put_object(Bucket=bucket, Key=prefix + key, Body=data)

    def wipe(self, key: str) -> None:
        client, bucket, prefix = client_of(self.uri)
        for each in [each for each, _ in self._list(key) if each == key or each.startswith(f"{key}/")]:
            client.delete_object(Bucket=bucket, Key=prefix + each)

    def key(self, ref: Ref, name: str) -> str:
        manifest = self.stored(f"{self.room(ref)}/manifest.json")
        if name == "manifest.json":
            return f"{self.room(ref)}/{name}"
        try:
            attempt = json.loads(*manifest.values())["seal"][:16]
        except (TypeError, ValueError, KeyError):
            attempt = "0123456789abcdef"  # of an upload that was not finished
        return f"{self.room(ref)}/{attempt}/{name}"

    def pass_a_day(self) -> None:
        from datetime import UTC, datetime, timedelta

        tomorrow = datetime.now(UTC) + timedelta(hours=25)
        self._monkeypatch.setattr("storage.sealed_objects.clock", lambda: tomorrow)


KINDS = ("folder", "bucket")


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again whether a lock is held asks at once; where nobody sleeps there is nothing to leave out."""
    monkeypatch.setattr("storage.locks.sleep", lambda seconds: None, raising=False)


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Make an empty place of a kind."""

    def make(kind: str, name: str = "place") -> Place:
        if kind == "folder":
            return FolderPlace(tmp_path / name)
        request.getfixturevalue("s3")  # the environment that leads there
        uri = request.getfixturevalue("s3_server").bucket()
        return BucketPlace(uri, tmp_path / f"{name}-machines", monkeypatch)

    return make


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, new_place: Callable[..., Place]) -> Place:
    return new_place(request.param)


only_in_a_bucket = pytest.mark.parametrize("place", ["bucket"], indirect=True)
"""Where no lock keeps others out for sure."""


# ---------------------------------------------------------------- what tests do


def fill(artifacts: Artifacts, files: dict[str, bytes], ref: Ref = REF) -> None:
    work = artifacts.work(ref)
    for name, data in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)


def seal(artifacts: Artifacts, files: dict[str, bytes] = CONTENT, ref: Ref = REF, **facts: Any) -> Manifest:
    """Make and seal an artifact with a log; what differs in its facts differs in its seal."""
    fill(artifacts, {**LOG, **files}, ref)
    inputs = (InputEntry(ref=PLAN.data_ref, digest="d" * 64),)
    return artifacts.seal(ref, PLAN.recipes[ref], inputs, facts, {"torch": "x"}, records=tuple(LOG))


def contents(artifacts: Artifacts, ref: Ref = REF) -> dict[str, bytes]:
    """Return the files of a sealed artifact as a reader gets them, every byte compared."""
    folder = artifacts.checked(ref)
    return {name: (folder / name).read_bytes() for name in artifacts.manifest(ref).files}


def damage(place: Place, key: str, how: str) -> None:
    data = b"".join(place.stored(key).values())
    if how == "missing":
        place.wipe(key)
    else:
        place.write(key, {"flipped": bytes([data[0] ^ 1]) + data[1:], "cut off": data[:-1], "longer": data + b"x"}[how])


@contextlib.contextmanager
def meanwhile(failpoint: str, act: Callable[[], Any]) -> Generator[None]:
    """Do something when this process comes to a failpoint, such as 'promote-stack:0', the first time."""
    done: list[int] = []

    def act_once(pid: int, number: int) -> None:
        patch.delenv("STACKWISE_FAILPOINT")
        done.append(number)
        act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", act_once)
        patch.setenv("STACKWISE_FAILPOINT", f"{failpoint}:KILL")
        yield
    assert done, f"{failpoint} was not reached"


class Killed(BaseException):
    """Stands for the end of this process."""


@contextlib.contextmanager
def killed_at(failpoint: str) -> Generator[None]:
    """Be killed at a failpoint."""

    def die() -> None:
        raise Killed

    with meanwhile(failpoint, die), contextlib.suppress(Killed):
        yield


def names(found: Collection) -> set[str]:
    return {removal.path.name for removal in found.removals}


def names_of(plan: RunPlan) -> set[str]:
    return {ref.name for ref in plan.recipes}


def sealed_names(place: Place) -> set[str]:
    """Return the artifacts that have a manifest where they are stored."""
    found = (key.split("/") for key in place.sums())
    return {key[1] for key in found if key[0] in ROOMS.values() and key[2:] == ["manifest.json"]}


def caught(error: type[ArtifactError], ask: Callable[[Ref], Any], ref: Ref = REF) -> ArtifactError:
    with pytest.raises(error) as found:
        ask(ref)
    assert type(found.value) is error
    assert found.value.exit_code == 3
    return found.value


def refused(error: type[ArtifactError], artifacts: Artifacts, ref: Ref = REF) -> ArtifactError:
    """Return the one error that all who want a sealed artifact get."""
    asks = (artifacts.manifest, artifacts.checked, artifacts.input_entry)
    (message,) = {str(caught(error, ask, ref)) for ask in asks}
    assert artifacts.sealed(ref) is None
    found = caught(error, artifacts.manifest, ref)
    assert str(found) == message
    return found


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
    assert "run the same command again" in error.remedy


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
        seal(place.here, {"first": b"1"})
    if before == "retired":
        place.here.retire(REF)
    place.there.work(REF)  # both began when it was so
    with meanwhile("upload-stack:4", lambda: seal(place.there, OTHER_CONTENT)):  # all is put, but for the manifest
        found = seal(place.here)
    for artifacts in (place.here, place.there):
        assert artifacts.manifest(REF) == found
        assert contents(artifacts) == {**OTHER_CONTENT, **LOG}
    assert place.files(REF).keys() == {*OTHER_CONTENT, *LOG, "manifest.json"}


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
    place.here.retire(REF)  # nothing there: nothing happens
    assert place.sums() == {}
    manifest = seal(place.here)
    assert contents(place.there) == {**CONTENT, **LOG}
    place.here.retire(REF)
    for artifacts in (place.here, place.there, place.open()):
        assert artifacts.state(REF) is State.RETIRED
        error = refused(ArtifactMissingError, artifacts)
        assert str(error).startswith(f"{place.called(REF)}: was retired: its data was dropped on purpose. ")
        assert "stackwise train" in error.remedy
        assert artifacts.known(REF) == manifest
        assert [folder.name for folder in artifacts.everything()] == [REF.name]
    assert place.files(REF).keys() == {"manifest.json", "retired.json"}


def test_retiring_twice_changes_nothing_and_once_more_finishes(place: Place) -> None:
    seal(place.here)
    place.here.retire(REF)
    before = place.sums()
    place.there.retire(REF)
    assert place.sums() == before
    place.write(place.key(REF, "stack.safetensors"), b"left by a kill")
    assert place.there.state(REF) is State.RETIRED
    place.there.retire(REF)
    assert place.sums() == before


@pytest.mark.parametrize("files", [CONTENT, OTHER_CONTENT])
def test_what_was_retired_can_be_made_again(files: dict[str, bytes], place: Place) -> None:
    seal(place.here, attempt=1)
    place.here.retire(REF)
    manifest = seal(place.there, files, attempt=2)
    for artifacts in (place.here, place.there):
        assert artifacts.state(REF) is State.SEALED
        assert artifacts.manifest(REF) == manifest
        assert contents(artifacts) == {**files, **LOG}
    assert place.files(REF).keys() == {*files, *LOG, "manifest.json"}


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


# ---------------------------------------------------------------- locks


def test_a_lock_has_one_holder_who_is_named(place: Place) -> None:
    held = place.here.lock(REF.name)
    assert place.there.place.lock_holder(REF.name) is None
    assert held.try_acquire()
    for artifacts in (place.there, place.open("here"), place.open()):
        assert not artifacts.lock(REF.name).try_acquire()
        assert artifacts.lock(OTHER.name).try_acquire() or artifacts is not place.there
        holder = artifacts.place.lock_holder(REF.name)
        assert holder is not None
        assert holder.pid == os.getpid()
    held.release()
    for artifacts in (place.there, place.here):
        assert artifacts.place.lock_holder(REF.name) is None
        with artifacts.lock(REF.name) as again:
            assert again.holder().startswith(f"process {os.getpid()} on ")


def test_who_waits_is_told_for_whom_and_goes_on_after(place: Place) -> None:
    held, told = place.here.lock(REF.name), list[str]()

    def on_wait(holder: str) -> None:
        told.append(holder)
        held.release()

    assert held.try_acquire()
    with place.there.lock(REF.name, on_wait=on_wait):
        assert [line.startswith(f"process {os.getpid()} on ") for line in told] == [True]
        assert not held.try_acquire()


def test_who_waits_can_be_stopped(place: Place) -> None:
    with (
        place.here.lock(REF.name),
        pytest.raises(StageInterruptedError, match=REF.name),
        place.there.lock(REF.name, should_stop=lambda: True),
    ):
        pass


def test_many_share_a_lock_and_nobody_has_it_alone(place: Place) -> None:
    with place.here.lock("run-r", shared=True), place.there.lock("run-r", shared=True):
        assert place.open().place.lock_holder("run-r") is None
        assert not place.open("here").lock("run-r").try_acquire()
        alone = place.open().lock("run-r")
        assert alone.try_acquire() != place.expected.sharers_keep_machines_out
        alone.release()
    with place.there.lock("run-r"):
        assert not place.open("there").lock("run-r", shared=True).try_acquire()


# ---------------------------------------------------------------- runs and pins


def test_a_run_is_known_and_alive_everywhere(place: Place) -> None:
    config, plan = plan_of("live", **LESS)
    with asking("a flow"), begin_attempt(place.here, config, plan, no_wait) as attempt:
        for artifacts in (place.open(), place.open("here")):
            assert run_names(artifacts) == ["live"]
            found = find_run(artifacts, "live")
            assert (found.number, found.plan, found.config, found.outcome) == (attempt.number, plan, config, None)
            assert found.start["pid"] == os.getpid()
            assert asked_before(artifacts, "live", "a flow") == found
            assert asked_before(artifacts, "live", "another flow") is None
            assert is_live(artifacts, "live")
            assert {name: holder.pid for name, holder in live_runs(artifacts).items()} == {"live": os.getpid()}
    assert not is_live(place.open(), "live")
    assert live_runs(place.open()) == {}
    with pytest.raises(ConfigError, match="there: live"):
        find_run(place.open(), "dead")


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (ValueError("no"), "failed"), (StageInterruptedError("no"), "stopped")]
)
def test_how_a_run_ended_is_known_everywhere(error: Exception | None, state: str, place: Place) -> None:
    with contextlib.suppress(ValueError, StageInterruptedError), begin_attempt(place.here, *plan_of("r"), no_wait):
        if error:
            raise error
    outcome = find_run(place.there, "r").outcome
    assert outcome is not None
    assert (outcome["state"], outcome["message"]) == (state, "no" if error else "")


def test_equal_configurations_share_a_live_run_and_a_later_one_is_another_attempt(place: Place) -> None:
    run = plan_of("r", **LESS)
    with begin_attempt(place.here, *run, no_wait) as first, begin_attempt(place.there, *run, no_wait) as second:
        assert (first.number, second.number) == (1, 1)
    with begin_attempt(place.there, *run, no_wait) as third:
        assert third.number == 2
    assert [attempt.number for attempt in attempts(place.open(), "r")] == [1, 2]


@pytest.mark.parametrize("who", ["here", "there"])
def test_another_configuration_on_a_live_run_is_refused(who: str, place: Place) -> None:
    with begin_attempt(place.here, *plan_of("r", **LESS), no_wait):
        artifacts, before = place.open(who), place.sums()
        with (
            pytest.raises(RunBusyError, match=f"process {os.getpid()} on ") as found,
            begin_attempt(artifacts, *plan_of("r", **TWO), no_wait),
        ):
            pass
        assert found.value.exit_code == 2
        assert place.sums() == before
        assert is_live(artifacts, "r")
    with begin_attempt(place.there, *plan_of("r", **TWO), no_wait) as attempt:
        assert attempt.number == 2


def test_a_name_is_of_one_text(place: Place) -> None:
    config, plan = plan_of("r", **LESS)
    with begin_attempt(place.here, config, plan, no_wait):
        pass
    with pytest.raises(CorpusError), begin_attempt(place.there, config, plan_run(config, CORPUS[2:] + "11"), no_wait):
        pass


def test_what_a_live_run_elsewhere_reads_is_not_retired(place: Place) -> None:
    seal(place.here, ref=STORE)
    with begin_attempt(place.there, *plan_of("reader", **TWO), no_wait):
        assert not retire_unless_read(place.here, STORE, "own")
        assert place.open().state(STORE) is State.SEALED
    assert retire_unless_read(place.here, STORE, "own")
    assert place.open().state(STORE) is State.RETIRED
    assert place.files(STORE).keys() == {"manifest.json", "retired.json"}


def test_its_own_run_does_not_keep_a_store(place: Place) -> None:
    seal(place.here, ref=STORE)
    with begin_attempt(place.here, *plan_of("own", **TWO), no_wait):
        assert retire_unless_read(place.there, STORE, "own")


def test_a_pin_is_seen_and_taken_back_everywhere(place: Place) -> None:
    pin(place.here, REF)
    pin(place.here, OTHER)
    assert pins(place.there) == sorted([REF, OTHER], key=lambda ref: ref.name)
    assert find_reachable(place.there).pinned == {REF.name, OTHER.name}
    with pytest.raises(ConfigError, match="2 pins begin so"):
        unpin(place.there, "stack")
    assert unpin(place.there, REF.name[:12]) == REF
    assert pins(place.open()) == pins(place.open("here")) == [OTHER]
    with pytest.raises(ArtifactMissingError, match="is not pinned"):
        unpin(place.open(), REF.name)


def test_a_pin_that_is_not_there_is_asked_for_by_the_name_of_the_place(place: Place) -> None:
    with pytest.raises(ArtifactMissingError) as found:
        unpin(place.here, REF.name)
    assert f"Pinned in {place.uri}: none" in str(found.value)


@pytest.mark.parametrize("what", ["runs/r/attempts/0001/plan.json", "pins/broken.json"])
def test_a_record_that_cannot_be_read_is_named_where_it_is_stored(what: str, place: Place) -> None:
    with begin_attempt(place.here, *plan_of("r", **LESS), no_wait):
        pass
    place.write(what, b"{}")
    with pytest.raises(ArtifactCorruptError) as found:
        find_reachable(place.there)
    assert f"{place.uri}/{what}" in str(found.value)


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


# ---------------------------------------------------------------- gc


@pytest.fixture
def two_runs(place: Place) -> tuple[RunPlan, RunPlan]:
    """Two runs that share what comes before their stacks; the record of the second is lost."""
    one, two = pretend(place.here, **LESS), pretend(place.here, "two", **FASTER)
    assert names_of(one) & names_of(two)
    place.wipe("runs/two")
    return one, two


def test_what_no_run_reaches_goes_and_the_rest_stays(place: Place, two_runs: tuple[RunPlan, RunPlan]) -> None:
    one, two = map(names_of, two_runs)
    place.pass_a_day()
    before = place.sums()
    forecast = plan_collection(place.there)
    assert place.sums() == before  # a dry run
    assert names(forecast) == two - one
    done = collect(place.there)
    after = place.sums()
    assert [removal.path.name for removal in done.removals] == [removal.path.name for removal in forecast.removals]
    assert after.items() <= before.items()
    assert {key for key in before.keys() - after.keys() if key.split("/")[1] not in two - one} == set()
    assert sum(n for n, _ in before.values()) - place.n_bytes == done.n_bytes == forecast.n_bytes > 0
    assert sealed_names(place) == one
    assert {place.here.state(ref) for ref in two_runs[1].recipes if ref.name not in one} == {State.ABSENT}
    assert names(collect(place.there)) == set()


def test_what_is_young_may_be_of_a_run_that_nobody_heard_of(place: Place, two_runs: tuple[RunPlan, RunPlan]) -> None:
    collect(place.there)
    assert (sealed_names(place) == names_of(two_runs[1]) | names_of(two_runs[0])) == place.expected.young_stays
    assert names_of(two_runs[0]) <= sealed_names(place)


def test_a_pin_keeps_an_artifact_and_all_it_was_made_from(place: Place, two_runs: tuple[RunPlan, RunPlan]) -> None:
    one, two = two_runs
    pinned = two.stages[0].ref("stack")
    pin(place.there, pinned)
    kept = {ref.name for ref in made_from(place.open(), [pinned])}
    assert {two.data_ref.name, pinned.name} < kept
    place.pass_a_day()
    collect(place.there)
    assert sealed_names(place) == names_of(one) | kept < names_of(one) | names_of(two)


def test_killed_in_the_middle_the_next_gc_goes_on(place: Place, two_runs: tuple[RunPlan, RunPlan]) -> None:
    place.pass_a_day()
    with killed_at("gc:1"):
        collect(place.open("here"))
    assert names_of(two_runs[0]) < sealed_names(place) < names_of(two_runs[1]) | names_of(two_runs[0])
    collect(place.open("there"))
    assert sealed_names(place) == names_of(two_runs[0])
    assert {place.there.state(ref) for ref in two_runs[0].recipes} == {State.SEALED}


def test_only_the_last_runs_count_and_the_records_of_others_go(place: Place) -> None:
    """Of runs that began in the same second the name decides."""
    kept = [pretend(place.here, name, **how) for name, how in (("a", LESS), ("b", FASTER))][1]
    place.pass_a_day()
    before = place.n_bytes
    assert names(plan_collection(place.there, 2)) == set()
    done = collect(place.there, 1)
    assert run_names(place.open()) == ["b"]
    assert sealed_names(place) == names_of(kept)
    assert before - place.n_bytes == done.n_bytes
    collect(place.there, 0)
    assert place.sums() == {}


def test_earlier_attempts_count_unless_they_are_given_up(place: Place) -> None:
    first, second = pretend(place.here, **LESS), pretend(place.here, **FASTER)
    place.pass_a_day()
    assert names(collect(place.there)) == set()
    collect(place.there, newest_only=True)
    assert sealed_names(place) == names_of(second) != names_of(first)


def test_without_any_run_not_everything_goes_unasked(place: Place) -> None:
    seal(place.here)
    place.pass_a_day()
    before = place.sums()
    with pytest.raises(ConfigError, match="--keep-last 0") as found:
        collect(place.there)
    assert place.uri in str(found.value)
    assert place.sums() == before
    collect(place.there, 0)
    assert place.sums() == {}


def test_nothing_that_a_live_run_planned_goes(place: Place) -> None:
    pretend(place.here, "live", **LESS)
    place.pass_a_day()
    before = sealed_names(place)
    with begin_attempt(place.here, *plan_of("live", **LESS), no_wait):
        for keep_last in (None, 0):
            with place.expected.gc_beside_a_run():
                collect(place.there, keep_last)
    assert sealed_names(place) == before
    assert run_names(place.open()) == ["live"]


def test_what_dead_writers_left_goes(place: Place) -> None:
    plan = pretend(place.here, **LESS)
    stack, before = plan.stages[0].ref("stack"), place.sums()
    place.here.retire(stack)
    retired = place.sums()
    place.write(place.key(stack, "content"), b"data of what is retired")
    place.write(place.key(OTHER, "file"), b"never sealed")
    assert place.sums() != retired != before
    place.pass_a_day()
    done = collect(place.there)
    assert done.n_bytes == len(b"data of what is retired") + len(b"never sealed")
    assert place.sums() == retired
    assert place.open().state(stack) is State.RETIRED


def test_what_cannot_be_believed_stays_and_is_told(place: Place) -> None:
    seal(place.here)
    seal(place.here, ref=OTHER)
    place.write(place.key(OTHER, "manifest.json"), b"{")
    place.write("stacks/a-friend/of-mine", b"12345")
    aside = place.here.quarantine(REF, "two rows differ")
    place.pass_a_day()
    before = place.sums()
    done = collect(place.there, 0)
    assert done.removals == []
    assert [line.partition(": ")[0] for line in done.damaged] == [place.called(OTHER)]
    assert any(line.startswith(f"{place.uri}/stacks/a-friend: ") for line in done.notes)
    assert "1 in quarantine stay: see `stackwise quarantine`" in done.notes
    assert place.sums() == before
    assert str(aside).startswith(f"{place.uri}/quarantine/")


@pytest.mark.parametrize("what", ["runs/one/attempts/0001/plan.json", "pins/broken.json"])
def test_a_record_that_cannot_be_read_stops_gc(what: str, place: Place) -> None:
    pretend(place.here, **LESS)
    place.write(what, b"{}")
    place.pass_a_day()
    before = place.sums()
    for ask in (plan_collection, collect):
        with pytest.raises(ArtifactCorruptError, match=Path(what).name) as found:
            ask(place.there)
        assert found.value.exit_code == 3
    assert place.sums() == before


@only_in_a_bucket
def test_a_run_that_begins_during_a_gc_keeps_what_it_plans(place: Place, two_runs: tuple[RunPlan, RunPlan]) -> None:
    place.pass_a_day()
    before = place.sums()
    with contextlib.ExitStack() as stack:
        run = begin_attempt(place.here, *plan_of("two", **FASTER), no_wait)
        with meanwhile("gc-data:0", lambda: stack.enter_context(run)):  # one manifest is gone, and no data yet
            collect(place.there)
    assert sealed_names(place) == names_of(two_runs[0]) | names_of(two_runs[1])
    assert {key: place.sums()[key][1] for key in before} == {key: tag for key, (_, tag) in before.items()}


# ---------------------------------------------------------------- demand


def needed(place: Place, plan: RunPlan, keep: str = "last") -> set[Ref]:
    """Return what another process would make."""
    demand = compute_demand(plan, place.there, keep)
    assert demand.complete == (not demand.needed)
    return demand.needed


def test_exactly_what_is_gone_and_what_it_reads_is_needed(place: Place) -> None:
    plan = pretend(place.here, **TWO)
    below, top = plan.stages
    assert needed(place, plan) == needed(place, plan, "all") == set()
    place.wipe(place.room(below.ref("build")))
    assert needed(place, plan) == set()  # nobody wants it: what was made from it is there
    place.wipe(place.room(below.ref("validation")))
    assert needed(place, plan) == {below.ref("validation")}
    put(place.here, plan, below.ref("validation"))
    place.here.retire(below.ref("activations"))
    assert needed(place, plan) == set()
    assert needed(place, plan, "all") == {below.ref("activations")}
    place.wipe(place.room(top.ref("stack")))
    assert needed(place, plan) == {top.ref("stack"), below.ref("activations")}


def test_a_damaged_goal_is_told_and_not_made_over(place: Place) -> None:
    plan = pretend(place.here, **LESS)
    where = place.damage(plan.stages[0].ref("stack"), "content", "cut off")
    with pytest.raises(ArtifactCorruptError) as found:
        needed(place, plan)
    assert str(found.value.path) == where


def test_what_was_made_from_other_bytes_is_refused(place: Place) -> None:
    plan = pretend(place.here, **LESS)
    stack, validation = plan.stages[0].ref("stack"), plan.stages[0].ref("validation")
    (place.there.work(stack) / "content").write_bytes(b"other bytes of the same recipe")
    inputs = place.there.manifest(stack).inputs
    place.there.seal(stack, plan.recipes[stack], inputs, {}, {})
    with pytest.raises(ArtifactCorruptError, match=f"was made from other bytes of {stack.name}") as found:
        needed(place, plan)
    assert str(found.value.path) == place.called(validation)
    assert "--from-stack 0" in found.value.remedy


# ---------------------------------------------------------------- copies


@pytest.fixture
def target(place: Place, new_place: Callable[..., Place]) -> Place:
    """A place of the other kind: bytes go from folders to buckets and back."""
    return new_place(next(kind for kind in KINDS if kind != place.kind), "target")


def copy(source: Artifacts, target: Artifacts, run: str, named: frozenset[Ref] = frozenset()) -> list[Ref]:
    """Copy a run as `push` and `pull` do; return what was lacking."""
    with without_gc(source), without_gc(target):
        refs = planned(source, run)
        lacking = to_copy(source, target, refs, named)
        attempts_to_copy(source, target, run)
        check_room(source, target, lacking)
        for ref in lacking:
            copy_artifact(source, target, ref, no_wait)
        copy_run(source, target, run)
    return lacking


def test_a_copy_is_equal_byte_for_byte(place: Place, target: Place) -> None:
    plan = pretend(place.here, **LESS)
    retired = plan.stages[0].ref("build")
    place.here.retire(retired)
    lacking = copy(place.there, target.here, "one")
    assert {ref.name for ref in lacking} == names_of(plan) == sealed_names(target)
    for ref in plan.recipes:
        assert target.files(ref) == place.files(ref)
    for artifacts in (target.here, target.there):
        assert artifacts.state(retired) is State.RETIRED
        for ref in plan.recipes.keys() - {retired}:
            assert artifacts.manifest(ref) == place.here.manifest(ref)
            artifacts.checked(ref)
    assert run_names(target.open()) == ["one"]
    assert find_run(target.open(), "one").plan == plan
    records = [{key: data for key, data in each.stored("runs/").items()} for each in (place, target)]
    assert records[0] == records[1]
    assert to_copy(place.there, target.open(), plan.recipes, frozenset()) == []
    assert attempts_to_copy(place.there, target.open(), "one") == []


def test_a_copy_that_was_killed_goes_on(place: Place, target: Place) -> None:
    seal(place.here)
    for failpoint in ("copy-stack:2", "copied-stack:0"):
        with killed_at(failpoint):
            copy_artifact(place.there, target.here, REF, no_wait)
        assert target.there.state(REF) is State.ABSENT
    assert copy_artifact(place.there, target.open("here"), REF, no_wait) > 0
    assert target.files(REF) == place.files(REF)
    assert copy_artifact(place.there, target.there, REF, no_wait) == 0


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_what_is_damaged_is_not_put_in_place(how: str, place: Place, target: Place) -> None:
    seal(place.here)
    where = place.damage(REF, "stack.safetensors", how)
    with pytest.raises(ArtifactCorruptError) as found:
        copy_artifact(place.there, target.here, REF, no_wait)
    assert where in str(found.value)
    assert target.there.state(REF) is State.ABSENT
    assert sealed_names(target) == set()


def test_other_bytes_at_the_target_stay_and_what_is_retired_there_comes_back_if_named(
    place: Place, target: Place
) -> None:
    seal(place.here)
    seal(target.here)
    assert to_copy(place.there, target.there, [REF], frozenset()) == []
    target.here.retire(REF)
    assert to_copy(place.there, target.there, [REF], frozenset()) == []
    assert to_copy(place.there, target.there, [REF], frozenset([REF])) == [REF]
    copy_artifact(place.there, target.there, REF, no_wait)
    assert contents(target.open()) == {**CONTENT, **LOG}
    assert target.files(REF) == place.files(REF)
    seal(target.here, OTHER_CONTENT)
    before = target.sums()
    with pytest.raises(ArtifactCorruptError, match="holds other bytes") as found:
        to_copy(place.there, target.there, [REF], frozenset([REF]))
    assert str(found.value).startswith(target.called(REF))
    assert target.sums() == before


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
