"""One stage on Prefect: its flow, its tasks, and the task runners whose workers fill a store."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TagsContext, TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.runtime import flow_run
from prefect.serializers import JSONSerializer
from prefect.states import Cancelled
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.transactions import get_transaction

from flows.artifacts import progress_artifact
from flows.flow_runs import end_killed_tasks
from flows.run import fill as filling
from flows.run import steps, training, validating
from flows.run.events import StageOpened, emit, stopping_on_signals
from flows.run.fill import ShardFuture, Submit, begin_worker
from flows.run.stage import Stage
from stackwise_core.errors import StageInterruptedError
from stackwise_core.stages.identity import Ref
from storage.activations.writer import ShardRange, StoreWriter
from storage.demand import TASK_KINDS, made_by
from storage.links import delete_path


def _key_of(stage: Stage, name: str) -> str | None:
    """Return the key of a task: the id of its artifact; None if it makes none (a cache that is never read)."""
    kind = TASK_KINDS[name]
    return None if stage.plan.recipe(kind) is None else f"{name}-{stage.plan.ref(kind).sha256}"


def _stage_task(name: str) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """Key a task by the id of its artifact."""

    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
        return _key_of(parameters["stage"], name)

    policy = CacheKeyFnPolicy(cache_key_fn=key)

    def as_task(work: Callable[..., Ref | None]) -> Task[..., Any]:
        @functools.wraps(work)
        def stoppable(*inputs: Any) -> Ref | State[Any] | None:
            try:
                return work(*inputs)
            except StageInterruptedError as stop:
                if (transaction := get_transaction()) is not None:
                    transaction.write_on_commit = False  # it made nothing that could be recorded
                return Cancelled(message=str(stop))

        return task(name=name, cache_policy=policy, persist_result=True, result_serializer="json")(stoppable)

    return as_task


@_stage_task("build")
def build_stack(stage: Stage) -> Ref | None:
    """Describe the new stack: its growth operator, source, seed, and the digest of its initial tensors."""
    return steps.build_stack(stage)


@_stage_task("trunk")
def configure_trunk(stage: Stage) -> Ref | None:
    """Describe the rack at the start of the stage."""
    return steps.configure_trunk(stage)


@_stage_task("train")
def train(stage: Stage, build: Ref | None, trunk: Ref | None) -> Ref:
    """Train the new stack, from its last checkpoint if there is one; an adopted one is taken from its rack."""
    with progress_artifact(stage):
        return training.train(stage, build, trunk)


@_stage_task("cool")
def cool_down(stage: Stage, build: Ref | None, stack: Ref) -> Ref | None:
    """Measure what the stage would come to if its rate decayed now; the weights are thrown away."""
    with progress_artifact(stage):
        return training.cool_down(stage, build, stack)


@_stage_task("cache")
def cache_activations(stage: Stage, stack: Ref) -> Ref | None:
    """Write the boundary that the next stage reads, or report why none is written."""
    with progress_artifact(stage):
        return steps.cache_activations(stage, stack, prefect_workers)


@_stage_task("validate")
def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the validation loss, and compare cached rows with live ones."""
    return validating.validate(stage, stack, activations)


def prepared(stage: Stage, task: Task[..., Any], verb: str) -> Task[..., Any]:
    """Return a task with a readable name for this stage, and its result record beside the artifacts.

    Prefect's record says that the work was done once; only the disk shows whether the artifact still exists.
    So a task whose artifact must be made ignores the record.
    """
    records = stage.artifacts.root / "prefect"
    _distrust_record(records, stage, task.name)
    return task.with_options(
        task_run_name=f"{verb} {stage.what}",
        result_storage=records,
        refresh_cache=not (stage.needed | stage.forced).isdisjoint(made_by(task.name, stage.plan)),
    )


def _distrust_record(records: Path, stage: Stage, name: str) -> None:
    """Write a task's record again, if it has one, before Prefect reads it.

    Prefect unpickles a record that says so, and imports the class that it names, whatever `result_serializer` is; the
    folder may be a stranger's. What the record says follows from the plan.
    """
    if (key := _key_of(stage, name)) is None or not os.path.lexists(records / key):
        return
    delete_path(records / key)
    storage = ResultStore(result_storage=LocalFileSystem(basepath=str(records)), serializer=JSONSerializer())
    storage.write(stage.plan.ref(TASK_KINDS[name]), key=key)


