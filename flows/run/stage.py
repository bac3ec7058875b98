"""One stage of a run: the values that its tasks share, and how a task makes its artifact."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationInfo, field_validator

from flows.run.devices import device_memory, settings_of
from flows.run.events import GO_ON, TaskReused, TaskStarted, emit, emit_waiting, stop_requested, stopping_on_signals
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.errors import StageInterruptedError
from stackwise_core.failpoints import failpoint
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.identity import AdoptedRecipe, Kind, Ref
from stackwise_core.stages.memory import Setting
from stackwise_core.stages.plan import RunPlan, SourceFacts, StagePlan, plan_run
from stackwise_core.training.hardware import compiler_fault, n_threads, use_hardware
from storage.artifacts import Artifacts, State, artifacts_at
from storage.demand import TASK_KINDS, compute_demand
from storage.manifest import fingerprint
from storage.sequences import load_sequences

Facts = dict[str, Any]
"""What a task measured; it goes into the manifest."""


@dataclass(frozen=True)
class Made:
    """The result of filling a work folder."""

    facts: Facts
    checksums: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of files that were hashed while they were written: path -> (size, checksum)."""
    records: tuple[str, ...] = ()
    """Files that are logs, not content."""


class Stage(BaseModel, frozen=True):
    """The values that the tasks of one stage share, and what is derived from them."""

    adopted: tuple[AdoptedRecipe, ...] = ()
    """Recipes of the adopted stacks."""
    config: StackWiseConfig
    """With the shape and stacks of the adopted rack, if there is one."""
    root: str
    """The artifacts folder, or the URI of one in an object store."""
    corpus: str
    """Content hash of the corpus."""
    corpus_bytes: int
    sources: tuple[SourceFacts, ...] = ()
    """Of a mixture."""
    index: int
    needed: frozenset[Kind] = frozenset()
    """Kinds that must be made: absent or retired, and read by something that must be made."""
    forced: frozenset[Kind] = frozenset()
    """Kinds that are made again although they are sealed."""
    redo: frozenset[Ref] = frozenset()
    """Artifacts of this stage and later ones that the run still has to make again."""
    cooling: bool = False
    """Whether this is the stage with the steps of its cool-down."""
    recorded: RunPlan | None = Field(default=None, exclude=True)
    """The plan of a run that is only read: planning it again would import the functions that its configuration names.
    """

    @field_validator("config")
    @classmethod
    def _with_adopted(cls, config: StackWiseConfig, info: ValidationInfo) -> StackWiseConfig:
        """Fill in what JSON leaves out of a configuration: the adopted stacks."""
        adopted = info.data["adopted"]
        if bool(adopted) != bool(config.model.from_):
            raise ValueError("model.from names a rack, and its stacks are not given")
        return adopting(config, adopted) if adopted else config

    def __getstate__(self) -> dict[Any, Any]:
        """Leave out derived values, such as the corpus: another process derives them again."""
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name in type(self).model_fields}
        return state | {"__dict__": fields}

    @functools.cached_property
    def artifacts(self) -> Artifacts:
        """The artifacts folder, opened."""
        return artifacts_at(self.root)

    @functools.cached_property
    def run_plan(self) -> RunPlan:
        """The recipes of the run."""
        return self.recorded or plan_run(self.config, self.corpus, self.corpus_bytes, self.adopted, self.sources)

    @property
    def plan(self) -> StagePlan:
        """The recipes of this stage."""
        planned = self.run_plan.stages[self.index]
        return planned.cooled if self.cooling else planned

    @property
    def what(self) -> str:
        """What the stage trains, for messages."""
        return "all stacks" if self.plan.spec.mode == "joint" else f"stack {self.index}"

    @property
    def title(self) -> str:
        """The name of the stage's flow run."""
        spec = self.plan.spec
        if spec.adopted:
            return f"adopt stack {self.index} ({spec.name})"
        return "train all stacks together" if spec.mode == "joint" else f"add stack {self.index} ({spec.name})"

    @property
    def below(self) -> tuple[StagePlan, ...]:
        """The stages before this one, in order."""
        return self.run_plan.stages[: self.index]

    @property
    def stacks_below(self) -> list[Ref]:
        """The stacks that earlier stages made, in order."""
        return [stage.ref("stack") for stage in self.below]

    @property
    def so_far(self) -> tuple[StagePlan, ...]:
        """The stages up to this one, in order."""
        return self.run_plan.stages[: self.index + 1]

    @functools.cached_property
    def device(self) -> torch.device:
        """The configured device; the first access also sets torch's threads."""
        return use_hardware(self.config.hardware)

    @functools.cached_property
    def setting(self) -> Setting:
        """What the memory of training the stage depends on."""
        cuda, there = self.device.type == "cuda", device_memory(self.config.hardware)[1]
        return list(settings_of(self.config, self.run_plan, cuda=cuda, there=there))[self.index]

    @property
    def sharded(self) -> bool:
        """Whether the processes that train the stage share out what trains."""
        return self.setting.shards > 1

    @functools.cached_property
    def sequences(self) -> tuple[PackedSequences, PackedSequences]:
        """Train and validation sequences."""
        return load_sequences(self.artifacts, self.run_plan.data_ref)


