"""The flow of one stage and its five tasks: names, cache keys and result records around the steps of `flows.run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Task, flow, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.runtime import flow_run

from flows.artifacts import progress_artifact
from flows.run import steps
from flows.run.events import StageOpened, emit
from flows.run.stage import Stage
from flows.runners import prefect_workers
from stackwise_core.stages.identity import Ref
from storage.demand import TASK_KINDS


def _policy(name: str) -> CacheKeyFnPolicy:
    """Key a task by the id of its artifact; a task that makes none (a cache that is never read) has no key."""

    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
        stage: Stage = parameters["stage"]
        kind = TASK_KINDS[name]
        return None if stage.plan.recipe(kind) is None else f"{name}-{stage.plan.ref(kind).sha256}"

    return CacheKeyFnPolicy(cache_key_fn=key)


def _stage_task(name: str) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    return task(name=name, cache_policy=_policy(name), persist_result=True, result_serializer="json")


@_stage_task("build")
def build_stack(stage: Stage) -> Ref | None:
    """Describe the new stack: operator, source, seed, digest of its initial tensors."""
    return steps.build_stack(stage)


@_stage_task("trunk")
def configure_trunk(stage: Stage) -> Ref:
    """Describe the rack as the stage finds it."""
    return steps.configure_trunk(stage)


@_stage_task("train")
def train(stage: Stage, build: Ref | None, trunk: Ref) -> Ref:
    """Train the new stack, from its last checkpoint if there is one."""
    with progress_artifact(stage):
        return steps.train(stage, build, trunk)


@_stage_task("cache")
def cache_activations(stage: Stage, stack: Ref) -> Ref | None:
    """Write the boundary that the next stage reads, or report why there is none."""
    with progress_artifact(stage):
        return steps.cache_activations(stage, stack, prefect_workers)


@_stage_task("validate")
def validate(stage: Stage, stack: Ref, activations: Ref | None) -> Ref:
    """Measure the validation loss, and compare cached rows with live ones."""
    return steps.validate(stage, stack, activations)


def prepared(stage: Stage, made_by: Task[..., Any], verb: str) -> Task[..., Any]:
    """Return a task as this stage calls it: with a readable name, and its result record beside the artifacts.

    Prefect's record only says that the work was done once. Only the disk says whether the artifact exists, so a task
    whose artifact must be made ignores the record.
    """
    needed = TASK_KINDS[made_by.name] in stage.needed | stage.forced
    return made_by.with_options(
        task_run_name=f"{verb} {stage.what}",
        result_storage=stage.artifacts.root / "prefect",
        refresh_cache=needed,
    )


@flow(name="stage", flow_run_name="{stage.title}")
def add_stage(stage: Stage) -> Ref:
    """Build a stack on a trunk, train it, cache its boundary for the next stage, validate the result."""
    emit(StageOpened(stage.index, str(flow_run.id)))
    build = prepared(stage, build_stack, "build")(stage) if stage.plan.build else None
    trunk = prepared(stage, configure_trunk, "configure trunk of")(stage)
    stack = prepared(stage, train, "train")(stage, build, trunk)
    activations = prepared(stage, cache_activations, "cache activations of")(stage, stack)
    return prepared(stage, validate, "validate")(stage, stack, activations)
