"""A temporary Postgres for a benchmark or a test: a new cluster in a temporary folder, on a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path


def programs() -> Path | None:
    """Return the folder with the programs of the newest installed Postgres; None if it is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")  # Debian does not put them on the PATH
    return max((path.parent for path in debian), key=lambda bin: int(bin.parent.name), default=None)


def free_port() -> int:
    """Return an unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def postgres(user: str, password: str, database: str) -> Generator[int]:
    """Start Postgres with one user and one database; yield its port on 127.0.0.1.

    Raises:
        RuntimeError: it is not installed.
    """
    folder_of_programs = programs()
    if folder_of_programs is None:
        raise RuntimeError("Postgres is not installed; apt-get install postgresql")
    owner = "postgres" if os.geteuid() == 0 else None  # Postgres refuses to run as root
    with tempfile.TemporaryDirectory(prefix="stackwise-postgres-") as name:
        folder = Path(name)
        secret = folder / "password"
        secret.write_text(password)
        if owner:
            shutil.chown(folder, owner)
            shutil.chown(secret, owner)
        make = ["initdb", "--pgdata", str(folder / "data"), "--username", user, "--pwfile", str(secret)]
        _run(folder_of_programs, [*make, "--auth", "scram-sha-256", "--encoding", "UTF8"], owner)
        port = free_port()
        with _serving(folder_of_programs, folder, port, owner):
            where = ["--host", "127.0.0.1", "--port", str(port), "--username", user]
            _run(folder_of_programs, ["createdb", *where, database], None, {"PGPASSWORD": password})
            yield port


@contextlib.contextmanager
def _serving(folder_of_programs: Path, folder: Path, port: int, owner: str | None) -> Generator[None]:
    """Serve the cluster in `folder`; at the end shut it down without waiting for clients."""
    control = ["pg_ctl", "--pgdata", str(folder / "data"), "--wait"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    _run(folder_of_programs, [*control, "--log", str(folder / "log"), "--options", options, "start"], owner)
    try:
        yield
    finally:
        _run(folder_of_programs, [*control, "--mode", "immediate", "stop"], owner)


def _run(
    folder_of_programs: Path, command: list[str], owner: str | None, environment: Mapping[str, str] | None = None
) -> None:
    done = subprocess.run(
        [str(folder_of_programs / command[0]), *command[1:]],
        env={**os.environ, **(environment or {})},
        cwd="/",
        user=owner,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if command[-1] != "start" else subprocess.DEVNULL,  # the server would keep it open
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or '')[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all processes of that session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
