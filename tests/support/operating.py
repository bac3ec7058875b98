"""A site to operate: Prefect's real server and a worker, processes that tests start, ask, kill and start again.

All that a site starts carries its PREFECT_HOME in the environment: by that mark what is left is found and ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx

from support.processes import processes_with

REPOSITORY = Path(__file__).parents[2]
POOL = "stackwise"
TERMINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

_COPIED = (
    "flow_id",
    "entrypoint",
    "path",
    "pull_steps",
    "parameter_openapi_schema",
    "work_pool_name",
    "work_queue_name",
    "enforce_parameter_schema",
    "description",
)
"""What two deployments of one flow have in common."""

_PATIENCE = 600.0
"""Seconds until a wait fails: a first start of a server takes over a minute on a slow disk, several on a busy one."""


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(ask: Callable[[], Any], what: str, seconds: float = _PATIENCE) -> Any:
    """Ask until the answer is neither None nor False, and return it: other processes tell nothing of themselves."""
    end = time.monotonic() + seconds
    while (answer := ask()) is None or answer is False:
        assert time.monotonic() < end, f"after {seconds:.0f} s still no {what}"
        time.sleep(0.05)
    return answer


class Site:
    """A server, a worker on the pool, deployments and runs, all in one folder."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", **environment: str) -> None:
        """Name everything; nothing is started yet. The server listens at the address."""
        self.folder, self.home, self.address = folder, folder / "home", address
        self.home.mkdir(parents=True)
        self.port = free_port()
        self.pages = f"http://{address}:{self.port}"
        self.api = f"{self.pages}/api"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = inherited | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api,
            "PREFECT_UI_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(REPOSITORY),  # this working copy, wherever else one is installed
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.started: list[subprocess.Popen[bytes]] = []
        self.n_workers = 0
        self.client = httpx.Client(base_url=self.api, timeout=240)

    # ---------------------------------------------------------------- processes

    def _spawn(self, what: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, its output in a file of the site."""
        with (self.folder / f"{what}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start_server(self) -> None:
        """Start the server, on the database that is there or a new one; `wait_for_server` says when it answers."""
        command = ("server", "start", "--host", self.address, "--port", str(self.port))
        self.server = self._spawn("server", *_program("prefect"), *command)

    def wait_for_server(self) -> None:
        until(self._is_well, f"answer of the server; see {self.folder}/server.log")

    def _is_well(self) -> bool:
        assert self.server is None or self.server.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health", timeout=30).text == "true"
        return False

    def start_worker(self, *prefix: str, **environment: str) -> None:
        """Start a worker, which makes the pool if there is none; `wait_for_worker` says when it works.

        Args:
            prefix: what stands before the command, such as that it runs on another host.
            environment: what it gets on top of the site's.
        """
        self.n_workers += 1
        command = ("worker", "start", "--pool", POOL, "--type", "process", "--name", self.worker_name, "--limit", "1")
        self.worker = self._spawn("worker", *prefix, sys.executable, "-m", "flows.program", *command, **environment)

    @property
    def worker_name(self) -> str:
        """Name of the newest worker: one that was killed stays in the server's list for a while."""
        return f"worker-{self.n_workers}"

    def wait_for_worker(self) -> None:
        until(self._works, f"worker; see {self.folder}/worker.log")

    def _works(self) -> bool:
        assert self.worker is not None
        assert self.worker.poll() is None, (self.folder / "worker.log").read_text()[-2000:]
        answer = self.client.post(f"/work_pools/{POOL}/workers/filter", json={})
        return answer.is_success and self.worker_name in [worker["name"] for worker in answer.json()]

    def revive_worker(self) -> None:
        """Start a worker if the one that was there has ended: one without a server gives up after a while."""
        assert self.worker is not None
        if self.worker.poll() is not None:
            self.start_worker()
        self.wait_for_worker()

    def n_reports(self) -> int:
        """Return how many processes that ended badly the workers have reported."""
        log = self.folder / "worker.log"
        return log.read_text().count("prefect.runner.flow_run_executor - Check") if log.exists() else 0

    def kill_server(self) -> None:
        """End the server and its children as a power cut would."""
        assert self.server is not None
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def kill_worker(self) -> None:
        """End the worker as a power cut would; the flow processes that it started live on."""
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()

    def begin(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `prefect` or `stackwise` with arguments in the site's environment, its output in `PROGRAM.log`."""
        return self._spawn(command[0], *_program(command[0]), *command[1:], **environment)

    def script(self, path: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a Python script of somebody else in the site's environment."""
        return self._spawn(path.stem, sys.executable, str(path), *arguments)

    def command(self, *command: str, **environment: str) -> str:
        """Run `prefect` or `stackwise` with arguments in the site's environment; it succeeds. Returns its stdout."""
        done = subprocess.run(
            [*_program(command[0]), *command[1:]],
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def end(self) -> None:
        """End everything that lives in this site's home."""
        self.client.close()
        for pid in processes_with(f"PREFECT_HOME={self.home}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()

    # ---------------------------------------------------------------- deployments and runs

    def register_heartbeat(self) -> None:
        """Register the automation that marks runs Crashed whose heartbeat is no longer heard."""
        self.command("stackwise", "heartbeat")

    def deploy(self) -> None:
        """Apply the repository's deployments to the server."""
        until(lambda: self.client.get(f"/work_pools/{POOL}").status_code == 200, f"work pool {POOL}")
        file = ("--prefect-file", str(REPOSITORY / "prefect.yaml"))
        # The steps that it lists run in the folder that it is applied from, as the shell calls it.
        self.command("prefect", "--no-prompt", "deploy", "--all", *file, PWD=str(REPOSITORY))

    def start(
        self,
        parameters: dict[str, Any],
        deployment: str = "train-rack/local",
        environment: dict[str, str] | None = None,
        *,
        quickly: bool = False,
    ) -> str:
        """Start a run of a deployment.

        Args:
            parameters: of the flow.
            deployment: FLOW/NAME.
            environment: what its flow process gets on top of the worker's.
            quickly: let the worker start the flow at once, not a process that first looks for the code and then
                becomes the flow: an import of Prefect less.

        Returns:
            The run's id.
        """
        found = self.get(f"/deployments/name/{deployment}")
        variables: dict[str, Any] = {"env": environment} if environment else {}
        if quickly:
            variables["command"] = f"{sys.executable} -m prefect.engine"
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}, "job_variables": variables}
        return self.post(f"/deployments/{found['id']}/create_flow_run", body)["id"]

    def copy_deployment(self, deployment: str, **changes: Any) -> str:
        """Deploy again, under another name, with other parameters or job variables; return its id."""
        body = {name: value for name, value in self.get(f"/deployments/name/{deployment}").items() if name in _COPIED}
        return self.post("/deployments/", body | changes)["id"]

    def run(self, run_id: str) -> dict[str, Any]:
        """Return a flow run as the server has it."""
        return self.get(f"/flow_runs/{run_id}")

    def wait_for(self, run_id: str, *states: str, seconds: float = _PATIENCE) -> dict[str, Any]:
        """Wait until a run is in a state of one of these types or names; by default, until it has ended."""
        wanted = {state.upper() for state in states or TERMINAL}

        def there() -> dict[str, Any] | None:
            run = self.run(run_id)
            return run if {run["state_type"], run["state_name"].upper()} & wanted else None

        return until(there, f"{' or '.join(wanted)} of run {run_id}; see {self.folder}/worker.log", seconds)

    def pid_of(self, run_id: str) -> int:
        """Return the flow process that the worker recorded for a run."""
        return int(until(lambda: self.run(run_id)["infrastructure_pid"], f"recorded pid of run {run_id}"))

    def task_runs(self, run_id: str) -> list[dict[str, Any]]:
        """Return the task runs of a flow run and of its subflows, oldest first."""
        runs = [run_id, *(child["id"] for child in self.subflows(run_id))]
        body = {"task_runs": {"flow_run_id": {"any_": runs}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.post("/task_runs/filter", body)

    def subflows(self, run_id: str) -> list[dict[str, Any]]:
        """Return the runs that a flow run started itself."""
        return self.post("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}})

    def logs(self, run_id: str) -> list[str]:
        """Return the log lines of a flow run and of its subflows."""
        runs = [run_id, *(child["id"] for child in self.subflows(run_id))]
        body = {"logs": {"flow_run_id": {"any_": runs}}, "sort": "TIMESTAMP_ASC"}
        return [entry["message"] for entry in self.post("/logs/filter", body)]

    def get(self, path: str) -> Any:
        """Ask the API."""
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Post to the API."""
        return self._ask("POST", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """Change what the API holds."""
        return self._ask("PATCH", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask again, as Prefect's own client does, while the server says that its database is locked."""
        answer = until(lambda: _unless_busy(self.client.request(method, path, json=body)), f"answer to {path}")
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def status(self, artifacts: Path, name: str) -> dict[str, Any]:
        """Return what `stackwise status NAME --json` says; its `holder` is the process that runs it."""
        return json.loads(self.command("stackwise", "status", name, "--artifacts", str(artifacts), "--json"))


def _unless_busy(answer: httpx.Response) -> httpx.Response | None:
    return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer


def _program(name: str) -> list[str]:
    """Return how a command line is called without its script, which would run whichever copy is installed."""
    return [sys.executable, "-m", "prefect"] if name == "prefect" else [sys.executable, "-c", _STACKWISE]


_STACKWISE = "import sys; from flows.cli.main import main; sys.exit(main())"


@contextlib.contextmanager
def operating(folder: Path, **environment: str) -> Generator[Site]:
    """Give a site with a server and a worker that work and all deployments applied; nothing of it is left behind."""
    site = Site(folder, **environment)
    try:
        site.start_server()
        site.wait_for_server()
        site.start_worker()
        site.deploy()
        site.patch(f"/work_pools/{POOL}", {"concurrency_limit": 1})  # one accelerator
        site.wait_for_worker()
        site.register_heartbeat()
        yield site
    finally:
        site.end()
