"""Garbage collection, demand and copies, equal in every place: a folder as well as a bucket."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan
from storage.artifacts import Artifacts, State
from storage.collect import collect, plan_collection, without_gc
from storage.copying import attempts_to_copy, check_room, copy_artifact, copy_run, to_copy
from storage.demand import compute_demand
from storage.errors import ArtifactCorruptError
from storage.locks import no_wait
from storage.reachability import made_from, pin, planned
from storage.runs import begin_attempt, find_run, run_names
from support.artifacts import CONTENT, LOG, OTHER_CONTENT
from support.house import plan_of, pretend, put
from support.places import (
    FASTER,
    LESS,
    OTHER,
    REF,
    STORE,
    TWO,
    Place,
    contents,
    killed_at,
    meanwhile,
    names,
    names_of,
    only_in_a_bucket,
    seal,
    sealed_names,
)

pytestmark = pytest.mark.usefixtures("quick_disk", "no_patience")


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
    plan, other = pretend(place.here, **TWO), plan_of(**FASTER)[1].stages[0].ref("stack")
    store, before = plan.stages[0].ref("activations"), place.sums()
    place.here.retire(store)
    retired = place.sums()
    place.write(place.key(store, "content"), b"data of what is retired")
    place.write(place.key(other, "file"), b"never sealed")
    assert place.sums() != retired != before
    place.pass_a_day()
    done = collect(place.there)
    assert done.n_bytes == len(b"data of what is retired") + len(b"never sealed")
    assert place.sums() == retired
    assert place.open().state(store) is State.RETIRED


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
    plan = pretend(place.here, **TWO)
    retired = plan.stages[0].ref("activations")
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
    seal(place.here, ref=STORE)
    seal(target.here, ref=STORE)
    assert to_copy(place.there, target.there, [STORE], frozenset()) == []
    target.here.retire(STORE)
    assert to_copy(place.there, target.there, [STORE], frozenset()) == []
    assert to_copy(place.there, target.there, [STORE], frozenset([STORE])) == [STORE]
    copy_artifact(place.there, target.there, STORE, no_wait)
    assert contents(target.open(), STORE) == {**CONTENT, **LOG}
    assert target.files(STORE) == place.files(STORE)
    seal(target.here, OTHER_CONTENT, STORE)
    before = target.sums()
    with pytest.raises(ArtifactCorruptError, match="holds other bytes") as found:
        to_copy(place.there, target.there, [STORE], frozenset([STORE]))
    assert str(found.value).startswith(target.called(STORE))
    assert target.sums() == before
