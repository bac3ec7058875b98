"""The server and worker processes that deployments need, and what they register with Prefect."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from flows.network import check_proxies, shown, watching
from flows.run.children import ending_with_us
from flows.run.say import complain
from flows.server import BATCHED, LOG_INTERVAL, check_api, check_home, place_pages, switch_off_telemetry
from flows.settings import find_api, load_prefect
from stackwise_core.errors import StackWiseError

POOL = "stackwise"
"""The work pool of all deployments in prefect.yaml."""

AUTOMATION = "stackwise: no heartbeat, so the run has crashed"

NOTIFICATION = "stackwise: tell when a run has ended"

_BLOCK = "stackwise"
"""The block with the address that the notification is posted to."""

HEARTBEAT_SECONDS = 30
"""How often a flow process sends a heartbeat; one that missed two counts as dead."""

TAG = "stackwise"
"""The tag of all our flow runs on Prefect's pages; the automation judges no others."""

_OURS = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
_WHOLE_RUNS = ("train-rack", "add-stack", "compare", "validate", "gc")
"""The flows that people start; of their subflows nobody is told apart."""
_ONLY_IN_CONTAINERS = "docker"
"""Name of the deployment that works on the volume of docker/compose.yaml."""
_API = "http://127.0.0.1:4200/api"
_CHECKOUT = Path(__file__).parents[1]
_PREFECT = [sys.executable, "-P", "-m", "flows.program", "--no-prompt"]


class DeploymentError(StackWiseError):
    """Prefect rejected the deployments."""


def serve(host: str, port: int) -> None:
    """Replace this process by Prefect's server, with its pages.

    Its database is SQLite in PREFECT_HOME, unless PREFECT_SERVER_DATABASE_CONNECTION_URL names another:
    postgresql+asyncpg://USER:PASSWORD@HOST/NAME.
    """
    check_home()
    check_proxies()
    place_pages()
    switch_off_telemetry()
    os.environ.update({name: value for name, value in BATCHED.items() if name not in os.environ})
    here = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    os.environ.setdefault("PREFECT_UI_URL", here)  # of the links in notifications
    if not find_api().value:
        os.environ.setdefault("PREFECT_UI_API_URL", f"{here}/api")  # otherwise its pages call port 4200
    variable = "" if f"{here}/api" == _API else f"PREFECT_API_URL={here}/api "
    complain(f"Prefect's server: {here}; in other terminals: {variable}stackwise worker")
    _become([*_PREFECT, "server", "start", "--host", host, "--port", str(port)])


def work(limit: int, name: str, *, healthcheck: bool, in_containers: bool) -> None:
    """Register pool, deployments and heartbeat automation, then replace this process by a worker of the pool.

    `limit` runs execute at the same time; 1 gives a run the whole accelerator. If `name` is empty, Prefect chooses one.
    `healthcheck` serves on PREFECT_WORKER_WEBSERVER_PORT (8080) whether the worker polls. `in_containers` registers the
    deployment of the containers, too, which anywhere else would write to /data.

    Raises:
        ConfigError: the API does not answer.
        DeploymentError: Prefect rejected prefect.yaml; its output is in the message.
    """
    send_heartbeats()
    os.environ.setdefault(*LOG_INTERVAL)
    with watching(_find_api()):
        at_once = _register_pool(limit)
        _deploy(in_containers=in_containers)
        _register_automation()
    complain(f"registered: pool {POOL}, {at_once}; deployments; heartbeat automation")
    command = ["worker", "start", "--pool", POOL, "--type", "process", "--limit", str(limit)]
    command += ["--name", name] if name else []
    _become([*_PREFECT, *command, *(["--with-healthcheck"] if healthcheck else [])])


def send_heartbeats() -> None:
    """Let flows of this process and its children send heartbeats as often as the automation expects them.

    Prefect reads it on import. A longer interval would make live runs look dead, so it replaces what was set.
    """
    os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_SECONDS)


def register_heartbeat() -> bool:
    """Register the automation that marks runs as crashed when their heartbeat stops; return whether it changed.

    Raises:
        ConfigError: the API does not answer.
    """
    with watching(_find_api()):
        return _register_automation()


