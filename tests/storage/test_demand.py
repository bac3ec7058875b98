"""Demand: from the goals backwards, exactly what must be made, and a clear refusal of what is damaged.

Artifacts here are small files sealed under the references of a real plan of three stages. They are named
"data", "build 0", "stack 1", "cache 1" and so on; a cache k is the boundary that stage k + 1 reads.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts, State
from storage.demand import TASK_KINDS, Demand, advance_source, compute_demand, forced_refs, reads
from storage.errors import ArtifactCorruptError
from storage.manifest import MANIFEST, RETIRED

N_STAGES = 3


def configuration(target: int = N_STAGES, **growth: Any) -> StackWiseConfig:
    return StackWiseConfig.from_dict({"training": {"progressive": {"target_stacks": target, **growth}}})


def refs_of(plan: RunPlan) -> dict[str, Ref]:
    """Every artifact of a plan, by its name here, in the order of making."""
    named = {"data": plan.data_ref}
    for stage in plan.stages:
        for name, kind in (
            ("build", "build"),
            ("trunk", "trunk"),
            ("stack", "stack"),
            ("cache", "activations"),
            ("validation", "validation"),
        ):
            if stage.recipe(kind) is not None:
                named[f"{name} {stage.index}"] = stage.ref(kind)
    return named


# What making each reads, from docs/semantics: written down by hand, and not from the code under test.
READS: dict[str, set[str]] = {
    "data": set(),
    "build 0": set(),
    "trunk 0": set(),
    "stack 0": {"data", "build 0", "trunk 0"},
    "cache 0": {"data", "stack 0"},
    "validation 0": {"data", "stack 0", "cache 0"},
    "build 1": {"stack 0"},
    "trunk 1": {"stack 0"},
    "stack 1": {"data", "stack 0", "build 1", "trunk 1", "cache 0", "validation 0"},
    "cache 1": {"data", "stack 0", "stack 1"},
    "validation 1": {"data", "stack 0", "stack 1", "cache 1"},
    "build 2": {"stack 1"},
    "trunk 2": {"stack 0", "stack 1"},
    "stack 2": {"data", "stack 0", "stack 1", "build 2", "trunk 2", "cache 1", "validation 1"},
    "validation 2": {"data", "stack 0", "stack 1", "stack 2"},
}
PLAN = plan_run(configuration(), "00" * 32)
REFS = refs_of(PLAN)
NAMES = {ref: name for name, ref in REFS.items()}


def seal(artifacts: Artifacts, name: str, plan: RunPlan = PLAN, text: str = "") -> None:
    """Seal a small file as the artifact; its inputs are whatever of what it reads is sealed."""
    refs = refs_of(plan)
    ref = refs[name]
    (artifacts.work(ref) / "content").write_text(text or name)
    inputs = [read for read in reads(ref, plan) if artifacts.state(read) is State.SEALED]
    recipe = plan.data if name == "data" else plan.stages[ref.stage].recipe(ref.kind)
    assert recipe is not None
    artifacts.seal(ref, recipe, tuple(map(artifacts.input_entry, inputs)), {}, {})


def seal_all(root: Path, plan: RunPlan = PLAN) -> Artifacts:
    artifacts = Artifacts(root).open()
    for name in refs_of(plan):
        seal(artifacts, name, plan)
    return artifacts


def needed(
    artifacts: Artifacts, keep: str = "all", plan: RunPlan = PLAN, forced: frozenset[Ref] = frozenset()
) -> set[str]:
    names = {ref: name for name, ref in refs_of(plan).items()}
    demand = compute_demand(plan, artifacts, keep, forced)
    assert demand.complete == (not demand.needed)
    return {names[ref] for ref in demand.needed}


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seal_all(tmp_path_factory.mktemp("template") / "artifacts").root


@pytest.fixture
def artifacts(template: Path, tmp_path: Path) -> Artifacts:
    """Everything sealed."""
    return Artifacts(shutil.copytree(template, tmp_path / "artifacts"))


def as_kept_last(artifacts: Artifacts) -> None:
    """What a finished run with cache.keep = last leaves: every boundary but the last one retired."""
    artifacts.retire(REFS["cache 0"])


# ---------------------------------------------------------------- what reads what


def test_what_is_read_in_which_order(artifacts: Artifacts) -> None:
    assert set(REFS) == set(READS)
    order = list(REFS)
    for name, ref in REFS.items():
        found = [NAMES[read] for read in reads(ref, PLAN)]
        assert set(found) == READS[name]
        assert len(set(found)) == len(found)
        assert all(order.index(read) < order.index(name) for read in found)


def test_without_caches_nothing_reads_one(tmp_path: Path) -> None:
    plan = plan_run(configuration(cache_activations=False), "00" * 32)
    artifacts = Artifacts(tmp_path).open()
    assert not any("cache" in name for name in needed(artifacts, plan=plan))
    stack = reads(plan.stages[2].ref("stack"), plan)
    assert {ref.kind for ref in stack} == {"data", "stack", "build", "trunk"}


# ---------------------------------------------------------------- nothing, everything, all but one


@pytest.mark.parametrize("keep", ["all", "last"])
def test_where_nothing_is_everything_is_needed(keep: str, tmp_path: Path) -> None:
    assert needed(Artifacts(tmp_path).open(), keep) == set(READS)


@pytest.mark.parametrize("keep", ["all", "last"])
def test_where_all_is_sealed_nothing_is_needed(keep: str, artifacts: Artifacts) -> None:
    assert needed(artifacts, keep) == set()
    demand = compute_demand(PLAN, artifacts, keep)
    assert demand.complete
    assert set(demand.states.values()) == {State.SEALED}


# name deleted -> needed with every other artifact sealed (keep = all)
DELETED_ALL = {
    "data": set(),
    "build 0": set(),
    "trunk 0": set(),
    "stack 0": {"stack 0"},
    "cache 0": {"cache 0"},
    "validation 0": {"validation 0"},
    "build 1": set(),
    "trunk 1": set(),
    "stack 1": {"stack 1"},
    "cache 1": {"cache 1"},
    "validation 1": {"validation 1"},
    "build 2": set(),
    "trunk 2": set(),
    "stack 2": {"stack 2"},
    "validation 2": {"validation 2"},
}


@pytest.mark.parametrize("name", READS)
def test_one_deleted_with_all_kept(name: str, artifacts: Artifacts) -> None:
    artifacts.discard(REFS[name])
    assert needed(artifacts, "all") == DELETED_ALL[name]


# The same after a run with keep = last: cache 0 is retired, and refilled only if something reads it.
DELETED_LAST = DELETED_ALL | {
    "cache 0": set(),
    "cache 1": set(),
    "validation 0": {"validation 0", "cache 0"},
    "stack 1": {"stack 1", "cache 0"},
}


@pytest.mark.parametrize("name", READS)
def test_one_deleted_with_the_last_kept(name: str, artifacts: Artifacts) -> None:
    as_kept_last(artifacts)
    artifacts.discard(REFS[name])
    assert needed(artifacts, "last") == DELETED_LAST[name]


@pytest.mark.parametrize(
    ("deleted", "keep", "expected"),
    [
        # a descriptor is a goal of nobody, but training starts from it
        (["stack 1", "build 1", "trunk 1"], "last", {"stack 1", "build 1", "trunk 1", "cache 0"}),
        # the pair (cache, validation) stands before its consumer
        (["stack 2", "validation 1"], "last", {"stack 2", "validation 1"}),
        (["stack 2", "cache 1"], "last", {"stack 2", "cache 1"}),
        (["data", "stack 2", "cache 1"], "last", {"data", "stack 2", "cache 1"}),
        # a cache is derived from stacks: those must be there, their builds need not
        (["cache 0", "build 0", "trunk 0", "data"], "all", {"cache 0", "data"}),
        (["cache 0", "stack 0", "build 0", "trunk 0"], "all", {"cache 0", "stack 0", "build 0", "trunk 0"}),
        (["build 0", "build 1", "build 2", "trunk 0", "trunk 1", "trunk 2", "data"], "all", set()),
    ],
)
def test_several_deleted(deleted: list[str], keep: str, expected: set[str], artifacts: Artifacts) -> None:
    as_kept_last(artifacts) if keep == "last" else None
    for name in deleted:
        artifacts.discard(REFS[name])
    assert needed(artifacts, keep) == expected


def test_all_kept_asks_for_what_was_retired(artifacts: Artifacts) -> None:
    """Going from keep = last to keep = all refills what was dropped."""
    as_kept_last(artifacts)
    assert needed(artifacts, "last") == set()
    assert needed(artifacts, "all") == {"cache 0"}


def test_the_last_stage_has_no_cache(artifacts: Artifacts) -> None:
    assert "cache 2" not in REFS
    assert PLAN.stages[2].no_cache_reason.startswith("last stage")


@pytest.mark.parametrize("keep", ["all", "last"])
def test_one_stack_more_costs_one_stage_and_the_boundary_below(keep: str, artifacts: Artifacts) -> None:
    if keep == "last":
        as_kept_last(artifacts)
    plan = plan_run(configuration(4), "00" * 32)
    taller = refs_of(plan)
    assert {name for name, ref in REFS.items() if taller[name] != ref} == {"validation 2"}
    stage_3 = {"build 3", "trunk 3", "stack 3", "validation 3"}
    assert needed(artifacts, keep, plan) == {"cache 2", "validation 2"} | stage_3


def test_another_seed_shares_the_data_and_the_empty_trunk(artifacts: Artifacts) -> None:
    config = configuration()
    config.run.seed = 1
    assert needed(artifacts, plan=plan_run(config, "00" * 32)) == set(READS) - {"data", "trunk 0"}


def test_a_sweep_of_the_last_stage_shares_those_before(artifacts: Artifacts) -> None:
    config = configuration(stacks=[{}, {}, {"n_blocks": 1}])
    assert needed(artifacts, plan=plan_run(config, "00" * 32)) == {"build 2", "stack 2", "validation 2"}


# ---------------------------------------------------------------- against an oracle


def oracle(states: dict[str, str], keep: str, forced: set[str]) -> set[str]:
    """Grow the set of what must be made until nothing is added."""
    wanted = {name for name in READS if name.startswith(("stack", "validation"))} | forced
    if keep == "all":
        wanted |= {name for name in READS if name.startswith("cache")}
    while True:
        made = {name for name in wanted if states[name] != "sealed" or name in forced}
        read = set().union(*(READS[name] for name in made))
        if read <= wanted:
            return made
        wanted |= read


STATES = st.fixed_dictionaries({name: st.sampled_from(["sealed", "sealed", "absent", "retired"]) for name in READS})


@settings(max_examples=120)
@given(states=STATES, keep=st.sampled_from(["all", "last"]), forced=st.sets(st.sampled_from(sorted(READS)), max_size=2))
@example(states=dict.fromkeys(READS, "sealed"), keep="last", forced={"stack 1"})
@example(states=dict.fromkeys(READS, "retired"), keep="last", forced=set())
def test_what_is_needed_is_the_least_that_makes_the_goals(
    states: dict[str, str], keep: str, forced: set[str], template: Path, shelf: Path
) -> None:
    artifacts = Artifacts(template)
    try:
        for name, state in states.items():
            if state == "absent":
                artifacts.folder(REFS[name]).rename(shelf / name)
            elif state == "retired":
                (artifacts.folder(REFS[name]) / RETIRED).touch()
        demand = compute_demand(PLAN, artifacts, keep, frozenset(REFS[name] for name in forced))
        assert {NAMES[ref] for ref in demand.needed} == oracle(states, keep, forced)
        assert all(demand.states[ref].value == states[NAMES[ref]] for ref in demand.states)
        assert demand.needed <= set(demand.states)
    finally:
        for name in READS:
            if (shelf / name).exists():
                (shelf / name).rename(artifacts.folder(REFS[name]))
            (artifacts.folder(REFS[name]) / RETIRED).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shelf(template: Path) -> Path:
    folder = template.parent / "shelf"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- redoing on purpose


def test_what_is_forced() -> None:
    def forced(from_stack: int, force: str) -> set[str]:
        return {NAMES[ref] for ref in forced_refs(PLAN, from_stack, force)}

    assert forced(-1, "") == set()
    assert forced(2, "") == {"build 2", "trunk 2", "stack 2", "validation 2"}
    assert forced(0, "") == set(READS) - {"data"}
    assert forced(-1, "cache") == {"cache 0", "cache 1"}
    assert forced(1, "cache") == {"cache 1"}
    assert forced(2, "cache") == set()
    assert forced(1, "train") == {"stack 1", "stack 2"}
    for task, kind in TASK_KINDS.items():
        assert {ref.kind for ref in forced_refs(PLAN, -1, task)} == {kind}


@pytest.mark.parametrize(
    ("from_stack", "force", "message"),
    [(3, "", "--from-stack: got 3; the stages are 0 to 2"), (0, "data", "--force: got 'data'; the tasks are build")],
)
def test_what_cannot_be_forced_is_refused(from_stack: int, force: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        forced_refs(PLAN, from_stack, force)
    assert caught.value.exit_code == 2


def test_forcing_redoes_the_forced_and_what_it_lacks(artifacts: Artifacts) -> None:
    assert needed(artifacts, "all", forced=frozenset([REFS["stack 1"]])) == {"stack 1"}
    as_kept_last(artifacts)
    assert needed(artifacts, "last", forced=frozenset([REFS["stack 1"]])) == {"stack 1", "cache 0"}
    assert needed(artifacts, "last", forced=frozenset([REFS["cache 0"]])) == {"cache 0"}
    demand: Demand = compute_demand(PLAN, artifacts, "last", frozenset([REFS["build 0"]]))
    assert (demand.needed, demand.forced) == ({REFS["build 0"]}, {REFS["build 0"]})


def test_a_damaged_artifact_may_be_redone_on_purpose(artifacts: Artifacts) -> None:
    (artifacts.folder(REFS["stack 1"]) / "content").unlink()
    with pytest.raises(ArtifactCorruptError):
        needed(artifacts)
    assert needed(artifacts, forced=frozenset([REFS["stack 1"]])) == {"stack 1"}


# ---------------------------------------------------------------- damage

GOALS = [name for name in READS if name.startswith(("stack", "validation"))]


def cut(artifacts: Artifacts, name: str) -> Path:
    path = artifacts.folder(REFS[name]) / "content"
    os.truncate(path, 2)
    return path


@pytest.mark.parametrize("name", READS)
def test_damage_is_refused_where_it_matters_and_names_the_file(name: str, artifacts: Artifacts) -> None:
    path = cut(artifacts, name)
    for keep, goals in (("last", GOALS), ("all", [*GOALS, "cache 0", "cache 1"])):
        if name not in goals:
            assert needed(artifacts, keep) == set()
            continue
        with pytest.raises(ArtifactCorruptError, match="2 bytes, sealed with") as caught:
            needed(artifacts, keep)
        assert caught.value.path == path
        assert caught.value.exit_code == 3
        assert f"Remove {path.parent} and run the same command again" in caught.value.remedy


@pytest.mark.parametrize(("damaged", "reader"), [("data", "stack 2"), ("cache 1", "stack 2"), ("build 0", "stack 0")])
def test_damage_is_refused_once_something_must_read_it(damaged: str, reader: str, artifacts: Artifacts) -> None:
    path = cut(artifacts, damaged)
    assert needed(artifacts, "last") == set()
    artifacts.discard(REFS[reader])
    with pytest.raises(ArtifactCorruptError) as caught:
        needed(artifacts, "last")
    assert caught.value.path == path


# ---------------------------------------------------------------- lineage


def remake(artifacts: Artifacts, name: str) -> None:
    artifacts.discard(REFS[name])
    seal(artifacts, name, text="other bytes under the same recipe")


def followers(name: str) -> set[str]:
    """What was made from it and is a goal."""
    return {other for other in READS if name in READS[other] and not other.startswith(("build", "trunk"))}


def stage_to_redo(artifacts: Artifacts, forced: frozenset[Ref] = frozenset()) -> int | None:
    """Return what the message tells to redo from; None if there is nothing to complain about."""
    try:
        compute_demand(PLAN, artifacts, "all", forced)
    except ArtifactCorruptError as error:
        return int(error.remedy.partition("run the same command with --from-stack ")[2])
    return None


@pytest.mark.parametrize("remade", ["data", "stack 0", "build 1", "trunk 2", "cache 0", "cache 1", "validation 1"])
def test_what_was_made_from_other_bytes_is_refused(remade: str, artifacts: Artifacts) -> None:
    remake(artifacts, remade)
    with pytest.raises(ArtifactCorruptError, match=f"was made from other bytes of {REFS[remade].name}") as caught:
        needed(artifacts)
    assert caught.value.exit_code == 3
    blamed = [name for name, ref in REFS.items() if artifacts.folder(ref) == caught.value.path]
    assert set(blamed) <= followers(remade)
    assert stage_to_redo(artifacts) in {REFS[name].stage for name in followers(remade)}


def test_the_first_stage_that_must_be_redone_is_named(tmp_path: Path) -> None:
    """So that one more command is enough; six times, since one of many may be named by chance."""
    plan = plan_run(configuration(8), "00" * 32)
    artifacts = seal_all(tmp_path, plan)
    for index in range(5, -1, -1):
        artifacts.discard(plan.stages[index].ref("stack"))
        seal(artifacts, f"stack {index}", plan, text="other bytes")
        with pytest.raises(ArtifactCorruptError, match=rf"--from-stack {index}$"):
            compute_demand(plan, artifacts, "all")


@pytest.mark.parametrize("remade", ["stack 0", "build 1", "cache 1"])
def test_following_the_remedy_ends(remade: str, artifacts: Artifacts) -> None:
    """What the message says to redo is enough, perhaps after other messages of the same kind."""
    remake(artifacts, remade)
    forced: frozenset[Ref] = frozenset()
    told: list[int] = []
    while (stage := stage_to_redo(artifacts, forced)) is not None:
        assert not told or stage < told[-1]
        told.append(stage)
        forced = forced_refs(PLAN, stage, "")
    assert told
    demand = compute_demand(PLAN, artifacts, "all", forced)
    for name, ref in REFS.items():
        if ref in demand.needed:
            seal(artifacts, name, text=f"{name}, redone")
    assert needed(artifacts) == set()


def test_equal_bytes_made_again_are_accepted(artifacts: Artifacts) -> None:
    for name in ("stack 0", "cache 0", "data", "build 1"):
        artifacts.discard(REFS[name])
        seal(artifacts, name)
        assert needed(artifacts) == set()


def test_lineage_of_what_is_redone_or_gone_is_not_compared(artifacts: Artifacts) -> None:
    remake(artifacts, "build 1")
    assert needed(artifacts, forced=frozenset([REFS["stack 1"]])) == {"stack 1"}  # it reads the new one
    artifacts.discard(REFS["build 1"])
    assert needed(artifacts) == set()  # nothing to compare with
    remake(artifacts, "cache 1")
    assert needed(artifacts, forced=frozenset([REFS["cache 1"]])) == {"cache 1"}  # it may come back as it was


def test_a_retired_input_is_not_compared_until_it_is_back(artifacts: Artifacts) -> None:
    artifacts.retire(REFS["cache 0"])
    assert needed(artifacts, "last") == set()
    seal(artifacts, "cache 0", text="refilled to other bytes")
    with pytest.raises(ArtifactCorruptError, match=f"other bytes of {REFS['cache 0'].name}"):
        needed(artifacts, "last")


# ---------------------------------------------------------------- one stack forward instead of a whole trunk


def steps_of(*steps: int) -> RunPlan:
    return plan_run(configuration(stacks=[{"steps": n} for n in steps]), "00" * 32)


def source(plan: RunPlan, index: int, artifacts: Artifacts) -> Ref | None:
    return advance_source(plan.stages[index], plan, artifacts)


def test_a_boundary_advances_from_the_sealed_one_below(artifacts: Artifacts) -> None:
    assert source(PLAN, 0, artifacts) is None  # below it are tokens
    assert source(PLAN, 1, artifacts) == REFS["cache 0"]
    assert source(PLAN, 2, artifacts) is None  # it has no cache of its own
    taller = plan_run(configuration(4), "00" * 32)
    assert source(taller, 2, artifacts) == REFS["cache 1"]


@pytest.mark.parametrize("state", ["retired", "absent", "unsealed"])
def test_only_a_sealed_store_is_advanced_from(state: str, artifacts: Artifacts) -> None:
    below = REFS["cache 0"]
    if state == "retired":
        artifacts.retire(below)
    elif state == "absent":
        artifacts.discard(below)
    else:
        (artifacts.folder(below) / MANIFEST).unlink()
    assert source(PLAN, 1, artifacts) is None


def test_a_damaged_store_below_is_told_where_it_would_be_advanced_from(artifacts: Artifacts) -> None:
    path = cut(artifacts, "cache 0")
    with pytest.raises(ArtifactCorruptError, match="2 bytes, sealed with") as caught:
        source(PLAN, 1, artifacts)
    assert caught.value.path == path
    assert source(PLAN, 2, artifacts) is None


@pytest.mark.parametrize(
    ("steps", "advances"), [((300, 300, 300), True), ((200, 300, 200), True), ((300, 200, 300), False)]
)
def test_a_store_that_holds_fewer_rows_is_not_advanced_from(
    steps: tuple[int, ...], advances: bool, tmp_path: Path
) -> None:
    """Cache k holds the rows that stage k + 1 visits: with more steps above than below, some would be missing."""
    plan = steps_of(*steps)
    artifacts = seal_all(tmp_path, plan)
    assert source(plan, 1, artifacts) == (refs_of(plan)["cache 0"] if advances else None)


def test_a_store_of_another_corruption_is_not_advanced_from(artifacts: Artifacts) -> None:
    stage = PLAN.stages[1]
    assert stage.activations is not None
    assert stage.activations.mask is not None
    mask = stage.activations.mask.model_copy(update={"ratio": 0.5})
    other = stage.model_copy(update={"activations": stage.activations.model_copy(update={"mask": mask})})
    assert advance_source(other, PLAN, artifacts) is None


def test_a_store_of_another_trunk_is_not_advanced_from(artifacts: Artifacts) -> None:
    """As where the stage between changed a stack below both boundaries, or added one there."""
    stage = PLAN.stages[1]
    assert stage.activations is not None
    stacks = stage.activations.stacks
    for others in (("ab" * 32, *stacks[1:]), (*stacks, "ab" * 32), stacks[1:]):
        recipe = stage.activations.model_copy(update={"stacks": others})
        assert advance_source(stage.model_copy(update={"activations": recipe}), PLAN, artifacts) is None


# ---------------------------------------------------------------- reading changes nothing


def snapshot(root: Path) -> Iterator[tuple[str, int]]:
    return ((str(path), path.stat().st_mtime_ns) for path in sorted(root.rglob("*")))


def test_asking_writes_nothing(artifacts: Artifacts) -> None:
    artifacts.discard(REFS["stack 2"])
    before = list(snapshot(artifacts.root))
    needed(artifacts)
    assert list(snapshot(artifacts.root)) == before
    json.dumps(before)


# ---------------------------------------------------------------- while another process of the run goes on


def _meanwhile(monkeypatch: pytest.MonkeyPatch, look: int, act: Callable[[], None]) -> list[bool]:
    """Let something happen just before the n-th look at a file; the list says whether it came to that."""
    happened: list[bool] = []
    looks = 0
    stat = Path.stat

    def looking(path: Path, **how: Any) -> os.stat_result:
        nonlocal looks
        looks += 1
        if looks == look + 1:
            happened.append(True)
            act()
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", looking)
    return happened


def _at_every_look(template: Path, folder: Path, act: Callable[[Artifacts], None]) -> Iterator[Artifacts]:
    """Give fresh artifacts again and again; each time something happens to them one look at a file later."""
    for look in itertools.count():
        artifacts = Artifacts(shutil.copytree(template, folder / str(look)))
        with pytest.MonkeyPatch.context() as patch:
            happened = _meanwhile(patch, look, functools.partial(act, artifacts))
            yield artifacts
        if not happened:
            return


def test_a_store_may_be_retired_at_any_moment_of_asking(template: Path, tmp_path: Path) -> None:
    """Two processes share a run; one retires a store while the other finds out what there is to do."""
    looks = 0
    for artifacts in _at_every_look(template, tmp_path, lambda artifacts: artifacts.retire(REFS["cache 1"])):
        assert compute_demand(PLAN, artifacts, "last").needed == set()
        looks += 1
    assert looks > 40


@pytest.mark.parametrize("act", ["retire", "discard"])
def test_a_store_that_goes_while_its_state_is_asked_for_is_not_called_damaged(
    act: str, template: Path, tmp_path: Path
) -> None:
    gone = {"retire": State.RETIRED, "discard": State.ABSENT}[act]
    looking = _at_every_look(template, tmp_path, lambda artifacts: getattr(artifacts, act)(REFS["cache 1"]))
    assert {artifacts.state(REFS["cache 1"]) for artifacts in looking} == {State.SEALED, gone}


def test_two_processes_may_retire_a_store_at_once(template: Path, tmp_path: Path) -> None:
    looks = 0
    for artifacts in _at_every_look(template, tmp_path, lambda artifacts: artifacts.retire(REFS["cache 1"])):
        artifacts.retire(REFS["cache 1"])
        assert {path.name for path in artifacts.folder(REFS["cache 1"]).iterdir()} == {MANIFEST, RETIRED}
        looks += 1
    assert looks > 2
