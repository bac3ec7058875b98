"""Prefect's server, embedded: started beside the first imports, gone with this process however it ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path

from flows.api import fault_of, shown
from flows.run.children import ending_with_us
from stackwise_core.errors import ConfigError, Fault, StackWiseError

_STARTUP_SECONDS = 180.0
"""A first start creates the database and registers blocks: over a minute was seen on a slow disk."""


class ServerError(StackWiseError):
    """Prefect's server did not start, ended early, or failed while a run used it."""


def quiet_prefect() -> None:
    """Set what must be set before prefect is imported: our own display instead of its log lines, no telemetry.

    Its logs still go to its API; a variable that the user has set stays.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def check_api(url: str, received: str = "") -> None:
    """Make sure that the API of PREFECT_API_URL answers, is Prefect's and of a version that serves us.

    Args:
        url: of the API.
        received: what the variable holds, for the message; by default the URL.

    Raises:
        ConfigError: it does not, or is not.
    """
    if fault := fault_of(url):
        raise ConfigError([Fault("PREFECT_API_URL", received or repr(shown(url)), fault)])


def lost_server(seen: str) -> ServerError:
    """Return what to say of a server that no longer serves a run.

    Args:
        seen: what the run saw of it; told where nothing is wrong with the server when it is asked now.
    """
    url = os.environ.get("PREFECT_API_URL", "")
    return ServerError(
        f"Prefect's server {shown(url)} failed during the run: {fault_of(url) or seen}; what was sealed is kept, and "
        "once the server is well the same command goes on"
    )


@contextlib.contextmanager
def embedded_server(log: Path) -> Generator[EmbeddedServer]:
    """Start Prefect's server in the background for as long as the block runs.

    PREFECT_API_URL is set at once, before prefect is imported; `wait_until_ready` says when it answers.

    Args:
        log: where its output goes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedServer(port, log)
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
        """Name the port; `run` starts it."""
        self.url, self.port, self.log = f"http://127.0.0.1:{port}/api", port, log
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.stopping = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the server and stay with it: if this thread ended, the kernel would end the server."""
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        environment = {**os.environ, "PREFECT__SERVER_FINAL": "1", "PREFECT_SERVER_UI_ENABLED": "true"}
        environment["PREFECT_UI_API_URL"] = self.url  # else its pages ask port 4200
        environment["PREFECT_LOGGING_INTERNAL_LEVEL"] = "ERROR"  # of this process it may be less
        environment.pop("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", None)
        environment.pop("PREFECT_API_URL")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for us, and we need the server to record how the run ended.
            self.process = subprocess.Popen(
                ending_with_us(command, signal.SIGTERM),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while self.process.poll() is None and not self.stopping.is_set():
            if self.ready.is_set() or not is_healthy(self.url, timeout=1.0):
                time.sleep(0.1)
            else:
                self.ready.set()
        if not self.stopping.is_set():
            self._ended_early()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended, or did not answer in time; its log is named.
        """
        end = time.monotonic() + _STARTUP_SECONDS
        while not self.ready.wait(0.1):
            if self.ended.is_set():
                home = os.environ.get("PREFECT_HOME", "~/.prefect")
                why = f"{_last_error(self.log)} (its PREFECT_HOME is {home})"
                raise ServerError(f"Prefect's embedded server did not start: {why}; see {self.log}")
            if time.monotonic() > end:
                seconds = f"{_STARTUP_SECONDS:.0f} s"
                raise ServerError(f"Prefect's embedded server did not start within {seconds}; see {self.log}")

    def _ended_early(self) -> None:
        """Stop the run at a safe point: without its server, Prefect would wait for minutes."""
        self.ended.set()
        if not self.ready.is_set():
            return  # no run has begun: who waits for the server is told
        print(f"Prefect's embedded server ended unexpectedly; see {self.log}", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.stopping.wait(20.0):
            os._exit(1)

    def stop(self) -> None:
        """End the server; again is harmless."""
        self.stopping.set()
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _last_error(log: Path) -> str:
    """Return the last exception of a log, or else what it says last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return [*(lines or ["it said nothing"]), *errors][-1]


def is_healthy(url: str, timeout: float) -> bool:
    """Say whether an API answers that it is well, within some seconds."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout) as answer:
            return answer.read() == b"true"
    except (OSError, ValueError, urllib.error.URLError):
        return False
