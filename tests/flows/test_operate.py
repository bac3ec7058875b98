"""`stackwise server` and `stackwise worker`, as an operator starts them, from a clone in another folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import services
from flows.cli.main import parse
from flows.network import ask
from flows.server import BATCHED, fault_of, is_registered, workers_alive
from flows.services import AUTOMATION, POOL, _register_automation, _register_pool, send_heartbeats
from support.commands import Run
from support.runs import tiny_values, write_corpus

REPOSITORY = Path(__file__).parents[2]
_STACKWISE = [sys.executable, "-c", "import sys; from flows.cli.main import main; sys.exit(main())"]


def until(holds: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask until it holds: other processes tell nothing of themselves."""
    end = time.monotonic() + 900
    while not holds():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """Start a command in a clone of this working copy; all are ended with the test."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for part in ("flows", "storage", "stackwise_core", "prefect.yaml"):
        (clone / part).symlink_to(REPOSITORY / part) if part != "flows" else _copy(REPOSITORY / part, clone / part)
    with contextlib.ExitStack() as ends:

        def begin(*command: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
            log = tmp_path / f"{command[0]}.log"
            with log.open("ab") as out:
                process = subprocess.Popen(
                    [*_STACKWISE, *command],
                    cwd=tmp_path,
                    env=inherited | {"PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(clone), **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            ends.callback(_end, process)
            return process, log

        yield begin


def _copy(source: Path, target: Path) -> None:
    """Copy a package: where its files lie is where its clone is."""
    target.mkdir()
    for file in source.rglob("*.py"):
        (target / file.relative_to(source)).parent.mkdir(exist_ok=True)
        (target / file.relative_to(source)).write_bytes(file.read_bytes())


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_server_and_a_worker_by_one_command_each(start: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    until(lambda: not fault_of(url), *start("server", "--port", str(port)))
    worker = start("worker", "--name", "ada", PREFECT_API_URL=url)
    until(lambda: workers_alive(url, POOL) == ["ada"], *worker)
    assert is_registered(url, AUTOMATION)

    deployments = {f"{entry['entrypoint']}/{entry['name']}": entry for entry in ask(url, "/deployments/filter", {})}
    assert len(deployments) == 5
    assert not [name for name in deployments if name.endswith("/docker")]  # which would write to /data of this machine
    local = deployments["flows.train_rack.train_rack/local"]
    assert local["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path / "clone")}}
    ]
    wrong = {"parameters": {"config": {"training": {"batch_size": 0}}}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, f"/deployments/{local['id']}/create_flow_run", wrong)
    assert refused.value.code == 409
    assert "0 is less than the minimum of 1" in refused.value.read().decode()

    assert ask(f"http://127.0.0.1:{port}", "/ui-settings")["api_url"] == url
    again, log = start("heartbeat", PREFECT_API_URL=url)
    assert again.wait() == 0
    assert "was there already" in log.read_text()

    gone = ask(url, f"/deployments/{_id(deployments, 'validate_run')}/create_flow_run", {"parameters": {"run": "gone"}})
    until(lambda: ask(url, f"/flow_runs/{gone['id']}")["state"]["type"] == "FAILED", *worker)
    message = ask(url, f"/flow_runs/{gone['id']}")["state"]["message"]
    assert message.count("\n") == 0
    assert "artifacts" in message

    # Killed, and retried as soon as the crash is reported: a second report of it would end the retry.
    body = {
        "parameters": {"config": tiny_values(write_corpus(tmp_path / "corpus.txt")), "artifacts": str(tmp_path / "a")},
        "job_variables": {"env": {"STACKWISE_FAILPOINT": "train:6:KILL"}},
    }
    killed = ask(url, f"/deployments/{local['id']}/create_flow_run", body)["id"]
    until(lambda: ask(url, f"/flow_runs/{killed}")["state"]["type"] == "CRASHED", *worker)
    retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    assert ask(url, f"/flow_runs/{killed}/set_state", retry)["status"] == "ACCEPT"
    until(lambda: ask(url, f"/flow_runs/{killed}")["state"]["type"] in ("CRASHED", "COMPLETED"), *worker)
    seen = [state["type"] for state in ask(url, f"/flow_run_states/?flow_run_id={killed}")]
    assert seen.count("CRASHED") == 2  # the retry too was killed, by itself: it has the same failpoint
    assert seen.count("RUNNING") == 2


def _id(deployments: dict[str, Any], flow: str) -> str:
    return next(entry["id"] for name, entry in deployments.items() if name.split("/")[0].endswith(flow))


@pytest.mark.flow
def test_the_worker_of_the_pool_reports_a_crash_once(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the runner inside that reports it; Prefect's worker would again, unless the process ended with 0."""
    from prefect.cli._worker_utils import _load_worker_class
    from prefect.workers.process import ProcessWorker, ProcessWorkerResult

    import flows.worker

    async def killed(*_: Any, **__: Any) -> ProcessWorkerResult:
        return ProcessWorkerResult(status_code=-9, identifier="pid")

    monkeypatch.setattr(ProcessWorker, "run", killed)
    chosen = _load_worker_class("process")
    assert chosen is flows.worker.PatientWorker
    result = asyncio.run(chosen.run(object.__new__(chosen), None, None))
    assert (result.status_code, result.identifier) == (0, "pid")


@pytest.mark.flow
def test_a_pool_has_room_for_what_its_workers_run_at_once(prefect_api: str) -> None:
    """It is the pool that keeps the accelerator to one run: it counts also a run whose worker was killed."""
    said = [_register_pool(limit) for limit in (1, 3, 2)]
    assert said == ["1 run at a time", "3 runs at a time", "3 runs at a time"]
    assert ask(prefect_api, f"/work_pools/{POOL}")["concurrency_limit"] == 3


