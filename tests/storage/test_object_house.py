"""Keeping house in a bucket: what gc removes there and never does, copies, whose bytes they are, quarantine.

Against a real S3-speaking server over HTTP; what is in the bucket is read by boto3, not by our code. Time is
injected: a day passes by asking another clock.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.errors import ConfigError
from storage import sealed_objects
from storage.artifacts import Artifacts, State
from storage.collect import collect, plan_collection
from storage.errors import ArtifactCorruptError, ObjectStoreError
from storage.locks import no_wait
from storage.object_store import ObjectStore
from storage.place import FOLDERS
from storage.reachability import pin, unpin
from storage.records import sealed, unsealed
from storage.runs import begin_attempt, run_names
from support.commands import Run
from support.house import files_of, plan_of, pretend
from support.s3_server import delete, objects, on, put

pytestmark = pytest.mark.usefixtures("quick_disk")

TWO: dict[str, Any] = {"training": {"progressive": {"target_stacks": 2}}}
LESS: dict[str, Any] = {"training": {"progressive": {"target_stacks": 1}}}


@pytest.fixture
def a_day_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that was put so far is older than the grace; leases go by the time there is."""
    monkeypatch.setattr(sealed_objects, "clock", lambda: datetime.now(UTC) + timedelta(hours=25))


def names(uri: str) -> set[str]:
    """Return the artifacts that have a manifest in the bucket."""
    return {name.split("/")[1] for name in objects(uri) if name.count("/") == 2 and name.endswith("/manifest.json")}


def planned(*plans: Any) -> set[str]:
    return {ref.name for plan in plans for ref in plan.recipes}


def n_bytes(uri: str) -> int:
    return sum(map(len, objects(uri).values()))


def forget_run(uri: str, name: str) -> None:
    delete(uri, *(key for key in objects(uri) if key.startswith(f"runs/{name}/")))


# ---------------------------------------------------------------- gc


