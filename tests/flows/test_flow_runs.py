"""What somebody does to a run on Prefect's pages while it trains: a stop at a safe point, and the right word for it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, Pause
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Paused, Running, Scheduled, Suspended

from flows import flow_runs
from flows.flow_runs import Watch
from flows.run.events import Message, stop_requested, stopping_on_signals, subscribed
from flows.services import TAG
from flows.tasks import validate
from flows.train_rack import train_rack


@pytest.fixture(autouse=True)
def _run() -> Iterator[None]:
    with stopping_on_signals():  # what is asked for here is forgotten
        yield


def run(state: Any, deployment: str | None = None) -> Any:
    return SimpleNamespace(id=uuid.uuid4(), state=state, deployment_id=deployment)


class Server:
    """Knows one run and its subflows; fails as often as it is told to."""

    def __init__(self, state: Any, deployment: str | None = None, failures: int = 0) -> None:
        self.run = run(state, deployment)
        self.subflow = SimpleNamespace(id=uuid.uuid4())
        self.failures, self.asked, self.became = failures, 0, {}

    @contextlib.contextmanager
    def client(self, **_: object) -> Generator[Any]:
        yield self

    def read_flow_run(self, run: uuid.UUID) -> Any:
        assert run == self.run.id
        self.asked += 1
        if self.asked <= self.failures:
            raise ConnectionError("the server is away")
        return self.run

    def read_flow_runs(self, **_: object) -> list[Any]:
        return [self.subflow]

    def set_flow_run_state(self, run: uuid.UUID, state: Any, *, force: bool) -> None:
        assert force
        self.became[run] = state.name


@pytest.mark.parametrize("state", [Suspended(), Paused(), Cancelling(), Cancelled()])
def test_what_is_suspended_paused_or_cancelled_is_asked_to_stop(state: Any) -> None:
    heard: list[Any] = []
    watch = Watch()
    with subscribed(heard.append):
        watch.hear(run(Running()))
        assert not stop_requested()
        for _ in range(2):
            watch.hear(run(state))
    assert stop_requested()
    assert heard == [Message(f"{state.name} on Prefect's pages: stopping at the next safe point")]


@pytest.mark.parametrize("state", [None, Crashed(), Completed()])
def test_a_run_that_others_think_dead_goes_on(state: Any) -> None:
    Watch().hear(run(state))
    assert not stop_requested()


def test_a_server_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server, watch = Server(Suspended(), failures=3), Watch()
    monkeypatch.setattr(flow_runs, "_SECONDS_BETWEEN_QUESTIONS", 0.0)
    monkeypatch.setattr(flow_runs, "get_client", server.client)
    with subscribed(lambda event: watch.ended.set()):
        watch.ask(str(server.run.id))
    assert server.asked == 4
    assert stop_requested()


def ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(flow_runs, "get_client", server.client)
    monkeypatch.setattr(
        flow_runs, "flow_run", SimpleNamespace(id=str(server.run.id), root_flow_run_id=server.run.id.hex)
    )
    return flow_runs.end("stopped on request after step 5 of 12")


def test_whoever_stops_a_run_without_a_page_sees_it_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ended(Server(Running(), "deployment"), monkeypatch)
    assert (state.name, state.message) == ("Cancelled", "stopped on request after step 5 of 12")


def test_a_worker_that_cancels_a_run_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown as Cancelled before its process has ended, a run could be retried, and the worker would cancel that."""
    server = Server(Cancelling(), "deployment")
    Watch().hear(server.run)
    assert not stop_requested()  # the worker sends a signal
    with pytest.raises(Abort):
        ended(server, monkeypatch)
    assert server.became == {server.subflow.id: "Cancelled"}


@pytest.mark.parametrize("state", [Suspended(), Paused(), Scheduled(name="Resuming")])
def test_a_run_of_a_deployment_that_is_suspended_or_paused_waits_for_resume(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that only paused would keep the accelerator, and Resume, which may come first, would expect it."""
    server = Server(state, "deployment")
    with pytest.raises(Pause):
        ended(server, monkeypatch)
    suspended = {server.run.id: "Suspended"} if state.name == "Paused" else {}
    assert server.became == {**suspended, server.subflow.id: "Paused"}


def test_a_run_of_a_terminal_that_is_suspended_cannot_be_resumed_by_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Suspended())
    assert ended(server, monkeypatch).name == "Cancelled"
    assert server.became == {server.run.id: "Cancelled"}


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_api")
def test_tasks_of_killed_processes_do_not_seem_to_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of runs of ours that have ended a while ago, and of this run before it was retried; no others."""
    with get_client(sync_client=True) as client:

        def seeming(state: Any, *tags: str, parent: uuid.UUID | None = None) -> tuple[uuid.UUID, uuid.UUID]:
            how: dict[str, Any] = {"parameters": {}, "tags": tags, "state": Running(), "parent_task_run_id": parent}
            flow_run = client.create_flow_run(train_rack, **how).id
            task = client.create_task_run(validate, flow_run, uuid.uuid4().hex, state=Running()).id
            client.set_flow_run_state(flow_run, state, force=True)
            return flow_run, task

        dead = [seeming(kind(), TAG) for kind in (Crashed, Completed, Cancelled)]
        others = [seeming(Crashed(), "another-team")]
        a_while_ago = datetime.now(UTC)
        others += [seeming(Crashed(), TAG), seeming(Running(), TAG)]
        retried = seeming(Running(), TAG)
        stands_for_subflow = client.create_task_run(validate, retried[0], "subflow", state=Running()).id
        again = [retried, seeming(Crashed(), TAG, parent=stands_for_subflow)]

        def shown() -> dict[uuid.UUID, str]:
            return {task: client.read_task_run(task).state_name or "" for _, task in (*dead, *again, *others)}

        for run_count in (1, 2):
            at = SimpleNamespace(id=str(retried[0]), run_count=run_count)
            monkeypatch.setattr(flow_runs, "flow_run", at)
            monkeypatch.setattr(flow_runs, "_TASKS_MAY_LAG", datetime.now(UTC) - a_while_ago)
            flow_runs.end_killed_tasks()
            ended = [task for _, task in (*dead, *(again if run_count > 1 else []))]
            assert shown() == {task: "Crashed" if task in ended else "Running" for task in shown()}


def test_pages_that_cannot_be_mended_stop_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: object) -> Any:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(flow_runs, "get_client", away)
    monkeypatch.setattr(flow_runs, "flow_run", SimpleNamespace(id=str(uuid.uuid4()), run_count=2))
    flow_runs.end_killed_tasks()