@pytest.mark.flow
def test_the_automation_judges_our_runs_alone_also_if_an_older_version_registered_it(prefect_api: str) -> None:
    from prefect.automations import AutomationCore
    from prefect.client.orchestration import get_client
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import ReceivedEvent

    everybody = {
        "name": AUTOMATION,
        "enabled": False,
        "trigger": {"posture": "Proactive", "match": {"prefect.resource.id": "prefect.flow-run.*"}, "within": 70},
        "actions": [{"type": "change-flow-run-state", "state": "CRASHED"}],
    }
    with get_client(sync_client=True) as client:
        client.create_automation(AutomationCore.model_validate(everybody))
        assert [_register_automation() for _ in range(2)] == [True, False]
        (found,) = client.read_automations_by_name(AUTOMATION)
        client.delete_automation(found.id)
    assert not found.enabled  # as somebody wanted it
    trigger = EventTrigger.model_validate(found.trigger.model_dump(mode="json"))

    def judged(tag: str, event: str) -> bool:
        related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}]
        run = {"prefect.resource.id": "prefect.flow-run.c0ffee"}
        seen = {"occurred": "2026-01-01T00:00:00Z", "event": f"prefect.flow-run.{event}", "id": uuid.uuid4()}
        return trigger.covers(ReceivedEvent.model_validate({**seen, "resource": run, "related": related}))

    assert judged("stackwise", "heartbeat")
    assert not judged("of-a-stranger", "heartbeat")
    ended = {
        event
        for event in ("Suspended", "Paused", "Cancelled", "Running")
        if trigger.expects(f"prefect.flow-run.{event}")
    }
    assert ended == {"Suspended", "Paused", "Cancelled"}


def test_a_longer_interval_of_heartbeats_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make a run that lives look dead."""
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180")
    send_heartbeats()
    assert os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


@pytest.mark.parametrize(("arguments", "there"), [((), False), (("--in-containers",), True)])
def test_the_deployment_of_the_containers_is_registered_by_their_worker(
    arguments: tuple[str, ...], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[Any] = []

    def apply(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        applied.append(yaml.safe_load(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(services.subprocess, "run", apply)
    services._deploy(in_containers=parse(["worker", *arguments]).in_containers)
    known = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    assert applied[0]["deployments"] == [each for each in known if there or each["name"] != "docker"]
    assert len(applied[0]["deployments"]) == 6 + there


@pytest.mark.parametrize(
    "command",
    [
        ("server", "--port", "70000"),
        ("server", "--port", "-1"),
        ("worker", "--limit", "0"),
        ("worker", "--limit", "-3"),
        ("worker", "--name", "a/b"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_begins(command: tuple[str, ...], run: Run) -> None:
    result = run(*command)
    assert result.code == 2
    assert f"got {command[2]!r}; " in result.err


@pytest.mark.parametrize(
    ("given", "arguments", "pages_ask", "told"),
    [
        ({}, ("127.0.0.1", 4200), "http://127.0.0.1:4200/api", "terminals: stackwise worker"),
        (
            {},
            ("127.0.0.1", 4311),
            "http://127.0.0.1:4311/api",
            "terminals: PREFECT_API_URL=http://127.0.0.1:4311/api stackwise worker",
        ),
        ({}, ("0.0.0.0", 4200), "http://127.0.0.1:4200/api", "terminals: stackwise worker"),
        ({"PREFECT_UI_API_URL": "https://pages/api"}, ("0.0.0.0", 80), "https://pages/api", ""),
        ({"PREFECT_API_URL": "http://box:80/api"}, ("0.0.0.0", 80), None, ""),  # which Prefect's pages ask then
    ],
)
def test_the_pages_of_a_server_ask_that_server(
    given: dict[str, str],
    arguments: tuple[str, int],
    pages_ask: str | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    began: list[list[str]] = []
    monkeypatch.setattr(services, "_become", began.append)
    own, *_ = BATCHED
    monkeypatch.setattr(os, "environ", {**given, own: "7"})
    services.serve(*arguments)
    assert {name: os.environ[name] for name in BATCHED} == BATCHED | {own: "7"}  # few writes, as the user wants them
    assert began[0][-4:] == ["--host", arguments[0], "--port", str(arguments[1])]
    assert os.environ.get("PREFECT_UI_API_URL") == pages_ask
    assert os.environ["PREFECT_UI_URL"] == f"http://127.0.0.1:{arguments[1]}"  # of the links in notifications
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("writable", "given", "lie_in"),
    [(True, {}, None), (False, {}, "home/pages"), (False, {"PREFECT_UI_STATIC_DIRECTORY": "mine"}, "mine")],
)
def test_pages_are_copied_to_where_they_can_be_written(
    writable: bool, given: dict[str, str], lie_in: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In an image, or an installation by another user, Prefect cannot copy them into its own package."""
    access = os.access

    def as_another_user(path: Any, mode: int) -> bool:
        return writable if Path(path).name == "server" else access(path, mode)

    monkeypatch.setattr(services, "_become", lambda command: None)
    monkeypatch.setattr(os, "environ", {"PREFECT_HOME": str(tmp_path / "home"), **given})
    monkeypatch.setattr(os, "access", as_another_user)
    services.serve("127.0.0.1", 4200)
    expected = lie_in if lie_in in (None, "mine") else str(tmp_path / str(lie_in))
    assert os.environ.get("PREFECT_UI_STATIC_DIRECTORY") == expected
