"""Locks, runs and pins, equal in every place: a folder as well as a bucket."""

from __future__ import annotations

import contextlib
import os

import pytest

from stackwise_core.errors import ConfigError, CorpusError, StageInterruptedError
from stackwise_core.stages.plan import plan_run
from storage.artifacts import State
from storage.errors import ArtifactCorruptError, ArtifactMissingError, RunBusyError
from storage.locks import no_wait
from storage.reachability import find_reachable, pin, pins, unpin
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
from support.house import CORPUS, plan_of
from support.places import LESS, OTHER, REF, STORE, TWO, Place, seal

pytestmark = pytest.mark.usefixtures("quick_disk", "no_patience")


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
