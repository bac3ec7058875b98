"""The flow that adds one stack."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from flows import tasks
from flows.progress import StageOpened, tell
from flows.stage import Stage
from stackwise_core.identity import Ref


@flow(name="stage", flow_run_name="{stage.title}")
def add_stack(stage: Stage) -> Ref:
    """Build a stack on a trunk, train it, cache its boundary for the next one, judge the result."""
    tell(StageOpened(stage.index, str(flow_run.id)))
    build = tasks.prepared(stage, tasks.build_stack, "build")(stage) if stage.plan.build else None
    trunk = tasks.prepared(stage, tasks.configure_trunk, "configure trunk of")(stage)
    stack = tasks.prepared(stage, tasks.train, "train")(stage, build, trunk)
    activations = tasks.prepared(stage, tasks.cache_activations, "cache activations of")(stage, stack)
    return tasks.prepared(stage, tasks.validate, "validate")(stage, stack, activations)