@flow(name="stage", flow_run_name="{stage.config.run.name}: {stage.title}")
def add_stage(stage: Stage) -> Ref | State[Any]:
    """Build a stack on a trunk, train it, cache its boundary for the next stage, validate the result.

    An adopted stack is only copied; the last one is cached and validated too.
    """
    end_killed_tasks()
    emit(StageOpened(stage.index, str(flow_run.id)))
    # Tasks have no tags: for them Prefect asks the server, which may be away.
    with TagsContext(current_tags=set()), stopping_on_signals():
        try:
            return _add_stage(stage)
        except StageInterruptedError as stop:
            return Cancelled(message=str(stop))


def _add_stage(stage: Stage) -> Ref:
    build = _made(stage, build_stack, "build") if stage.plan.build else None
    trunk = _made(stage, configure_trunk, "configure trunk of") if stage.plan.trunk else None
    stack = _made(stage, train, "train" if trunk else "adopt", build, trunk)
    if stage.plan.cooldown:
        _made(stage, cool_down, "cool down", build, stack)
    if stage.plan.validation is None:
        return stack
    activations = _made(stage, cache_activations, "cache activations of", stack)
    return _made(stage, validate, "validate", stack, activations)


def _made(stage: Stage, task: Task[..., Any], verb: str, *inputs: Ref | None) -> Any:
    """Run a task and return its result; raise if it was stopped, so that the stage and the run end too."""
    result = prepared(stage, task, verb)(stage, *inputs)
    if isinstance(result, State):
        raise StageInterruptedError(str(result.message))
    return result


@task(name="fill", cache_policy=NO_CACHE, persist_result=False)
def fill_shard(stage: Stage, writer: StoreWriter, shard: ShardRange) -> dict[str, Any]:
    """Compute one shard of a store and write it."""
    return filling.fill_shard(stage, writer, shard)


@contextlib.contextmanager
def prefect_workers(stage: Stage) -> Generator[Submit]:
    """Start the configured task runner; every shard is one task run.

    Shards are submitted one by one, because `map` submits all of them at once and a stop could not cancel them.
    """
    cache = stage.config.cache
    runner, died = _RUNNERS[cache.task_runner](cache.fill_workers)

    def submit(writer: StoreWriter, shard: ShardRange) -> ShardFuture:
        named = fill_shard.with_options(task_run_name=f"fill {shard.group} shard {shard.index} of {stage.what}")
        return runner.submit(named, {"stage": stage, "writer": writer, "shard": shard})

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with runner:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs a handler that ends this process at once
            yield submit
    except died as error:
        raise BrokenExecutor(str(error)) from error


_Died = tuple[type[BaseException], ...]
"""What a task runner raises when a worker is killed."""


def _dask(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    """Use the cluster that Dask's own configuration names (DASK_SCHEDULER_ADDRESS), or start one here."""
    from dask import config
    from distributed import KilledWorker
    from prefect_dask.task_runners import DaskTaskRunner

    address = config.get("scheduler-address", None)
    here = {"n_workers": n_workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    runner = DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=here)
    return runner, (KilledWorker,)


def _ray(n_workers: int) -> tuple[TaskRunner[Any], _Died]:
    """Use the cluster that RAY_ADDRESS names, which `ray.init` reads, or start one here."""
    errors = import_module("ray.exceptions")
    died = errors.NodeDiedError, errors.OutOfMemoryError, errors.WorkerCrashedError
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_workers, "include_dashboard": False}
    return import_module("prefect_ray").RayTaskRunner(init_kwargs=here), died


_RUNNERS: dict[str, Callable[[int], tuple[TaskRunner[Any], _Died]]] = {
    "threads": lambda n_workers: (ThreadPoolTaskRunner[Any](n_workers), ()),
    "processes": lambda n_workers: (ProcessPoolTaskRunner(n_workers, initializer=begin_worker), ()),
    "dask": _dask,
    "ray": _ray,
}
