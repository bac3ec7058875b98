"""The flow that grows a rack to its target, stage by stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from prefect import flow, tags
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, Pause, TerminationSignal
from prefect.logging.handlers import APILogHandler
from pydantic import Field

from flows.artifacts import live_page, publish_run, run_log
from flows.errors import explained_server_errors, one_line_errors, outlive_the_worker
from flows.flow_runs import end, end_killed_tasks, page_of_run, tagged, tags_of, watched
from flows.run.events import GO_ON, Message, emit, subscribed
from flows.run.run import grow
from flows.run.stage import Stage
from flows.tasks import add_stage
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StageInterruptedError

StageNumber = Annotated[int, Field(ge=-1, le=10_000)]
Task = Literal["", "build", "trunk", "train", "cool", "cache", "validate"]


@flow(name="train-rack", flow_run_name="grow {config.run.name} to {config.training.progressive.target_stacks} stacks")
def train_rack(
    config: StackWiseConfig,
    artifacts: str = "artifacts",
    from_stack: StageNumber = -1,
    force: Task = "",
) -> State[Any] | None:
    """Grow a rack stage by stage: build a stack on the trunk, train it, cache its boundary, validate the result.

    Sealed artifacts are reused, interrupted training resumes, missing artifacts are made.

    Args:
        config: The run.
        artifacts: The artifacts folder.
        from_stack: Redo the stages from this one on; -1 redoes none.
        force: Redo this task of those stages, or of all.
    """
    outlive_the_worker()
    publish = publish_run(config, artifacts)
    if page := page_of_run():
        emit(Message(f"page of this run: {page}"))
    with one_line_errors(), tagged(config.run.name), watched():
        end_killed_tasks()
        try:
            with subscribed(run_log()), subscribed(publish), live_page(config.run.name):
                grow(config, artifacts, from_stack=from_stack, force=force, add=_add)
        except (StageInterruptedError, KeyboardInterrupt, TerminationSignal) as stop:
            return end(str(stop) if isinstance(stop, StageInterruptedError) else f"stopped on request; {GO_ON}")


def _add(stage: Stage) -> None:
    try:
        with tags(f"stage:{stage.index}"):
            add_stage(stage)
    except CancelledRun as stop:
        raise StageInterruptedError(str(stop)) from None
    except Pause:  # Prefect itself asks at the beginning and end of tasks and flows
        raise StageInterruptedError(f"stopped on request; {GO_ON}") from None


def run_to_the_end(config: StackWiseConfig, root: str, from_stack: int, force: str) -> None:
    """Run the flow from the command line, and flush its log before the embedded server ends.

    Raises:
        StackWiseError: one clear message; the same command resumes from the sealed artifacts.
    """
    try:
        with explained_server_errors(), tags(*tags_of(config.run.name)):
            train_rack(config, root, from_stack, cast("Task", force))
    except CancelledRun as stop:
        raise StageInterruptedError(str(stop)) from None
    finally:
        APILogHandler().flush()
