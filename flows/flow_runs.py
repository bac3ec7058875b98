"""Our flow runs on Prefect's server: their tags, and how they end when they are asked to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort, Pause
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed, Paused, Suspended
from prefect.utilities.urls import url_for

from flows.run.events import Message, emit, request_stop
from flows.services import TAG

_SECONDS_BETWEEN_QUESTIONS = 5.0
_TASKS_MAY_LAG = timedelta(minutes=1)
_STOPPING = {StateType.PAUSED, StateType.CANCELLING, StateType.CANCELLED}


def tags_of(run: str) -> set[str]:
    """Return the tags of a flow run that works on a run."""
    return {TAG, f"run:{run}"}


def page_of_run() -> str:
    """Return the address of this flow run's page, or '' if it has none."""
    return (url_for("flow-run", obj_id=flow_run.id) or "") if flow_run.id else ""


@contextlib.contextmanager
def tagged(run: str) -> Generator[None]:
    """Tag this flow run, and the subflows that start while the block runs, with the run that they work on.

    Only a flow run that was started as ours is marked as ours: another may send heartbeats too seldom.
    """
    before = set(flow_run.tags)
    now = before | (tags_of(run) - {TAG})
    if flow_run.id and now != before:  # a deployment does not know the name
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, tags=now)
    with tags(*now & tags_of(run)):
        yield


@contextlib.contextmanager
def watched() -> Generator[None]:
    """Ask this run to stop, while the block runs, when somebody suspends, pauses or cancels it on Prefect's pages."""
    watch = Watch()
    if flow_run.id:
        ask = copy_context().run
        threading.Thread(target=ask, args=(watch.ask, flow_run.root_flow_run_id), daemon=True, name="watch").start()
    try:
        yield
    finally:
        watch.ended.set()


class Watch:
    """The state of a run on Prefect's server, asked in a thread: the server may be away for minutes."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.asked = False
        """Whether the run was asked to stop."""
        self.ended = threading.Event()

    def ask(self, run: str) -> None:
        """Ask every few seconds until the run has ended."""
        if self.ended.wait(_SECONDS_BETWEEN_QUESTIONS):
            return
        with get_client(sync_client=True) as client:
            while True:
                with contextlib.suppress(Exception):  # the HTTP client has many errors for a server that is away
                    self.hear(client.read_flow_run(UUID(run)))
                if self.ended.wait(_SECONDS_BETWEEN_QUESTIONS):
                    return

    def hear(self, run: FlowRun) -> None:
        """Request a stop if the state of the run says so. A worker cancels its runs by a signal."""
        if run.state is None or run.state.type not in _STOPPING or (run.state.is_cancelling() and run.deployment_id):
            return
        if not self.asked:
            emit(Message(f"{run.state.name} on Prefect's pages: stopping at the next safe point"))
        self.asked = True
        request_stop()


def end(message: str) -> State[Any]:
    """Return the state in which a flow ends that was stopped.

    Raises:
        Pause: the run was suspended or paused. Its process ends, and Resume starts it again.
        Abort: its worker cancels it, and shows it as Cancelled once the process has ended. If it were shown so
            before, the worker would cancel a retry that came in between.
    """
    with get_client(sync_client=True) as client:
        root = client.read_flow_run(UUID(flow_run.root_flow_run_id))
        state = root.state
        if state is not None and state.is_cancelling() and root.deployment_id:
            _end_subflows(client, root.id, Cancelled(message=message))
            ending = Abort(message)
            setattr(ending, "state", state)  # noqa: B010 -- the engine logs it as the state in which the flow ended
            raise ending
        if state is None or not (state.is_paused() or state.is_scheduled()):  # scheduled: resumed already
            return Cancelled(message=message)
        if root.deployment_id is None:  # Prefect could not start it again
            client.set_flow_run_state(root.id, Cancelled(message=message), force=True)
            return Cancelled(message=message)
        if state.is_paused() and state.name != "Suspended":
            # Resume of a paused run expects its process, which would hold the accelerator.
            state = Suspended(pause_expiration_time=state.state_details.pause_timeout)
            client.set_flow_run_state(root.id, state, force=True)
        _end_subflows(client, root.id, Paused(message=message))  # the resumed run goes on with them
    raise Pause(state=state)


def end_killed_tasks() -> None:
    """Show tasks as Crashed whose process was killed.

    They are those of earlier starts of this flow run and its subflows, and of runs of ours that have ended.
    Prefect tells how the process of a flow ended, but says nothing of its tasks, which would seem to run for ever.
    """
    mine = {"operator": "or_", "id": {"any_": [flow_run.id]}, "parent_flow_run_id": {"any_": [flow_run.id]}}
    # The last word on a task may reach the server a little later than that on its flow.
    ended = {"end_time": {"before_": (datetime.now(UTC) - _TASKS_MAY_LAG).isoformat()}, "tags": {"all_": [TAG]}}
    running = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # no run fails for its pages
        for runs in (mine, ended) if flow_run.run_count > 1 else (ended,):
            where = FlowRunFilter.model_validate(runs)
            for task in client.read_task_runs(flow_run_filter=where, task_run_filter=running):
                client.set_task_run_state(task.id, Crashed(message="its process was killed"), force=True)


def _end_subflows(client: SyncPrefectClient, root: UUID, state: State[Any]) -> None:
    """Show the unfinished subflows as what they are: their process ends."""
    mine = {"parent_flow_run_id": {"any_": [flow_run.id]}, "state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
    subflows = [run.id for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(mine))]
    for run in [*subflows, *({UUID(flow_run.id)} - {root})]:
        client.set_flow_run_state(run, state, force=True)