def test_what_no_run_reaches_goes_after_a_day(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    one, two = pretend(here, **LESS), pretend(other, "two", **TWO)
    assert planned(two) - planned(one)
    assert planned(two) & planned(one)
    assert collect(here).removals == []
    forget_run(s3, "two")
    before = objects(s3)
    assert collect(here).removals == []  # it is young: its run may not have been heard of yet
    assert objects(s3) == before
    monkeypatch.setattr(sealed_objects, "clock", lambda: datetime.now(UTC) + timedelta(hours=25))
    forecast = plan_collection(here)
    assert objects(s3) == before
    assert {removal.path.name for removal in forecast.removals} == planned(two) - planned(one)
    done = collect(here)
    assert done.removals == forecast.removals
    after = objects(s3)
    assert sum(map(len, before.values())) - sum(map(len, after.values())) == forecast.n_bytes > 0
    assert after.items() <= before.items()
    assert names(s3) == planned(one)
    assert not any(name.split("/")[1] in planned(two) - planned(one) for name in after if "/" in name)
    gone = next(ref for ref in two.recipes if ref.name not in planned(one))
    assert other.state(gone) is State.ABSENT  # though the other machine still has its copy in scratch
    assert run_names(on(tmp_path / "b", s3)) == ["one"]


def test_the_manifest_goes_before_the_data(
    s3: str, tmp_path: Path, a_day_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    pretend(here, **LESS)
    deleted: list[str] = []
    plain = ObjectStore.delete

    def noted(self: ObjectStore, keys: Any) -> None:
        deleted.extend(key for key in keys if not key.startswith(("leases/", "runs/")))
        plain(self, keys)

    monkeypatch.setattr(ObjectStore, "delete", noted)
    sealed = names(s3)
    collect(here, keep_last=0)
    assert not names(s3)
    for name in sealed:
        first = next(key for key in deleted if key.split("/")[1] == name)
        assert first.endswith(f"{name}/manifest.json")
    assert {key.partition("/")[0] for key in objects(s3)} <= {"leases"}


@pytest.mark.slow
def test_killed_between_manifest_and_data_the_next_gc_finishes_it(
    s3: str, tmp_path: Path, a_day_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    plan = pretend(here, **LESS)

    def die(point: str, number: int) -> None:
        if point == "gc-data":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sealed_objects, "failpoint", die)
        with pytest.raises(KeyboardInterrupt):
            collect(here, keep_last=0)
    (half,) = planned(plan) - names(s3)
    assert any(half in name for name in sealed_bytes(s3))
    collect(on(tmp_path / "b", s3), keep_last=0)
    assert sealed_bytes(s3) == {}


def test_a_run_that_begins_during_a_gc_keeps_what_it_plans(
    s3: str, tmp_path: Path, a_day_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    pretend(here, "keeps", training={"learning_rate": 0.5, **LESS["training"]})
    plan = pretend(here, **LESS)
    forget_run(s3, "one")
    before = objects(s3)
    begun: list[Any] = []

    def begin(*_: Any) -> None:  # after the first manifest is deleted, before anything else is
        if not begun:
            config, same = plan_of("one", **LESS)
            begun.append(begin_attempt(other, config, same, no_wait))
            begun[0].__enter__()

    monkeypatch.setattr(sealed_objects, "failpoint", lambda point, number: begin() if point == "gc-data" else None)
    collect(on(tmp_path / "a", s3))
    begun[0].__exit__(None, None, None)
    assert names(s3) >= planned(plan)
    after = objects(s3)
    assert {name: after.get(name) for name in before if not name.startswith("leases/")} == {
        name: data for name, data in before.items() if not name.startswith("leases/")
    }


def test_dead_attempts_go_and_what_is_at_work_stays(
    s3: str, tmp_path: Path, a_day_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    plan = pretend(here, **LESS)
    sealed, unsealed = plan.stages[0].ref("stack"), plan_of(**TWO)[1].stages[1].ref("stack")
    before = objects(s3)
    put(s3, f"stacks/{sealed.name}/deadbeefdeadbeef/sub/file", b"12345")
    put(s3, f"stacks/{unsealed.name}/deadbeefdeadbeef/file", b"1234567")
    with other.lock(unsealed.name):
        assert [removal.n_bytes for removal in collect(here).removals] == [5]
        assert f"stacks/{unsealed.name}/deadbeefdeadbeef/file" in objects(s3)
    assert [removal.n_bytes for removal in collect(here).removals] == [7]
    assert objects(s3) == before


def test_an_upload_that_was_finished_since_gc_looked_is_not_taken_for_dead(
    s3: str, tmp_path: Path, a_day_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    plan = pretend(here, **LESS)
    ref = plan.stages[0].ref("stack")
    before = objects(s3)
    key = f"stacks/{ref.name}/manifest.json"
    delete(s3, key)
    monkeypatch.setattr("storage.collect.failpoint", lambda point, number: put(s3, key, before[key]))
    assert collect(here).removals == []
    assert {k: v for k, v in objects(s3).items() if not k.startswith("leases")} == before


@pytest.mark.slow
def test_only_the_last_runs_count_and_a_live_one_always(s3: str, tmp_path: Path, a_day_later: None) -> None:
    here, other = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    plans = {
        name: pretend(here, name, training={"learning_rate": rate, **LESS["training"]})
        for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.3))
    }
    for day, name in enumerate(("b", "a", "c")):  # the order in which they were started
        key = f"runs/{name}/attempts/0001/start.json"
        start = {**unsealed(objects(s3)[key]), "started": f"2026-01-0{day + 1}T00:00:00.000000+00:00"}
        # Of another length: a file of one length that is put twice within a second is not brought again.
        put(s3, key, sealed(start).encode())
    here.place.refresh_records()
    with other.lock("run-b", shared=True):
        assert {removal.path.name for removal in plan_collection(here, keep_last=1).removals if _is_run(removal)} == {
            "a"
        }
    before = n_bytes(s3)
    done = collect(here, keep_last=1)
    assert names(s3) == planned(plans["c"])
    assert {key.split("/")[1] for key in objects(s3) if key.startswith("runs/")} == {"c"}
    assert before - n_bytes(s3) == done.n_bytes


def _is_run(removal: Any) -> bool:
    return removal.path.parent.name == "runs"


@pytest.mark.slow
def test_a_pin_is_seen_by_every_machine(s3: str, tmp_path: Path, a_day_later: None) -> None:
    here, other = on(tmp_path / "a", s3), on(tmp_path / "b", s3)
    plan = pretend(here, **LESS)
    pinned = plan.stages[0].ref("stack")
    pin(here, pinned)
    collect(on(tmp_path / "b", s3), keep_last=0)
    assert pinned.name in names(s3)
    assert plan.data_ref.name in names(s3)  # what it was made from
    assert names(s3) < planned(plan)
    other.place.refresh_records()
    unpin(other, pinned.name)
    collect(on(tmp_path / "a", s3), keep_last=0)
    assert names(s3) == set()


@pytest.mark.slow
def test_what_cannot_be_believed_stops_gc_or_stays(s3: str, tmp_path: Path, a_day_later: None) -> None:
    here = on(tmp_path / "a", s3)
    plan = pretend(here, **LESS)
    key = f"stacks/{plan.stages[0].ref('stack').name}/manifest.json"
    good = objects(s3)
    put(s3, key, good[key].replace(b'"stage"', b'"Stage"'))
    put(s3, "stacks/a-friend/of-mine", b"1")
    collection = collect(here, keep_last=0)
    assert [line.partition(": ")[0] for line in collection.damaged] == [f"{s3}/{key.rpartition('/')[0]}"]
    assert {name for name in objects(s3) if name.startswith("stacks/")} == {
        name for name in good if name.startswith(f"{key.rpartition('/')[0]}/")
    } | {"stacks/a-friend/of-mine"}
    put(s3, key, good[key])
    pretend(here, "two", **LESS)
    put(s3, "runs/two/attempts/0001/plan.json", b"{}")
    before = objects(s3)
    with pytest.raises(ArtifactCorruptError, match=r"plan\.json"):
        collect(on(tmp_path / "b", s3))
    assert objects(s3) == before


def test_without_any_run_not_everything_goes_unasked(s3: str, tmp_path: Path, a_day_later: None, run: Run) -> None:
    pretend(on(tmp_path / "a", s3), **LESS)
    forget_run(s3, "one")
    with pytest.raises(ConfigError, match=s3):
        collect(on(tmp_path / "a", s3))


# ---------------------------------------------------------------- push and pull


def sealed_bytes(uri: str) -> dict[str, bytes]:
    """Return everything of artifacts in a bucket."""
    return {name: data for name, data in objects(uri).items() if name.split("/")[0] in FOLDERS.values()}


@pytest.mark.slow
def test_a_run_goes_to_a_bucket_to_another_and_back_to_a_folder(
    s3: str, s3_server: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Artifacts(tmp_path / "local").open()
    plan, second = pretend(local, **LESS), s3_server.bucket()
    plan_bytes = (local.root / "runs/one/attempts/0001/plan.json").read_bytes()
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "a"))
    assert run("push", s3, "one", "--artifacts", local.root).code == 0
    assert names(s3) == planned(plan)
    assert objects(s3)["runs/one/attempts/0001/plan.json"] == plan_bytes
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "b"))  # another machine
    assert run("push", second, "--artifacts", s3).code == 0
    assert sealed_bytes(second) == sealed_bytes(s3)
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "c"))
    assert run("pull", second, "one", "--artifacts", tmp_path / "back").code == 0
    back = Artifacts(tmp_path / "back")
    for ref in plan.recipes:
        assert files_of(back.folder(ref)) == files_of(local.folder(ref))
    again = run("push", s3, "one", "--artifacts", local.root)
    assert (again.code, "copied 0 artifacts" in again.out) == (0, True)


