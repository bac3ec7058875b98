"""Demand: from the goals backwards, exactly what must be made, and a clear refusal of what is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import plan_run
from storage.artifacts import Artifacts, State
from storage.demand import TASK_KINDS, Demand, compute_demand, forced_refs, reads
from storage.errors import ArtifactCorruptError
from storage.retirement import RETIRED
from support.demand import NAMES, PLAN, READS, REFS, as_kept_last, configuration, cut, needed, refs_of

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def artifacts(template: Path, tmp_path: Path) -> Artifacts:
    """Everything sealed."""
    return Artifacts(shutil.copytree(template, tmp_path / "artifacts"))


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


STORES = [name for name in READS if name.startswith("cache")]
STATES = st.fixed_dictionaries(
    {name: st.sampled_from(["sealed", "sealed", "absent", *(["retired"] if name in STORES else [])]) for name in READS}
)


@settings(max_examples=120)
@given(states=STATES, keep=st.sampled_from(["all", "last"]), forced=st.sets(st.sampled_from(sorted(READS)), max_size=2))
@example(states=dict.fromkeys(READS, "sealed"), keep="last", forced={"stack 1"})
@example(states=dict.fromkeys(READS, "sealed") | dict.fromkeys(STORES, "retired"), keep="last", forced=set())
def test_what_is_needed_is_the_least_that_makes_the_goals(
    states: dict[str, str], keep: str, forced: set[str], template: Path, shelf: Path
) -> None:
    artifacts = Artifacts(template)
    try:
        for name, state in states.items():
            if state == "absent":
                artifacts.folder(REFS[name]).rename(shelf / name)
            elif state == "retired":
                artifacts.mark_retired(REFS[name])
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
    assert forced(-1, "cool") == set()  # none is planned
    for task, kind in TASK_KINDS.items() - {("cool", "cooldown")}:
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
        assert f"Remove {path.parent} and run the command that made it again" in caught.value.remedy


@pytest.mark.parametrize(("damaged", "reader"), [("data", "stack 2"), ("cache 1", "stack 2"), ("build 0", "stack 0")])
def test_damage_is_refused_once_something_must_read_it(damaged: str, reader: str, artifacts: Artifacts) -> None:
    path = cut(artifacts, damaged)
    assert needed(artifacts, "last") == set()
    artifacts.discard(REFS[reader])
    with pytest.raises(ArtifactCorruptError) as caught:
        needed(artifacts, "last")
    assert caught.value.path == path
