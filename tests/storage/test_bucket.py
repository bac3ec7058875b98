"""Artifacts in a bucket: one seal however many writers, leases, damage, lost connections.

Against a real S3-speaking server over HTTP; what is in the bucket is read by boto3, not by our code.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
import zarr

from stackwise_core.errors import StageInterruptedError
from stackwise_core.stages.identity import Ref
from storage import leases, object_store
from storage.artifacts import Artifacts, State, artifacts_at
from storage.bucket import BucketPlace
from storage.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingError,
    ArtifactsFolderError,
    ArtifactUnsealedError,
    ObjectStoreError,
)
from storage.manifest import InputEntry, Manifest
from storage.object_store import ObjectStore
from storage.place import key_of
from storage.stores import open_store
from support.artifacts import CONTENT, LOG, OTHER_CONTENT, PLAN, REF, STORE, fill_work
from support.s3_server import KEY, SECRET, Cable, copy_bucket, delete, environment, machine, objects, on, put
from support.stores import same_bits, small_store

pytestmark = pytest.mark.usefixtures("quick_disk")


def seal(artifacts: Artifacts, files: dict[str, bytes] = CONTENT, facts: Any = None, ref: Ref = REF) -> Manifest:
    fill_work(artifacts, {**files, **LOG}, ref)
    inputs, recipe = (InputEntry(ref=PLAN.data_ref, digest="d" * 64),), PLAN.stages[ref.stage].recipe(ref.kind)
    assert recipe is not None
    return artifacts.seal(ref, recipe, inputs, facts or {"steps": 3}, {"torch": "x"}, records=tuple(LOG))


def held_by_another(artifacts: Artifacts, name: str) -> bool:
    assert isinstance(artifacts.place, BucketPlace)
    return leases.is_held_by_another(artifacts.place.store, name, artifacts.place.machine)


def sealed_files(uri: str, ref: Ref = REF) -> tuple[Manifest, dict[str, bytes]]:
    """Return what the bucket has of the one artifact: its manifest, and the files of the attempt it names."""
    found, key = objects(uri), key_of(ref)
    manifest = Manifest.model_validate_json(found.pop(f"{key}/manifest.json"))
    prefix = f"{key}/{manifest.seal[:16]}/"
    files = {name.removeprefix(prefix): data for name, data in found.items() if name.startswith(prefix)}
    others = [name for name in found if name.startswith(key) and not name.startswith(prefix)]
    assert others == []
    return manifest, files


# ---------------------------------------------------------------- sealing


def test_a_seal_is_whole_and_another_machine_reads_it(s3: str, tmp_path: Path) -> None:
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    assert here.state(REF) is there.state(REF) is State.ABSENT
    with pytest.raises(ArtifactMissingError, match=f"{s3}/stacks/{REF.name}: there is no such artifact"):
        there.manifest(REF)
    manifest = seal(here)
    assert sealed_files(s3) == (manifest, {**CONTENT, **LOG})
    assert there.state(REF) is State.SEALED
    assert there.manifest(REF) == manifest
    assert there.everything() == [there.folder(REF)]
    folder = there.checked(REF)
    assert {name: (folder / name).read_bytes() for name in manifest.files} == {**CONTENT, **LOG}
    assert here.place.range_reader(here.sealed_folder(REF)) is None  # read where it was made


def test_without_its_manifest_nothing_is_read(s3: str, tmp_path: Path) -> None:
    here = on(tmp_path / "a", s3)
    seal(here)
    delete(s3, f"stacks/{REF.name}/manifest.json")
    assert here.state(REF) is State.ABSENT  # though all of it is in the scratch folder
    assert here.everything() == []
    with pytest.raises(ArtifactUnsealedError, match="was never sealed"):
        here.checked(REF)
    again = seal(here, facts={"steps": 4})
    assert here.state(REF) is State.SEALED
    assert here.manifest(REF) == again


@pytest.mark.parametrize("same", [True, False])
def test_of_two_writers_one_seals_and_both_use_it(
    same: bool, s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machines = [on(tmp_path / name, s3) for name in "ab"]
    contents = [CONTENT, CONTENT if same else {**CONTENT, **OTHER_CONTENT}]
    for artifacts in machines:  # both began while there was nothing
        artifacts.work(REF)
    both_are_there = threading.Barrier(2)
    create, found = ObjectStore.create, [Manifest.model_construct()] * 2

    def create_together(self: ObjectStore, key: str, data: bytes) -> bool:
        both_are_there.wait(240)
        return create(self, key, data)

    def work(number: int) -> None:
        found[number] = seal(machines[number], contents[number], {"machine": number})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "create", create_together)
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    manifest, files = sealed_files(s3)  # the loser's files are gone
    assert found[0] == found[1] == manifest
    assert files == {**contents[manifest.facts["machine"]], **LOG}
    for artifacts in machines:
        folder = artifacts.checked(REF)
        assert {name: (folder / name).read_bytes() for name in manifest.files} == files
        assert os.listdir(artifacts.root / "work") == []
    assert ("with other bytes" in caplog.text) == (not same)


def test_a_put_whose_answer_was_lost_is_not_taken_for_anothers(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore repeats it, and meets what it put itself."""
    create = ObjectStore.create

    def twice(self: ObjectStore, key: str, data: bytes) -> bool:
        create(self, key, data)
        return create(self, key, data)

    here = on(tmp_path / "a", s3)
    monkeypatch.setattr(ObjectStore, "create", twice)
    assert sealed_files(s3 if seal(here) else "")[1] == {**CONTENT, **LOG}
    assert (here.folder(REF) / "stack.safetensors").exists()


