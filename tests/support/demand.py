"""A real plan of three stages whose artifacts are small files, sealed without training anything.

They are named "data", "build 0", "stack 1", "cache 1" and so on; a cache k is the boundary that stage k + 1 reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.artifacts import Artifacts, State
from storage.demand import compute_demand, reads

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


def as_kept_last(artifacts: Artifacts) -> None:
    """What a finished run with cache.keep = last leaves: every boundary but the last one retired."""
    artifacts.retire(REFS["cache 0"])


def cut(artifacts: Artifacts, name: str) -> Path:
    path = artifacts.folder(REFS[name]) / "content"
    os.truncate(path, 2)
    return path
