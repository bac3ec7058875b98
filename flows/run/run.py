"""A run: prepare the data, add stage after stage by demand, retire superseded stores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Set

from flows.run.devices import check_machine, device_memory, settings_of
from flows.run.events import (
    GO_ON,
    Message,
    RunStarted,
    StageDone,
    StagesPriced,
    emit,
    emit_waiting,
    stop_requested,
    stopping_on_signals,
)
from flows.run.fill import check_plain
from flows.run.live import live_file
from flows.run.prepare import check_space, check_validation, prepare_data
from flows.run.reading import Reading
from flows.run.stage import Stage
from flows.run.steps import build_stack, cache_activations, configure_trunk
from flows.run.summary import StageSummary, rise, summarise
from flows.run.tracking import tracked
from flows.run.training import cool_down, train
from flows.run.validating import validate
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.errors import StageInterruptedError
from stackwise_core.stages.charges import charge, judging_flops
from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan
from stackwise_core.stages.remedies import does_not_fit
from stackwise_core.stages.resolve import imports
from stackwise_core.training.hardware import compiler_fault, use_hardware
from storage.adopt import plan_in
from storage.artifacts import Artifacts, artifacts_at
from storage.demand import Demand, compute_demand, forced_refs
from storage.errors import ArtifactError, ArtifactNewerError
from storage.files import explain_full_disk
from storage.runs import begin_attempt, retire_superseded


def add_stage(stage: Stage) -> None:
    """Add one stage by plain calls, without Prefect."""
    check_plain(stage)
    build = build_stack(stage)
    trunk = configure_trunk(stage)
    stack = train(stage, build, trunk)
    cool_down(stage, build, stack)
    activations = cache_activations(stage, stack)
    if stage.plan.validation:
        validate(stage, stack, activations)


def grow(
    config: StackWiseConfig,
    root: str,
    *,
    from_stack: int = -1,
    force: str = "",
    add: Callable[[Stage], None] = add_stage,
) -> list[StageSummary]:
    """Complete a run in the artifacts folder `root`, making only the artifacts that are missing.

    `from_stack` redoes the stages from that one on (-1: none), and `force` one task (build, trunk, train, cool, cache,
    validate) in those stages, or in all. `add` adds one stage; the flow passes its own. Raises `StackWiseError` with
    one clear message; the same call resumes from the sealed artifacts.
    """
    config.validate()
    artifacts = artifacts_at(root)
    check_machine(config, remote=artifacts.is_remote)  # what is missing is said before anything is made
    device = use_hardware(config.hardware)
    artifacts = artifacts.open()
    filled, plan = plan_in(artifacts, config, Reading("read"))
    forced = forced_refs(plan, from_stack, force)
    _refuse_newer(artifacts, forced)
    with (
        begin_attempt(artifacts, config, plan, emit_waiting) as attempt,
        live_file(attempt),
        tracked(config, plan, attempt, artifacts),
        explain_full_disk(artifacts.root),
    ):
        emit(RunStarted(config.run.name, len(plan.stages), artifacts.uri))
        for line in (*imports(filled), *notes(filled)):
            emit(Message(line))
        prepare_data(filled, artifacts, plan)
        needed = compute_demand(plan, artifacts, config.cache.keep, forced).needed
        for line in _too_large(filled, plan, needed):
            emit(Message(line))
        if needed:
            check_validation(filled, artifacts, plan)
            if filled.hardware.compile and (fault := compiler_fault(device)):
                emit(Message(fault))
        emit(_priced(filled, artifacts, plan, needed))
        check_space(filled, artifacts, [s for s in plan.stages if s.activations and s.ref("activations") in needed])
        with stopping_on_signals():
            for index in range(len(plan.stages)):
                if stop_requested():
                    raise StageInterruptedError(f"stopped on request before stage {index}; {GO_ON}")
                # Computed at every stage, because another process may have made or retired artifacts meanwhile.
                still_forced = frozenset(ref for ref in forced if ref.stage >= index)
                demand = compute_demand(plan, artifacts, config.cache.keep, still_forced)
                add(_stage(filled, root, plan, index, demand))
                superseded = config.cache.keep == "last"
                for kept in retire_superseded(artifacts, plan, index, config.run.name) if superseded else ():
                    emit(Message(f"{kept.name} is kept: another run that is alive plans to read it"))
                done = summarise(artifacts, plan)[: index + 1]
                emit(StageDone(index, done[-1]))
                if worse := rise(done):
                    emit(Message(worse))
        compute_demand(plan, artifacts, config.cache.keep)  # raises if a redone stage has other bytes
    return summarise(artifacts, plan)


def _too_large(config: StackWiseConfig, plan: RunPlan, needed: Set[Ref]) -> Iterator[str]:
    """Yield a line about each stage still to be trained that may not fit the device."""
    cuda, there = device_memory(config.hardware)
    for setting, stage in zip(settings_of(config, plan, cuda=cuda, there=there), plan.stages, strict=True):
        if stage.ref("stack") in needed and (line := does_not_fit(setting, there)):
            yield line


def _stage(config: StackWiseConfig, root: str, plan: RunPlan, index: int, demand: Demand) -> Stage:
    return Stage(
        adopted=plan.adopted,
        config=config,
        root=root,
        corpus=plan.data.corpus,
        corpus_bytes=plan.corpus_bytes,
        sources=plan.source_facts,
        index=index,
        needed=frozenset(ref.kind for ref in demand.needed if ref.stage == index and ref.kind != "data"),
        forced=frozenset(ref.kind for ref in demand.forced if ref.stage == index),
        redo=demand.forced,
    )


def _priced(config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan, needed: Collection[Ref]) -> StagesPriced:
    """Return the FLOPs of training and judging every stage and of filling its store, 0 of what is there already."""
    data = artifacts.manifest(plan.data_ref)
    n_train, n_validation = data.count("train_sequences"), data.count("validation_sequences")
    flops, judging, filling = list[float](), list[tuple[int, float]](), [0.0] * len(plan.stages)
    for stage, charged in zip(plan.stages, charge(config, plan, n_train), strict=True):
        trains = stage.ref("stack") in needed and not stage.spec.adopted
        below = plan.stages[stage.index - 1] if stage.index else None
        if below is None or below.activations is None:
            flops.append(charged.total if trains else 0.0)
        else:
            flops.append(charged.trained if trains else 0.0)
            filling[below.index] = charged.frozen if below.ref("activations") in needed else 0.0
        judged = stage.validation is not None and stage.ref("validation") in needed
        judging.append((stage.spec.optim.steps, judging_flops(config, stage, n_validation) if judged else 0.0))
    return StagesPriced(tuple(flops), tuple(judging), config.validation.every, tuple(filling))


def _refuse_newer(artifacts: Artifacts, forced: Iterable[Ref]) -> None:
    """Raise if a newer version of StackWise made a forced artifact; damaged ones may be replaced on purpose."""
    for ref in forced:
        try:
            artifacts.known(ref)
        except ArtifactNewerError:
            raise
        except ArtifactError:
            continue
