"""The flow that adds one stack to an existing run; an operator starts it from a form."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows.errors import one_line_errors
from flows.flow_runs import tagged
from flows.train_rack import train_rack
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import StackOverride
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.resolve import named_functions
from storage.artifacts import artifacts_at
from storage.runs import asked_before, asking, find_run


@flow(name="add-stack", flow_run_name="grow {run} by one stack")
def add_stack(
    run: str,
    artifacts: str = "artifacts",
    stack: StackOverride = StackOverride(),  # noqa: B008 -- so that the form shows its fields
    trust_functions: bool = False,
) -> State[Any] | None:
    """Add one stack to a run.

    If the newest attempt of the run did not reach its target, this flow completes it instead; so a retry adds one
    stack, not two.

    Args:
        run: Name of the run; `stackwise status` lists them.
        artifacts: Folder that holds it, or s3://BUCKET/PREFIX.
        stack: Settings of the new stack that differ from the others.
        trust_functions: Import the functions that the run's configuration names; only if you know who wrote it.
    """
    who = f"flow run {flow_run.id}"  # the same in every retry
    with one_line_errors():
        config = grown(artifacts, run, stack, who)
        if not trust_functions:
            _check_no_code(config)
    try:
        with tagged(run), asking(who):
            train_rack(config, artifacts)
    except CancelledRun as stop:
        return Cancelled(message=str(stop))


def grown(root: str, run: str, stack: StackOverride, who: str) -> StackWiseConfig:
    """Return the configuration of a run with one stack more, or unchanged if its newest attempt is not done.

    `who` identifies the request; a repeated request returns the configuration of the first.

    Raises:
        ConfigError: there is no such run, or its unfinished stack has other settings.
    """
    artifacts = artifacts_at(root).existing()
    newest = find_run(artifacts, run)
    if before := asked_before(artifacts, run, who):
        return before.config
    config = newest.config
    if newest.outcome is None or newest.outcome["state"] != "done":
        _check_same(config, stack)
        return config
    growth = config.training.progressive
    new = growth.target_stacks
    growth.target_stacks = new + 1
    if stack != StackOverride():
        others = [StackOverride()] * (new - len(growth.stacks))
        growth.stacks = [*growth.stacks[:new], *others, stack, *growth.stacks[new + 1 :]]
    return config


def _check_no_code(config: StackWiseConfig) -> None:
    """Check that a configuration, which came with the artifacts, names no function to import."""
    if named := named_functions(config):
        allowed = f"run {config.run.name!r} names {', '.join(named.values())}: set it if you trust who wrote that"
        raise ConfigError([Fault("trust_functions", "false", allowed)])


def _check_same(config: StackWiseConfig, stack: StackOverride) -> None:
    """Check that the requested settings are those of the last stack of the unfinished run."""
    growth = config.training.progressive
    given = growth.stacks[growth.target_stacks - 1] if len(growth.stacks) >= growth.target_stacks else StackOverride()
    if stack != given:
        name, allowed = config.run.name, given.model_dump_json()
        remedy = f"its newest attempt is not done: complete run {name!r} with {allowed}, then add a stack"
        raise ConfigError([Fault("stack", stack.model_dump_json(), remedy)])
