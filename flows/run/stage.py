"""One stage of one run: what its tasks know, and how any of them makes its artifact."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from flows.run.events import TaskReused, TaskStarted, emit, emit_waiting, stop_requested, stopping_on_signals
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.packing import PackedSequences
from stackwise_core.errors import StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.stages.identity import Kind, Ref
from stackwise_core.stages.plan import RunPlan, StagePlan, plan_run
from stackwise_core.training.hardware import n_threads, use_hardware
from storage.artifacts import Artifacts, State, artifacts_at
from storage.demand import TASK_KINDS, compute_demand
from storage.manifest import fingerprint
from storage.sequences import load_sequences

Facts = dict[str, Any]
"""What a task found out; it goes into the manifest."""


@dataclass(frozen=True)
class Made:
    """What filling a work folder came to."""

    facts: Facts
    checksums: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of files that were hashed as they were written: path -> (size, checksum)."""
    records: tuple[str, ...] = ()
    """Files that are logs, not content."""


class Stage(BaseModel, frozen=True):
    """What the tasks of one stage share, as plain values; the rest is derived from them."""

    config: StackWiseConfig
    root: str
    """The artifacts folder, or the URI of one in an object store."""
    corpus: str
    """Content hash of the corpus."""
    corpus_bytes: int
    index: int
    """Creation index of the stack that is added."""
    needed: frozenset[Kind] = frozenset()
    """Kinds that must be made: absent or retired, and read by something that must be made."""
    forced: frozenset[Kind] = frozenset()
    """Kinds that are made again although they are sealed."""
    redo: frozenset[Ref] = frozenset()
    """All that this run has still to make again on purpose, in this stage and above."""

    def __getstate__(self) -> dict[Any, Any]:
        """Leave behind what is derived, corpora among it: another process derives its own."""
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name in type(self).model_fields}
        return state | {"__dict__": fields}

    @functools.cached_property
    def artifacts(self) -> Artifacts:
        """Where artifacts live."""
        return artifacts_at(self.root)

    @functools.cached_property
    def run_plan(self) -> RunPlan:
        """The whole run, by recipe."""
        return plan_run(self.config, self.corpus, self.corpus_bytes)

    @property
    def plan(self) -> StagePlan:
        """This stage, by recipe."""
        return self.run_plan.stages[self.index]

    @property
    def what(self) -> str:
        """What the stage works on, for people."""
        return "all stacks" if self.plan.spec.mode == "joint" else f"stack {self.index}"

    @property
    def title(self) -> str:
        """How a person would call the stage."""
        spec = self.plan.spec
        return "train all stacks together" if spec.mode == "joint" else f"add stack {self.index} ({spec.name})"

    @property
    def below(self) -> tuple[StagePlan, ...]:
        """The stages before this one, in order."""
        return self.run_plan.stages[: self.index]

    @property
    def so_far(self) -> tuple[StagePlan, ...]:
        """The stages up to this one, in order."""
        return self.run_plan.stages[: self.index + 1]

    @functools.cached_property
    def device(self) -> torch.device:
        """The configured device; looking it up also sets torch's threads."""
        return use_hardware(self.config.hardware)

    @functools.cached_property
    def sequences(self) -> tuple[PackedSequences, PackedSequences]:
        """Train and validation sequences."""
        return load_sequences(self.artifacts, self.run_plan.data_ref)


def make(stage: Stage, task: str, inputs: list[Ref], work: Callable[[Path], Made]) -> Ref:
    """Make the artifact of a task, unless it is there: lock, work, seal.

    It may be sealed although the task is called: another process was first, or this one died between
    the seal and Prefect's record of it. A retired artifact that nothing needs stays retired.

    Args:
        stage: of which run.
        task: a key of `storage.demand.TASK_KINDS`.
        inputs: what `work` reads; their digests go into the manifest.
        work: fills the work folder, going on from what a killed attempt left there.
    """
    kind = TASK_KINDS[task]
    ref, artifacts = stage.plan.ref(kind), stage.artifacts
    with (
        stopping_on_signals(),
        artifacts.lock(
            ref.name,
            on_wait=lambda holder: emit_waiting(f"{ref.name}, which {holder} is making"),
            should_stop=stop_requested,
        ),
    ):
        forced = kind in stage.forced
        if not forced and _is_there(stage, ref):
            emit(TaskReused(stage.index, task))
            return ref
        emit(TaskStarted(stage.index, task))
        if forced:
            artifacts.discard_work(ref)
        began = time.monotonic()
        made = work(artifacts.work(ref))
        facts = {**made.facts, "seconds": round(time.monotonic() - began, 3)}
        recipe = stage.plan.recipe(kind)
        assert recipe is not None
        entries = tuple(artifacts.input_entry(read) for read in inputs)
        failpoint(f"seal-{task}", stage.index)
        artifacts.seal(
            ref, recipe, entries, facts, fingerprint_of(stage), checksums=made.checksums, records=made.records
        )
        failpoint(f"sealed-{task}", stage.index)
        if stop_requested():
            raise StageInterruptedError(
                f"stopped on request after {ref.name} was sealed; run the same command to go on"
            )
    return ref


def _is_there(stage: Stage, ref: Ref) -> bool:
    """Say whether an artifact need not be made: it is sealed, or nothing needs it.

    Raises:
        ArtifactCorruptError: it was sealed and is damaged; it is not replaced behind anyone's back.
    """
    if ref.kind not in stage.needed or stage.artifacts.promote(ref):
        return True
    state = stage.artifacts.state(ref)
    if state is State.CORRUPT:
        stage.artifacts.manifest(ref)
    if state is State.RETIRED:  # while this process was busy elsewhere: is it needed even now?
        return ref not in compute_demand(stage.run_plan, stage.artifacts, stage.config.cache.keep, stage.redo).needed
    return state is State.SEALED


def fingerprint_of(stage: Stage) -> dict[str, Any]:
    """Return what the numbers of this stage may depend on beside its recipe."""
    hardware = stage.config.hardware
    device = str(stage.device) if hardware.processes == 1 else stage.device.type  # each process has one of its own
    return fingerprint(n_threads(hardware), device, hardware.compile, hardware.processes)
