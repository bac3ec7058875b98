"""Runs whose artifacts are all sealed, queued on one worker with Postgres: each must complete, and run exactly once.

Each run is a process that starts, imports Prefect and torch, and finds nothing to do. The worker polls every second
instead of every ten, and executes two runs at a time, one for each core of this machine. It starts Prefect's engine
directly, instead of through a command that imports Prefect first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import ROOT, Measure
from benchmarks.postgres import end, free_port, postgres
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from storage.artifacts import artifacts_at
from storage.runs import attempts

RUNS, QUICK_RUNS = 200, 10
_SMALL = {
    "data.max_sequences": 64,
    "model.d_model": 32,
    "training.batch_size": 4,
    "training.steps_per_stack": 2,
    "training.warmup_steps": 1,
    "training.progressive.target_stacks": 1,
    "validation.max_sequences": 8,
}
"""What is made once, before the clock starts."""
_DEPLOYMENT = "train-rack/local"
_AT_ONCE = 2
_STARTUP_SECONDS = 300.0
_SECONDS_A_RUN = 60.0
_STACKWISE = "import sys; from flows.cli.main import main; sys.exit(main())"
_LOCKED = "database is locked"
_ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def measure(quick: bool) -> list[Measure]:
    """Queue runs before the worker starts, and compare their outcome in Prefect's records and in ours.

    Raises:
        RuntimeError: a run failed or ran twice, or a database was locked.
    """
    n_runs = QUICK_RUNS if quick else RUNS
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch, postgres("prefect", password, "prefect") as port:
        folder = Path(scratch)
        config, artifacts = (
            StackWiseConfig.from_yaml(ROOT / "configs" / "quickstart.yaml", _SMALL),
            folder / "artifacts",
        )
        grow(config, str(artifacts))
        environment = _environment(folder, f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/prefect")
        with _server(folder, environment) as api, _worker(folder, environment):
            seconds, runs = _queued(api, config, artifacts, n_runs)
        _check(runs, folder, n_runs)
    case = f"{n_runs} runs, one worker, {_AT_ONCE} at once, Postgres"
    own = [run["total_run_time"] for run in runs]
    return [
        Measure(case, "all", "s", [seconds]),
        Measure(case, "all / runs", "s", [seconds / n_runs]),
        Measure(case, "within a run's flow", "s", own),
        Measure(case, "completed, and ran once", "runs", [float(sum(map(_is_well, runs)))], at_least=n_runs),
    ]


# ---------------------------------------------------------------- server and worker


def _environment(folder: Path, database: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return inherited | {
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def _server(folder: Path, environment: dict[str, str]) -> Generator[httpx.Client]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with (
        _process(folder / "server.log", environment, "server", "--port", str(port)) as process,
        httpx.Client(base_url=url, timeout=60) as api,
    ):
        _until(lambda: _answers(api, "/health"), process, folder / "server.log")
        environment["PREFECT_API_URL"] = url
        yield api


@contextlib.contextmanager
def _worker(folder: Path, environment: Mapping[str, str]) -> Generator[None]:
    """Start a worker, which registers the deployments first."""
    with _process(folder / "worker.log", environment, "worker", "--limit", str(_AT_ONCE)) as process:
        with httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=60) as api:
            _until(lambda: _answers(api, f"/deployments/name/{_DEPLOYMENT}"), process, folder / "worker.log")
        yield


@contextlib.contextmanager
def _process(log: Path, environment: Mapping[str, str], *command: str) -> Generator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _STACKWISE, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def _answers(api: httpx.Client, path: str) -> bool:
    try:
        return api.get(path).is_success
    except httpx.HTTPError:
        return False


def _until(ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end_of_patience = time.monotonic() + _STARTUP_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end_of_patience:
            raise RuntimeError(f"it did not start: {log.read_text()[-2000:]}")
        time.sleep(0.5)


# ---------------------------------------------------------------- the runs


def _queued(
    api: httpx.Client, config: StackWiseConfig, artifacts: Path, n_runs: int
) -> tuple[float, list[dict[str, Any]]]:
    """Queue runs and wait for all; return the seconds since the first was created, and Prefect's records."""
    deployment = api.get(f"/deployments/name/{_DEPLOYMENT}").raise_for_status().json()["id"]
    values = config.model_dump(mode="json")
    body = {"state": {"type": "SCHEDULED"}, "job_variables": {"command": f"{sys.executable} -m prefect.engine"}}
    began = time.monotonic()
    for name in _names(n_runs):
        named = values | {"run": values["run"] | {"name": name}}
        run = body | {"parameters": {"config": named, "artifacts": str(artifacts)}}
        api.post(f"/deployments/{deployment}/create_flow_run", json=run).raise_for_status()
    ours = {"deployment_id": {"any_": [deployment]}}  # without the subflows
    ended = {"flow_runs": {**ours, "state": {"type": {"any_": list(_ENDS)}}}}
    while (n_ended := api.post("/flow_runs/count", json=ended).json()) < n_runs:
        if time.monotonic() - began > _STARTUP_SECONDS + _SECONDS_A_RUN * n_runs:
            raise RuntimeError(f"of {n_runs} runs {n_ended} ended")
        time.sleep(1.0)
    seconds = time.monotonic() - began
    page = api.post("/flow_runs/filter", json={"flow_runs": ours, "limit": RUNS})
    return seconds, page.raise_for_status().json()


def _names(n_runs: int) -> list[str]:
    """Return a different name for each run, because live runs with the same name would share an attempt."""
    return [f"queued-{number:03d}" for number in range(n_runs)]


def _check(runs: list[dict[str, Any]], folder: Path, n_runs: int) -> None:
    """Compare Prefect's records with the attempts that the runs recorded."""
    ill = [
        f"{run['name']}, started {run['run_count']} times: {run['state_type']}, {(run['state'] or {}).get('message')}"
        for run in runs
        if not _is_well(run)
    ]
    if ill or len(runs) != n_runs:
        raise RuntimeError(f"{len(runs)} runs of {n_runs}; not well: {'; '.join(ill)[:2000] or 'none'}")
    artifacts = artifacts_at(str(folder / "artifacts")).existing()
    tried = {name: attempts(artifacts, name) for name in _names(n_runs)}
    ends = {name: [(attempt.outcome or {}).get("state") for attempt in found] for name, found in tried.items()}
    if odd := {name: states for name, states in ends.items() if states != ["done"]}:
        raise RuntimeError(f"each run has to have one attempt, that was done: {odd}")
    if locked := [log.name for log in folder.glob("*.log") if _LOCKED in log.read_text()]:
        raise RuntimeError(f"{_LOCKED}: {', '.join(locked)}")


def _is_well(run: Mapping[str, Any]) -> bool:
    return run["state_type"] == "COMPLETED" and run["run_count"] == 1
