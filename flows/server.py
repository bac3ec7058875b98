"""Prefect's server, without importing prefect: what is wrong with one, and a server embedded in this process.

The embedded server starts while prefect is imported, and ends with this process even if that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Generator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from flows.network import ask, bypass_proxy, shown
from flows.run.children import ending_with_us
from flows.run.say import report
from stackwise_core.errors import ConfigError, Fault, StackWiseError
from storage.links import open_plain

_EXAMPLE = "such as http://127.0.0.1:4200/api"
_STARTUP_SECONDS = 180.0
"""The first start creates the database and registers blocks, which took over a minute on a slow disk."""

_QUIET_SECONDS = 30.0
_HOME = "~/.prefect"


class ServerError(StackWiseError):
    """Prefect's server did not start, ended early, or failed while a run used it."""


def check_api(url: str, received: str = "", where: str = "PREFECT_API_URL") -> None:
    """Check that PREFECT_API_URL names a compatible Prefect API that answers.

    Raises:
        ConfigError: it does not; names `where` it was given, what was `received` (by default the URL) and what to do.
    """
    with contextlib.suppress(ValueError):
        bypass_proxy(urlsplit(url).hostname or "")
    if fault := fault_of(url):
        raise ConfigError([Fault(where, received or repr(shown(url)), fault)])


def lost_server(seen: str) -> ServerError:
    """Return the error for a server that failed during a run; `seen` explains it if the server works again."""
    url = os.environ.get("PREFECT_API_URL", "")
    return ServerError(
        f"Prefect's server {shown(url)} failed during the run: {fault_of(url) or seen}; what was sealed is kept; "
        "once the server works, the same command continues the run"
    )


def fault_of(url: str) -> str:
    """Return what is wrong with an API and what to do, or '' if runs can use it."""
    if not is_url(url):
        return f"the URL of Prefect's API is expected, {_EXAMPLE}"
    if shown(url) != url:
        return "give name and password by PREFECT_API_AUTH_STRING=NAME:PASSWORD, not in the URL"
    code = ""
    try:
        if ask(url, "/health") is True:
            return _fault_of_version(str(ask(url, "/admin/version")))
    except urllib.error.HTTPError as error:
        code = f" (HTTP {error.code})"
        if error.code in (401, 403):
            return f"it denies access{code}; set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        if error.code >= 500:
            return f"it is unhealthy{code}; its log says why: a full disk, a database that is gone"
    except OSError as error:
        why = getattr(error, "reason", error)
        return f"it does not answer ({why}); start it with `stackwise server`; without it `stackwise train` embeds one"
    except (ValueError, http.client.HTTPException):
        pass  # the answer is not JSON or not HTTP
    return f"what answers is not Prefect's API{code}; its URL ends in /api, {_EXAMPLE}"


def is_url(url: str) -> bool:
    """Return whether a text is an address of http or https."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # an incomplete IPv6 address, or a port that is not a number
        return False
    return parts.scheme in ("http", "https") and named and not any(character.isspace() for character in url)


def _fault_of_version(theirs: str) -> str:
    """Return '' if the server has our major version and our minor version or a newer one, as Prefect's clients need."""
    ours = version("prefect")
    (major, minor), (our_major, our_minor) = (map(int, release.split(".")[:2]) for release in (theirs, ours))
    if major == our_major and minor >= our_minor:
        return ""
    return f"the server is Prefect {theirs}, this is {ours}; run both with one version: `pip install prefect=={ours}`"


def workers_alive(url: str, pool: str) -> list[str] | None:
    """Return the names of the online workers of a pool, or None if there is no such pool."""
    try:
        found = ask(url, f"/work_pools/{pool}/workers/filter", {})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    return sorted(worker["name"] for worker in found if worker["status"] == "ONLINE")


def is_registered(url: str, automation: str) -> bool:
    """Return whether an automation of that name exists and is enabled."""
    named = {"automations": {"name": {"any_": [automation]}}}
    return any(found["enabled"] for found in ask(url, "/automations/filter", named))


def check_home() -> None:
    """Check that the folder in which Prefect keeps its database can be written.

    Raises:
        ConfigError: it cannot, or there is no home folder to have it in.
    """
    given = os.environ.get("PREFECT_HOME", "")
    home = Path(given or _HOME)
    try:
        home = home.expanduser()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = "" if os.access(home, os.W_OK | os.X_OK) else f"{home} cannot be written"
    except OSError as error:
        problem = f"{error.filename or home}: {error.strerror}"
    except RuntimeError as error:  # no HOME, and this user has no entry in /etc/passwd
        problem = str(error)
    if problem:
        received = repr(given) if given else f"nothing, so {_HOME} is used"
        allowed = f"Prefect keeps its database there, but {problem}; set PREFECT_HOME to a folder that can be written"
        raise ConfigError([Fault("PREFECT_HOME", received, allowed)])