def test_a_push_that_was_cut_off_goes_on_and_shows_nothing_before_its_seal(
    s3: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Artifacts(tmp_path / "local").open()
    plan = pretend(local, **LESS)
    stack = plan.stages[0].ref("stack")
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "a"))
    put_objects: list[str] = []
    plain = ObjectStore.write

    def failing(self: ObjectStore, key: str, data: Any) -> None:
        if stack.name in key and any(stack.name in name for name in put_objects):
            raise ObjectStoreError(f"{key}: lost")
        put_objects.append(key)
        plain(self, key, data)

    monkeypatch.setattr(ObjectStore, "write", failing)
    assert run("push", s3, "one", "--artifacts", local.root).code == 1
    assert stack.name not in names(s3)
    assert not any(name.startswith("runs/") for name in objects(s3))
    (arrived,) = [key for key in put_objects if stack.name in key]
    put_objects.clear()
    monkeypatch.setattr(
        ObjectStore, "write", lambda self, key, data: (put_objects.append(key), plain(self, key, data))[1]
    )
    assert run("push", s3, "one", "--artifacts", local.root).code == 0
    assert names(s3) == planned(plan)
    assert arrived not in put_objects
    assert len([key for key in put_objects if stack.name in key]) == 1


@pytest.mark.slow
def test_what_is_damaged_does_not_leave_a_bucket_nor_enter_one(
    s3: str, s3_server: Any, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    plan, second = pretend(here, **LESS), s3_server.bucket()
    stack = plan.stages[0].ref("stack")
    key = next(name for name in objects(s3) if stack.name in name and name.endswith("/content"))
    put(s3, key, objects(s3)[key][:-1] + b"!")  # of the same size
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "b"))
    for target in (second, str(tmp_path / "back")):
        failed = run("push", target, stack.name, "--artifacts", s3)
        assert (failed.code, key in failed.err) == (3, True)
    assert stack.name not in names(second)
    assert not any(stack.name in name for name in objects(second) if not name.startswith("leases/"))
    local = Artifacts(tmp_path / "local").open()
    damaged = pretend(local, "two", **LESS).stages[0].ref("stack")
    (local.folder(damaged) / "content").write_bytes(b"x" * (local.folder(damaged) / "content").stat().st_size)
    failed = run("push", second, damaged.name, "--artifacts", local.root)
    assert failed.code == 3
    assert not any(stack.name in name for name in objects(second) if not name.startswith("leases/"))


