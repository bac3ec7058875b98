"""Demand compares what artifacts were made from, finds what to advance from, and tolerates other processes."""

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

from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts, State
from storage.demand import advance_source, compute_demand, forced_refs
from storage.errors import ArtifactCorruptError
from storage.manifest import MANIFEST
from storage.retirement import RETIRED
from support.demand import PLAN, READS, REFS, configuration, cut, needed, refs_of, seal, seal_all

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def artifacts(template: Path, tmp_path: Path) -> Artifacts:
    """Everything sealed."""
    return Artifacts(shutil.copytree(template, tmp_path / "artifacts"))


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


@pytest.mark.parametrize("steps", [(300, 300, 300), (200, 300, 200), (300, 200, 300)])
def test_a_store_is_advanced_from_whatever_rows_it_holds(steps: tuple[int, ...], tmp_path: Path) -> None:
    """Cache k holds the rows that stage k + 1 visits: with more steps above than below, the others are from tokens."""
    plan = steps_of(*steps)
    artifacts = seal_all(tmp_path, plan)
    assert source(plan, 1, artifacts) == refs_of(plan)["cache 0"]


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

    def looked(stat: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looking(path: Any, **how: Any) -> os.stat_result:
            nonlocal looks
            looks += 1
            if looks == look + 1:
                happened.append(True)
                act()
            return stat(path, **how)

        return looking

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, looked(getattr(os, name)))
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
