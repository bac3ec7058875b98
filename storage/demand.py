"""What a run must still make: found backwards from its goals, given what is stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Kind, Ref
from stackwise_core.stages.plan import RunPlan, StagePlan
from storage.artifacts import Artifacts, Lookup, State
from storage.errors import ArtifactCorruptError

TASK_KINDS: dict[str, Kind] = {
    "build": "build",
    "trunk": "trunk",
    "train": "stack",
    "cool": "cooldown",
    "cache": "activations",
    "validate": "validation",
}
"""Name of a task, as `--force` takes it -> what it makes."""
_Lookups = Callable[[Ref], Lookup]


def made_by(task: str, stage: StagePlan) -> list[Kind]:
    """Return what a task makes in a stage: training also leaves the state of its optimizer, if it may be read."""
    kinds: list[Kind] = [TASK_KINDS[task], *(["optimizer"] if task == "train" else [])]
    return [kind for kind in kinds if stage.recipe(kind) is not None]


@dataclass
class Demand:
    """The states of a run's artifacts, and which of them must be made."""

    states: dict[Ref, State] = field(default_factory=dict)
    needed: set[Ref] = field(default_factory=set)
    """Absent or retired (or forced), and needed by a goal."""
    forced: frozenset[Ref] = frozenset()
    n_stacks: int = 0
    """How many of the first stacks something needs that must be made."""

    @property
    def complete(self) -> bool:
        """Whether nothing has to run."""
        return not self.needed


def forced_refs(plan: RunPlan, from_stack: int, force: str) -> frozenset[Ref]:
    """Return what the user asks to redo, or raise ConfigError if there is no such stage or task."""
    if from_stack >= len(plan.stages):
        raise ConfigError([Fault("--from-stack", str(from_stack), f"the stages are 0 to {len(plan.stages) - 1}")])
    if force and force not in TASK_KINDS:
        raise ConfigError([Fault("--force", repr(force), f"the tasks are {', '.join(TASK_KINDS)}")])
    if from_stack < 0 and not force:
        return frozenset()
    kinds: list[Kind] = [TASK_KINDS[force]] if force else list(TASK_KINDS.values())
    stages = plan.stages[max(from_stack, 0) :]
    return frozenset(stage.ref(kind) for stage in stages for kind in kinds if stage.recipe(kind) is not None)


def compute_demand(plan: RunPlan, artifacts: Artifacts, keep: str, forced: frozenset[Ref] = frozenset()) -> Demand:
    """Find what must be made. Each artifact is looked up once, so that the answers agree with each other.

    An artifact is needed if it is not sealed, or is `forced`, and is a goal or is read by something that must be made.
    Goals are every stack, cool-down and validation, and with `keep` = all (see `cache.keep`) every store. A retired
    store is made again only if something that must be made reads it, and so is the state of an optimizer.

    Raises:
        ArtifactCorruptError: a goal or something that is needed is damaged, or was made from other inputs.
    """
    demand, lookup = Demand(forced=forced), functools.cache(artifacts.lookup)
    for stage in plan.stages:
        goals: list[Kind] = ["stack", "cooldown", "validation", *(["activations"] if keep == "all" else [])]
        for kind in goals:
            if stage.recipe(kind) is not None:
                _need(stage.ref(kind), plan, lookup, demand)
    for ref in forced:
        _need(ref, plan, lookup, demand)
    _check_lineage(demand, artifacts, lookup)
    return demand


def _need(ref: Ref, plan: RunPlan, lookup: _Lookups, demand: Demand) -> None:
    """Mark an artifact as needed, and if it must be made, everything it reads."""
    if ref in demand.needed:
        return
    found = lookup(ref)
    demand.states[ref] = found.state
    if ref not in demand.forced:
        if found.error:
            raise found.error
        if found.state is State.SEALED:
            return
    demand.needed.add(ref)
    known = demand.n_stacks
    if ref.kind not in ("data", "build") and not _is_adopted(ref, plan):
        demand.n_stacks = max(known, ref.stage)
    for read in reads(ref, plan, known):
        _need(read, plan, lookup, demand)


def _is_adopted(ref: Ref, plan: RunPlan) -> bool:
    return ref.kind == "stack" and plan.stages[ref.stage].spec.adopted


def reads(ref: Ref, plan: RunPlan, known: int = 0) -> list[Ref]:
    """Return what making an artifact reads, in the order it must exist; the first `known` stacks are left out."""
    if ref.kind == "data" or _is_adopted(ref, plan):
        return []
    stage = plan.stages[ref.stage]
    below = [other.ref("stack") for other in plan.stages[known : ref.stage]]
    if ref.kind == "build":
        return below[-1:]
    if ref.kind == "trunk":
        return below
    build = [stage.ref("build")] if stage.build else []
    state = [plan.stages[ref.stage - 1].ref("optimizer")] if stage.spec.state != "nothing" else []
    if ref.kind == "stack":
        return [plan.data_ref, *below, *build, stage.ref("trunk"), *_boundary(plan, ref.stage), *state]
    if ref.kind == "optimizer":  # the stage is trained again, unless its stack is made anyway
        return [*reads(stage.ref("stack"), plan, known), stage.ref("stack")]
    if ref.kind == "cooldown":
        return [plan.data_ref, *below, *build, stage.ref("trunk"), *state, stage.ref("stack")]
    if ref.kind == "activations":
        return [plan.data_ref, *below, stage.ref("stack")]
    cache = [stage.ref("activations")] if stage.activations is not None else []
    return [plan.data_ref, *below, stage.ref("stack"), *cache]


def _boundary(plan: RunPlan, index: int) -> list[Ref]:
    """Return the store that a stage trains on, and its validation."""
    if index == 0 or plan.stages[index - 1].activations is None:
        return []
    before = plan.stages[index - 1]
    return [before.ref("activations"), before.ref("validation")]


def advance_source(stage: StagePlan, plan: RunPlan, artifacts: Artifacts) -> Ref | None:
    """Return the store below, if rows of the stage's boundary can be computed from it by one stack forward.

    It must be sealed; it need not hold all rows that the next stage visits. A damaged store raises
    ArtifactCorruptError.
    """
    below = plan.store_below(stage)
    if below is None:
        return None
    ref = below.ref("activations")
    found = artifacts.lookup(ref)
    if found.error:
        raise found.error
    return ref if found.state is State.SEALED else None


def _check_lineage(demand: Demand, artifacts: Artifacts, lookup: _Lookups) -> None:
    """Raise ArtifactCorruptError if an artifact was made from other bytes than its inputs have now."""
    sealed = {ref for ref, state in demand.states.items() if state is State.SEALED}
    for ref in sorted(sealed - demand.needed, key=lambda ref: (ref.stage, ref.kind)):
        manifest = lookup(ref).sealed
        for entry in manifest.inputs if manifest else ():
            there = None if entry.ref in demand.forced else lookup(entry.ref).sealed
            if there is not None and there.digest != entry.digest:
                raise ArtifactCorruptError(
                    artifacts.where(ref),
                    f"was made from other bytes of {entry.ref.name} than are there now "
                    f"({entry.digest[:12]}, now {there.digest[:12]})",
                    f"Redo what follows from it: run the same command with --from-stack {max(ref.stage, 0)}",
                )