def test_a_forced_attempt_replaces_what_was_sealed_when_it_began_and_nothing_else(s3: str, tmp_path: Path) -> None:
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    seal(here)
    there.checked(REF)
    new = seal(here, OTHER_CONTENT)  # begun while the first was sealed
    assert sealed_files(s3) == (new, {**OTHER_CONTENT, **LOG})
    folder = there.checked(REF)  # its copy of the first does not pass for the second
    assert {name: (folder / name).read_bytes() for name in new.files} == {**OTHER_CONTENT, **LOG}
    here.work(REF)
    newer = seal(there, CONTENT)
    assert seal(here, OTHER_CONTENT) == newer  # it began before `newer` was sealed: that one won


class _NoTimePasses(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2026, 1, 1, tzinfo=tz)


@pytest.mark.parametrize("facts", [{"steps": 3}, {"steps": 4}])  # the former give the same seal again
def test_retired_on_one_machine_is_retired_on_all_and_can_be_made_again(
    facts: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.manifest.datetime", _NoTimePasses)
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    manifest = seal(here, ref=STORE)
    there.checked(STORE)
    here.retire(STORE)
    kept = sealed_files(s3, STORE)
    assert (kept[0], set(kept[1])) == (manifest, {"retired.json"})
    for artifacts in (here, there):
        assert artifacts.state(STORE) is State.RETIRED
        assert sorted(os.listdir(artifacts.folder(STORE))) == ["manifest.json", "retired.json"]
        with pytest.raises(ArtifactMissingError, match="was retired"):
            artifacts.checked(STORE)
    assert there.everything() == [there.folder(STORE)]
    seal(there, facts=facts, ref=STORE)
    assert here.state(STORE) is State.SEALED
    assert set(sealed_files(s3, STORE)[1]) == {*CONTENT, *LOG}
    here.checked(STORE)


def test_quarantine_and_discard_take_the_manifest_away_first(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    manifest = seal(here)
    gone: list[str] = []
    move, remove = ObjectStore.move, ObjectStore.delete
    monkeypatch.setattr(ObjectStore, "move", lambda self, key, to: (gone.append(key), move(self, key, to)))
    where = here.quarantine(REF, "two rows differ")
    assert gone[0] == f"stacks/{REF.name}/manifest.json"
    assert here.state(REF) is State.ABSENT
    aside = f"quarantine/{REF.name}.{manifest.attempt}"
    assert where == f"{s3}/{aside}"
    kept = {name.removeprefix(f"{aside}/"): data for name, data in objects(s3).items() if name.startswith(aside)}
    assert kept.pop("reason.txt") == b"two rows differ\n"
    assert Manifest.model_validate_json(kept.pop("manifest.json")) == manifest
    assert kept == {**CONTENT, **LOG}

    seal(here)
    gone.clear()
    monkeypatch.setattr(ObjectStore, "delete", lambda self, keys: (gone.extend(keys), remove(self, keys)))
    here.discard(REF)
    assert gone[0] == f"stacks/{REF.name}/manifest.json"
    assert not any(name.startswith("stacks/") for name in objects(s3))


# ---------------------------------------------------------------- damage


def _damage(uri: str, name: str, how: str) -> None:
    data = objects(uri)[name]
    if how == "flipped":
        put(uri, name, bytes([data[0] ^ 1]) + data[1:])
    elif how == "cut off":
        put(uri, name, data[:-1])
    else:
        delete(uri, name)


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_damage_is_found_by_whoever_reads_and_by_verify(how: str, s3: str, tmp_path: Path) -> None:
    manifest = seal(on(tmp_path / "a", s3))
    name = f"stacks/{REF.name}/{manifest.attempt}/sub/deep/head.safetensors"
    _damage(s3, name, how)
    there = on(tmp_path / "b", s3)
    with pytest.raises(ArtifactCorruptError) as caught:
        there.checked(REF)
    assert str(caught.value).startswith(f"{s3}/{name}: ")
    assert f"Delete all below {s3}/stacks/{REF.name} " in caught.value.remedy
    assert there.state(REF) is (State.SEALED if how == "flipped" else State.CORRUPT)
    problems, n_bytes = there.verify(there.folder(REF))
    assert (len(problems), n_bytes) == (1, manifest.n_bytes)
    assert problems[0].startswith(f"{s3}/{name}: ")
    assert not (there.folder(REF) / "sub/deep/head.safetensors").exists()


@pytest.mark.parametrize("edit", [lambda text: b"{" + text, lambda text: text.replace(b'"steps":3', b'"steps":4')])
def test_an_edited_manifest_is_no_seal(edit: Any, s3: str, tmp_path: Path) -> None:
    here = on(tmp_path / "a", s3)
    seal(here)
    name = f"stacks/{REF.name}/manifest.json"
    text = objects(s3)[name]
    edited = edit(text.replace(b'"steps": 3', b'"steps":3'))
    assert edited != text
    put(s3, name, edited)
    assert here.state(REF) is State.CORRUPT
    with pytest.raises(ArtifactCorruptError, match=f"{s3}/{name}: ") as caught:
        here.manifest(REF)
    assert (caught.value.path, caught.value.exit_code) == (f"{s3}/{name}", 3)
    assert here.verify(here.folder(REF))[0] == [str(caught.value)]


def test_a_file_too_many_is_told(s3: str, tmp_path: Path) -> None:
    here = on(tmp_path / "a", s3)
    put(s3, f"stacks/{REF.name}/{seal(here).attempt}/stranger", b"?")
    (problem,) = here.verify(here.folder(REF))[0]
    assert "/stranger: not in the sealed list" in problem


# ---------------------------------------------------------------- activation stores, by ranges


@pytest.fixture(scope="module")
def a_store(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A sealed store in a bucket."""
    uri, scratch = s3_server.bucket(), tmp_path_factory.mktemp("maker")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        artifacts = on(scratch, uri)
        checksums = small_store().write(artifacts.work(STORE))
        recipe = PLAN.stages[0].activations
        assert recipe is not None
        artifacts.seal(STORE, recipe, (), {}, {}, checksums=checksums)
        yield uri


def test_rows_come_by_ranges_and_shards_stay_where_they_are(a_store: str, s3: str, tmp_path: Path) -> None:
    there, store = on(tmp_path / "b", a_store), small_store()
    rng = np.random.default_rng(0)
    with open_store(there, STORE) as reader:
        for group, spec in store.specs.items():
            for rows in [np.arange(spec.rows), *(rng.integers(0, spec.rows, 7) for _ in range(5))]:
                for _ in ("checked", "seen before"):
                    assert same_bits(reader.read(group, rows), store.values[group][rows])
    assert not list(there.folder(STORE).rglob("c.*.0.0"))


def test_a_batch_asks_each_shard_once(a_store: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    ranges = ObjectStore.ranges

    def noted(self: ObjectStore, key: str, offsets: Any, n_bytes: int) -> Any:
        asked.append((key.rpartition("/")[2], list(offsets)))
        return ranges(self, key, offsets, n_bytes)

    with open_store(on(tmp_path / "b", a_store), STORE) as reader:
        monkeypatch.setattr(ObjectStore, "ranges", noted)
        reader.read("train", [8, 0, 2, 1, 4, 4])
    stride = small_store().specs["train"].chunk_bytes + 4
    assert sorted(asked) == [("c.0.0.0", [0, stride]), ("c.1.0.0", [0]), ("c.2.0.0", [0])]


def test_zarr_python_reads_the_same_from_the_bucket(a_store: str, s3: str, tmp_path: Path) -> None:
    from zarr.storage import ObjectStore

    import storage.activations.dtypes  # noqa: F401

    there = on(tmp_path / "b", a_store)
    folder = there.place.range_reader(there.sealed_folder(STORE))
    assert folder is not None
    store = ObjectStore(obstore.store.from_url(folder.uri("store.zarr")), read_only=True)
    group = zarr.open_group(store, mode="r", zarr_format=3)
    with open_store(there, STORE) as reader:
        ours = reader.read("train", np.arange(reader.train.rows))
    theirs = np.asarray(group["activations"][:])  # pyright: ignore
    assert same_bits(torch.from_numpy(theirs.view(np.int16)), ours.view(torch.int16))


@pytest.mark.parametrize("how", ["flipped", "cut off", "missing"])
def test_a_damaged_shard_is_found_while_it_is_read(how: str, a_store: str, s3: str, tmp_path: Path) -> None:
    there = on(tmp_path / "b", copy_bucket(a_store, s3))
    (name,) = (name for name in objects(s3) if name.endswith("zarr/activations/c.1.0.0"))
    with open_store(there, STORE) as reader:
        assert same_bits(reader.read("train", [4]), small_store().values["train"][[4]])
    with open_store(there, STORE) as reader:
        _damage(s3, name, how)
        if how == "cut off":
            put(s3, name, b"")
        with pytest.raises(ArtifactCorruptError) as caught:
            reader.read("train", [0, 4])
    assert str(caught.value).startswith(f"{s3}/{name}: ")
    assert f"{s3}/activations/{STORE.name}" in caught.value.remedy
    with pytest.raises(ArtifactCorruptError, match=f"{s3}/{name}: ") if how != "flipped" else machine(tmp_path):
        open_store(there, STORE).close()  # sizes are in the listing


# ---------------------------------------------------------------- leases


def test_the_second_machine_waits_for_the_first(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.LeasedLock, "poll_seconds", 0.0)
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    told: list[str] = []
    first = here.lock(REF.name)
    assert first.try_acquire()

    def on_wait(holder: str) -> None:
        told.append(holder)
        assert not held_by_another(here, REF.name)
        assert held_by_another(there, REF.name)
        first.release()

    with there.lock(REF.name, on_wait=on_wait):
        assert held_by_another(here, REF.name)
    assert len(told) == 1
    assert told[0].startswith(f"process {os.getpid()} on ")
    assert not held_by_another(here, REF.name)
    assert not [name for name in objects(s3) if name.startswith("leases/")]
    with first, pytest.raises(StageInterruptedError), there.lock(REF.name, should_stop=lambda: True):
        pass


def test_a_lease_is_taken_from_the_dead_and_from_nobody_else(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    dead = here.lock(REF.name)
    assert dead._take_lease()  # pyright: ignore  # and is killed: nothing renews it, nothing gives it back
    assert not there.lock(REF.name).try_acquire()
    again = here.lock(REF.name)
    assert again.try_acquire()  # this machine's flock says that its holder is dead
    again.release()
    assert dead._take_lease()  # pyright: ignore
    monkeypatch.setattr(leases, "STALE_SECONDS", -1.0)
    assert not held_by_another(there, REF.name)
    taken = there.lock(REF.name)
    assert taken.try_acquire()
    taken.release()


def test_a_lease_is_renewed_until_it_is_lost(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.0)
    here, renewed, enough = on(tmp_path / "a", s3), list[str](), threading.Event()
    replace = ObjectStore.replace

    def noted(self: ObjectStore, key: str, data: bytes, before: Any) -> bool:
        done = replace(self, key, data, before)
        renewed.append(key)
        if len(renewed) == 3:
            enough.set()
        return done

    monkeypatch.setattr(ObjectStore, "replace", noted)
    with here.lock(REF.name) as held:
        assert enough.wait(240)
        put(s3, f"leases/{REF.name}", json.dumps({"machine": "another", "pid": 1, "host": "h", "since": "s"}).encode())
        held._renewing.join(240)  # pyright: ignore
        assert not held._renewing.is_alive()  # pyright: ignore
    assert f"leases/{REF.name}" in objects(s3)  # the other's, not ours to give back


def test_runs_of_several_machines_live_side_by_side(s3: str, tmp_path: Path) -> None:
    here, there = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    with here.lock("run-r", shared=True), there.lock("run-r", shared=True):
        assert held_by_another(here, "run-r")
        assert held_by_another(there, "run-r")
        assert len([name for name in objects(s3) if name.startswith("leases/run-r/")]) == 2
    assert not held_by_another(here, "run-r")


# ---------------------------------------------------------------- connections


@pytest.fixture
def cable(s3: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Generator[Cable]:
    """A cable between this machine and the server; requests are repeated twice, soon."""
    from datetime import timedelta

    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    retries = {"max_retries": 2, "retry_timeout": timedelta(seconds=60), "backoff": backoff}
    monkeypatch.setattr(object_store, "RETRIES", retries)
    monkeypatch.setattr(object_store, "FEW_RETRIES", retries)
    cable = Cable(s3_server.port)
    for name, value in environment(cable.port).items():
        monkeypatch.setenv(name, value)
    yield cable
    cable.close()


def test_a_connection_that_breaks_is_taken_up_again(
    cable: Cable, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer to each request is cut, or the request itself; one at a time, so that it is the first."""
    monkeypatch.setattr("storage.sealed_objects._FILES_AT_ONCE", 1)
    here = on(tmp_path / "a", s3)
    for cut in (-1, 0, 200):
        cable.answer_bytes = itertools.cycle([cut, 10**9])
        manifest = seal(here, {"big": os.urandom(300_000)})
        there = on(tmp_path / f"b{cut}", s3)
        assert there.manifest(REF) == manifest
        assert (there.checked(REF) / "big").read_bytes() == (here.folder(REF) / "big").read_bytes()


@pytest.mark.parametrize("n_bytes", [-1, 0, 100, 300, 500, 700])
def test_every_request_outlives_one_cut_answer(n_bytes: int, cable: Cable, s3: str) -> None:
    """Before the request is carried, before the answer, in its head, in its body."""
    bucket, data = ObjectStore(s3), os.urandom(2000)
    bucket.write("kept", data)
    entry = bucket.list("")["kept"]

    def cut(ask: Any) -> Any:
        cable.answer_bytes = iter([n_bytes])
        return ask()

    assert cut(lambda: bucket.list("")) == {"kept": entry}
    assert cut(lambda: bucket.read("kept")[0]) == data
    assert cut(lambda: bucket.ranges("kept", [0, 700], 600)[1].tobytes()) == data[700:1300]
    cut(lambda: bucket.create("new", b"new"))
    assert bucket.read("new")[0] == b"new"
    cut(lambda: bucket.replace("new", b"newer", bucket.read("new")[1].version))
    assert bucket.read("new")[0] == b"newer"
    cut(lambda: bucket.write("new", b"newest"))
    assert bucket.read("new")[0] == b"newest"
    cut(lambda: bucket.delete(["new"]))
    assert set(bucket.list("")) == {"kept"}


def test_a_lost_connection_is_one_clear_error_and_the_upload_goes_on(
    cable: Cable, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    written: list[str] = []
    write = ObjectStore.write

    def lost_after_one(self: ObjectStore, key: str, data: Any) -> None:
        if written and key.startswith("stacks/"):
            cable.answer_bytes = itertools.repeat(-1)
        write(self, key, data)
        written.append(key.rpartition("/")[2])

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", lost_after_one)
        patch.setattr("storage.sealed_objects._FILES_AT_ONCE", 1)
        with pytest.raises(ObjectStoreError) as caught:
            seal(here)
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert message.startswith(f"{s3}/stacks/{REF.name}/")
    assert f"no connection to the store at http://127.0.0.1:{cable.port}" in message
    assert f"{REF.name} is made and kept in {here.root / 'work' / REF.name}" in message
    assert message.endswith("run the same command again")
    assert SECRET not in message
    assert KEY not in message
    cable.answer_bytes = None
    assert len(written) == 1
    assert here.state(REF) is State.ABSENT

    def noted(self: ObjectStore, key: str, data: Any) -> None:
        written.append(key.rpartition("/")[2])
        write(self, key, data)

    monkeypatch.setattr(ObjectStore, "write", noted)
    again = on(tmp_path / "a", s3)
    assert again.promote(REF)  # what a task calls before it begins
    assert sorted(written) == sorted(name.rpartition("/")[2] for name in (*CONTENT, *LOG))  # each once
    assert sealed_files(s3)[1] == {**CONTENT, **LOG}
    assert not again.promote(REF)


def test_what_is_wrong_at_the_start_is_one_line(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(uri: str, change: dict[str, str | None]) -> str:
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.delenv(name) if value is None else patch.setenv(name, value)
            with machine(tmp_path / "a"), pytest.raises(ArtifactsFolderError) as caught:
                artifacts_at(uri).open()
        assert caught.value.exit_code == 2
        assert SECRET not in str(caught.value)
        assert KEY not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    nowhere = f"s3://no-such-bucket-{s3[5:17]}/x"
    assert told(nowhere, {}).startswith(f"--artifacts {nowhere}: there is no such bucket")
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in told(s3, {"AWS_SECRET_ACCESS_KEY": None})
    assert "no connection to the store at http://127.0.0.1:9" in told(s3, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert "AWS_ALLOW_HTTP=true" in told(s3, {"AWS_ALLOW_HTTP": None})
    for uri in (f"s3://{KEY}:{SECRET}@bucket/x", f"s3://bucket/x?key={SECRET}"):
        assert "set them in the environment" in told(uri, {})
    for uri in ("s3://", "ftp://host/x", "az://container/x"):
        assert "s3://BUCKET/PREFIX" in told(uri, {})


def test_a_store_that_ignores_conditions_is_refused(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, key, data, **how: plain(store, key, data))
    with pytest.raises(ArtifactsFolderError, match="ignores If-None-Match"):
        on(tmp_path / "a", s3)
    assert objects(s3) == {}


def test_nothing_below_the_uri_is_told(s3: str, tmp_path: Path) -> None:
    with machine(tmp_path), pytest.raises(ArtifactsFolderError, match=f"{s3}: nothing is there"):
        artifacts_at(s3).existing()


def test_errors_survive_another_process() -> None:
    import pickle

    for error in (ObjectStoreError("s3://b/k: lost", "All is kept"), ArtifactError("s3://b/k", "is gone", "Make it")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), type(again)) == (str(error), type(error))
        assert "s3://b/k" in str(again)