def register_notification(address: str, *, done: bool) -> bool:
    """Register the automation that posts to an address when a run of ours fails; return whether it changed.

    With `done` it also posts when a run completes. The server holds the address, in a block, and posts there.

    Raises:
        ConfigError: the API does not answer.
    """
    with watching(_find_api()):
        from prefect.blocks.notifications import CustomWebhookNotificationBlock

        key = "content" if "discord" in (urlsplit(address).hostname or "") else "text"  # Slack and others: text
        block = CustomWebhookNotificationBlock(
            name="StackWise", url=address, json_data={key: "{{subject}}: {{body}}"}, headers=None, cookies=None
        )
        action = {
            "type": "send-notification",
            "block_document_id": str(block.save(_BLOCK, overwrite=True)),
            "subject": "{{ flow_run.name }} is {{ flow_run.state.name }}",
            "body": "{{ flow_run.state.message or '' }} {{ (flow_run|ui_url) or '' }}",
        }
        trigger = {
            "type": "event",
            "posture": "Reactive",
            "expect": [f"prefect.flow-run.{end}" for end in ("Failed", "Crashed", *(["Completed"] if done else []))],
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": [_OURS, {"prefect.resource.role": "flow", "prefect.resource.name": list(_WHOLE_RUNS)}],
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
        }
        return _registered(NOTIFICATION, "Posts to the address of the block stackwise.", trigger, action)


def remove_notification() -> bool:
    """Remove that automation, and the block with its address; return whether there was one."""
    with watching(_find_api()):
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        with get_client(sync_client=True) as client:
            there = client.read_automations_by_name(NOTIFICATION)
            for found in there:
                client.delete_automation(found.id)
            with contextlib.suppress(ObjectNotFound):
                client.delete_block_document(client.read_block_document_by_name(_BLOCK, "custom-webhook").id)
    return bool(there)


def _find_api() -> str:
    """Set PREFECT_API_URL, if it is not set, to where `stackwise server` listens; return it if it answers."""
    check_proxies()
    switch_off_telemetry()
    given = find_api()
    url = os.environ["PREFECT_API_URL"] = given.value or _API
    complain(f"Prefect's server: {shown(url)}{given.by}")
    check_api(url, "" if given.value else f"nothing, so {_API} was asked", str(given))
    load_prefect()
    return url


def _register_pool(limit: int) -> str:
    """Create the pool with the limit of its first worker, and return its limit in words.

    The pool counts runs by state, so that a run which outlived its killed worker still occupies the accelerator.
    An existing pool keeps its limit unless that of this worker is higher.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=limit)
    with get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(pool)
        at_once = client.read_work_pool(POOL).concurrency_limit
        if at_once is not None and at_once < limit:
            client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=limit))
            at_once = limit
    return "runs without a limit" if at_once is None else f"{at_once} run{'s' if at_once != 1 else ''} at a time"


def _deploy(*, in_containers: bool) -> None:
    """Apply prefect.yaml; the flows run in its folder."""
    path = _CHECKOUT / "prefect.yaml"
    document = yaml.safe_load(path.read_text())
    document["deployments"] = [
        each for each in document["deployments"] if in_containers or each["name"] != _ONLY_IN_CONTAINERS
    ]
    with tempfile.NamedTemporaryFile("w", prefix="prefect-", suffix=".yaml") as chosen:
        yaml.safe_dump(document, chosen)
        chosen.flush()
        done = subprocess.run(
            ending_with_us([*_PREFECT, "deploy", "--all", "--prefect-file", chosen.name], signal.SIGKILL),
            cwd=_CHECKOUT,
            env=os.environ | {"PWD": str(_CHECKOUT)},  # prefect.yaml asks for it
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise DeploymentError(f"{path}: Prefect rejected it: {(done.stdout + done.stderr)[-2000:]}")


def _register_automation() -> bool:
    """Register the automation, or replace one that an older version registered; return whether anything changed.

    One of our runs that has neither ended nor been paused, and whose heartbeats stayed away for two periods and ten
    seconds, has crashed.
    """
    ends = ["heartbeat", "Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Paused"]
    message = "no heartbeat: its machine died, or the server was not reachable"
    trigger = {
        "type": "event",
        "posture": "Proactive",
        "after": ["prefect.flow-run.heartbeat"],
        "expect": [f"prefect.flow-run.{end}" for end in ends],
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": _OURS,
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
        "within": 2 * HEARTBEAT_SECONDS + 10,
    }
    action = {"type": "change-flow-run-state", "state": "CRASHED", "message": message}
    description = "Marks the runs of a dead machine as Crashed; without it they stay Running for ever."
    return _registered(AUTOMATION, description, trigger, action)


def _registered(name: str, description: str, trigger: dict[str, Any], action: dict[str, Any]) -> bool:
    """Register an automation, or replace that of its name, which stays off if it is off; return whether it changed."""
    from prefect.automations import AutomationCore
    from prefect.client.orchestration import get_client

    wanted = AutomationCore.model_validate(
        {"name": name, "description": description, "trigger": trigger, "actions": [action]}
    )
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(name)
        for found in there:
            if found.trigger == wanted.trigger and found.actions == wanted.actions:
                return False
            client.update_automation(found.id, wanted.model_copy(update={"enabled": found.enabled}))
        if not there:
            client.create_automation(wanted)
    return True


def _become(command: list[str]) -> None:
    sys.stderr.flush()
    os.execv(command[0], command)
