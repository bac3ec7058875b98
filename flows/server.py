"""An embedded Prefect server: starts while prefect is imported, and ends with this process however that ends."""

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

from flows.api import ServerError
from flows.run.children import ending_with_us

_STARTUP_SECONDS = 180.0
"""The first start creates the database and registers blocks, which took over a minute on a slow disk."""


def quiet_prefect() -> None:
    """Set variables that prefect reads on import: no console log, because we have our own display, and no telemetry.

    Its logs still go to its API. Variables that the user has set are kept.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


@contextlib.contextmanager
def embedded_server(log: Path) -> Generator[EmbeddedServer]:
    """Run Prefect's server in the background while the block runs.

    Sets PREFECT_API_URL at once, before prefect is imported; `wait_until_ready` waits until it answers.

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
        """Choose the port; `run` starts the server."""
        self.url, self.port, self.log = f"http://127.0.0.1:{port}/api", port, log
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.stopping = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the server and watch it. If this thread ended, the kernel would end the server."""
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        environment = {**os.environ, "PREFECT__SERVER_FINAL": "1", "PREFECT_SERVER_UI_ENABLED": "true"}
        environment["PREFECT_UI_API_URL"] = self.url  # otherwise its pages call port 4200
        environment["PREFECT_LOGGING_INTERNAL_LEVEL"] = "ERROR"  # this process may have set a lower one
        environment.pop("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", None)
        environment.pop("PREFECT_API_URL")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
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
            if self.ready.is_set() or not is_healthy(self.url, timeout=1.0):
                time.sleep(0.1)
            else:
                self.ready.set()
        if not self.stopping.is_set():
            self._ended_early()

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended, or did not answer in time; names its log.
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
        """Stop the run at a safe point, because Prefect would wait for its server for minutes."""
        self.ended.set()
        if not self.ready.is_set():
            return  # no run has started; `wait_until_ready` raises
        print(f"Prefect's embedded server ended unexpectedly; see {self.log}", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.stopping.wait(20.0):
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
    return [*(lines or ["it said nothing"]), *errors][-1]


def is_healthy(url: str, timeout: float) -> bool:
    """Return whether an API answers within the timeout that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout) as answer:
            return answer.read() == b"true"
    except (OSError, ValueError, urllib.error.URLError):
        return False