def quiet_prefect() -> None:
    """Turn off Prefect's telemetry and its console log, because StackWise shows progress itself.

    Prefect reads these variables on import. Its logs still go to its API; variables that the user has set are kept.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    os.environ.setdefault(*LOG_INTERVAL)
    switch_off_telemetry()


def switch_off_telemetry() -> None:
    """Let Prefect send nothing about its use to its makers, unless the user has set that."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


BATCHED = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "2",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
}
"""Settings of a server that writes states and events together, not each alone: SQLite lets one write at a time."""


LOG_INTERVAL = ("PREFECT_LOGGING_TO_API_BATCH_INTERVAL", "5")
"""Setting of what runs flows: seconds between two writes of its log."""


def place_pages() -> None:
    """Have Prefect copy its pages to PREFECT_HOME where this user cannot write into its package, as in our image.

    Otherwise the server runs without pages, and says so in its log alone.
    """
    package = find_spec("prefect")
    folder = Path(package.origin or "").parent / "server" if package else Path()
    home = Path(os.environ.get("PREFECT_HOME") or _HOME).expanduser()
    if not os.access(folder, os.W_OK) and "PREFECT_SERVER_UI_STATIC_DIRECTORY" not in os.environ:
        os.environ.setdefault("PREFECT_UI_STATIC_DIRECTORY", str(home / "pages"))


@contextlib.contextmanager
def embedded_server(log: Path) -> Generator[EmbeddedServer]:
    """Run Prefect's server in the background while the block runs; its output goes to `log`.

    Sets PREFECT_API_URL at once, before prefect is imported; `wait_until_ready` waits until the server answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedServer(port, log)
    place_pages()
    os.environ["PREFECT_API_URL"] = server.url
    threading.Thread(target=server.run, daemon=True, name="prefect-server").start()
    atexit.register(server.stop)
    try:
        yield server
    finally:
        server.stop()
        del os.environ["PREFECT_API_URL"]


class EmbeddedServer:
    """The server process and the thread that owns it."""

    def __init__(self, port: int, log: Path) -> None:
        """Choose the port; `run` starts the server."""
        self.url, self.port, self.log = f"http://127.0.0.1:{port}/api", port, log
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.stopping = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the server and watch it; the thread must stay alive, because the kernel ends the server with it."""
        command = [sys.executable, "-P", "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        environment = {**BATCHED, **os.environ, "PREFECT__SERVER_FINAL": "1", "PREFECT_SERVER_UI_ENABLED": "true"}
        environment["PREFECT_UI_API_URL"] = self.url  # otherwise its pages call port 4200
        environment["PREFECT_LOGGING_INTERNAL_LEVEL"] = "ERROR"  # this process may have set a lower one
        environment.pop("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", None)
        environment.pop("PREFECT_API_URL")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_plain(self.log, os.O_WRONLY | os.O_APPEND), "ab") as log:
            # A separate session, so that Ctrl-C reaches only this process: the server must record how the run ended.
            self.process = subprocess.Popen(
                ending_with_us(command, signal.SIGTERM),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while self.process.poll() is None and not self.stopping.is_set():
            if not self.ready.is_set():
                with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # it is still starting
                    if ask(self.url, "/health", timeout=1.0) is True:
                        self.ready.set()
            time.sleep(0.1)
        if not self.stopping.is_set():
            self._ended_early()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended or did not answer in time; names its log.
        """
        begun, told = time.monotonic(), False
        while not self.ready.wait(0.1):
            if self.ended.is_set():
                why = f"{_last_error(self.log)} (its PREFECT_HOME is {os.environ.get('PREFECT_HOME', _HOME)})"
                raise ServerError(f"Prefect's embedded server did not start: {why}; see {self.log}")
            waited = time.monotonic() - begun
            if waited > _STARTUP_SECONDS:
                within = f"within {_STARTUP_SECONDS:.0f} s"
                raise ServerError(f"Prefect's embedded server did not start {within}; see {self.log}")
            if waited > _QUIET_SECONDS and not told:
                told = True
                limit = f"waiting at most {_STARTUP_SECONDS:.0f} s"
                report(f"Prefect's embedded server is still starting; {limit}; its log is {self.log}")

    def _ended_early(self) -> None:
        """Stop the run at a safe point, because Prefect would wait for its server for minutes."""
        self.ended.set()
        if not self.ready.is_set():
            return  # no run has started; `wait_until_ready` raises
        report(f"Prefect's embedded server ended unexpectedly; see {self.log}")
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # by default it would end this process as if killed
            os.kill(os.getpid(), signal.SIGTERM)
            self.stopping.wait(20.0)
        if not self.stopping.is_set():
            os._exit(1)

    def stop(self) -> None:
        """End the server; can be called again."""
        self.stopping.set()
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _last_error(log: Path) -> str:
    """Return the last exception in a log, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return [*(lines or ["its log is empty"]), *errors][-1]