def test_what_is_retired_is_retired_at_the_target(s3: str, tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    local = Artifacts(tmp_path / "local").open()
    store = pretend(local, training={"progressive": {"target_stacks": 2}}).stages[0].ref("activations")
    local.retire(store)
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "a"))
    assert run("push", s3, "--artifacts", local.root).code == 0
    assert on(tmp_path / "b", s3).state(store) is State.RETIRED
    assert [name.rpartition("/")[2] for name in sealed_bytes(s3) if store.name in name] == [
        "retired.json",
        "manifest.json",
    ]


# ---------------------------------------------------------------- du, quarantine, why, doctor


@pytest.mark.slow
def test_du_and_why_tell_of_a_bucket_what_they_tell_of_a_folder(
    s3: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, other = Artifacts(tmp_path / "local").open(), {"training": {**LESS["training"], "learning_rate": 0.5}}
    one, _ = pretend(local, **LESS), pretend(local, "two", **other)
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "a"))
    assert run("push", s3, "--artifacts", local.root).code == 0
    here = json.loads(run("du", "--json", "--artifacts", local.root).out)
    there = json.loads(run("du", "--json", "--artifacts", s3).out)
    assert there["total"] == n_bytes(s3) == sum(there["places"].values())
    for place in ("reached by one run", "reached by several runs", "records of runs"):
        assert there["places"][place] == here["places"][place] > 0
    assert there["runs"] == here["runs"]
    stack = one.stages[0].ref("stack").name
    told = [json.loads(run("why", stack, "--json", "--artifacts", root).out) for root in (local.root, s3)]
    assert told[0] == told[1]
    assert [each["field"] for each in told[1]["differences"]] == ["optim.learning_rate"]


def test_quarantine_in_a_bucket_is_listed_released_and_dropped(
    s3: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = on(tmp_path / "a", s3)
    ref = pretend(here, **LESS).stages[0].ref("stack")
    before = sealed_bytes(s3)
    here.quarantine(ref, "rows differ")
    aside = {name: data for name, data in objects(s3).items() if name.startswith("quarantine/")}
    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "b"))
    (entry,) = json.loads(run("quarantine", "--json", "--artifacts", s3).out)["quarantine"]
    assert (entry["reason"], entry["n_bytes"]) == ("rows differ", sum(map(len, aside.values())))
    assert entry["path"].startswith(f"{s3}/quarantine/{ref.name}.")
    content = next(name for name in aside if name.endswith("/content"))
    put(s3, content, aside[content][:-1] + b"!")
    failed = run("quarantine", "--release", ref.name, "--artifacts", s3)
    assert (failed.code, content in failed.err, "stays in quarantine" in failed.err) == (3, True, True)
    assert ref.name not in names(s3)
    put(s3, content, aside[content])
    assert run("quarantine", "--release", ref.name, "--artifacts", s3).code == 0
    assert sealed_bytes(s3) == before
    here.quarantine(ref, "again")
    assert run("quarantine", "--drop", ref.name, "--artifacts", s3).code == 0
    assert not any(ref.name in name for name in objects(s3) if not name.startswith(("leases/", "runs/")))


def test_doctor_tries_a_uri(s3: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def says() -> tuple[bool, str]:
        found = json.loads(run("doctor", "--json", "--artifacts", s3).out)["findings"]
        return next((each["ok"], each["says"]) for each in found if each["what"] == "object store")

    monkeypatch.setenv("STACKWISE_SCRATCH", str(tmp_path / "a"))
    ok, line = says()
    assert ok, line
    assert "keeps conditions" in line
    assert objects(s3) == {}
    monkeypatch.setattr(ObjectStore, "create", lambda self, key, data: True)
    assert says() == (False, says()[1])
    assert "ignores If-None-Match" in says()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    ok, line = says()
    assert (ok, "check AWS_ENDPOINT_URL" in line) == (False, True)