def make(stage: Stage, task: str, inputs: list[Ref], work: Callable[[Path], Made], kind: Kind | None = None) -> Ref:
    """Make the artifact of a task, or that of another `kind`, unless it exists: lock, work, seal.

    It may be sealed already: another process was first, or this one died between the seal and Prefect's record of
    it. A retired artifact that is not needed stays retired. `work` fills the work folder, resuming from what a killed
    attempt left there; the digests of the `inputs` that it reads go into the manifest.
    """
    kind = kind or TASK_KINDS[task]
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
        if stop_requested():
            raise StageInterruptedError(f"stopped on request before {ref.name}; {GO_ON}")
        adopts = task == "train" and stage.plan.spec.adopted
        emit(TaskStarted(stage.index, "adopt" if adopts else task))
        if forced and task != "cool":  # which goes on from what training has just left there
            artifacts.discard_work(ref)
        began = time.monotonic()
        made = work(artifacts.work(ref))
        facts = {**made.facts, "seconds": round(time.monotonic() - began, 3)}
        failpoint(f"seal-{task}", stage.index)
        seal(stage, ref, inputs, replace(made, facts=facts))
        failpoint(f"sealed-{task}", stage.index)
        if stop_requested():
            raise StageInterruptedError(f"stopped on request after {ref.name} was sealed; {GO_ON}")
    return ref


def seal(stage: Stage, ref: Ref, inputs: list[Ref], made: Made) -> None:
    """Seal what was made in the work folder of an artifact; the digests of its `inputs` go into the manifest."""
    artifacts, recipe = stage.artifacts, stage.plan.recipe(ref.kind)
    assert recipe is not None
    entries = tuple(artifacts.input_entry(read) for read in inputs)
    fingerprint = fingerprint_of(stage)
    artifacts.seal(ref, recipe, entries, made.facts, fingerprint, checksums=made.checksums, records=made.records)


def _is_there(stage: Stage, ref: Ref) -> bool:
    """Return whether an artifact need not be made: it is sealed, or not needed; raises if it is damaged."""
    if ref.kind not in stage.needed or stage.artifacts.promote(ref):
        return True
    state = stage.artifacts.state(ref)
    if state is State.CORRUPT:
        stage.artifacts.manifest(ref)  # raises ArtifactCorruptError: it is not replaced silently
    if state is State.RETIRED:  # perhaps by another process meanwhile: is it still needed?
        return ref not in compute_demand(stage.run_plan, stage.artifacts, stage.config.cache.keep, stage.redo).needed
    return state is State.SEALED


def fingerprint_of(stage: Stage) -> dict[str, Any]:
    """Return what the numbers of this stage may depend on besides its recipe."""
    hardware = stage.config.hardware
    device = str(stage.device) if hardware.ranks == 1 else stage.device.type  # each process has its own
    compiled = hardware.compile and not compiler_fault(stage.device)
    known = fingerprint(n_threads(hardware), device, compiled, hardware.ranks)
    return {**known, "sharded": True} if stage.sharded else known
