"""The services of docker/compose.yaml as plain processes, with its commands, environment and health checks.

Names and paths of containers are replaced by those of this machine, and nothing else: what an image would hold is
copied together by the Dockerfile's own COPY lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.postgres import end, free_port, postgres, programs
from support.compose import ROOT, copied, environment_of, instructions, read
from support.runs import tiny

pytestmark = [pytest.mark.slow, pytest.mark.flow]

VARIABLES = {"POSTGRES_PASSWORD": "f00ba4"}
_PATIENCE_SECONDS = 900
_STACKWISE = "import sys; from flows.cli.main import main; sys.exit(main())"


class Host:
    """One machine on which all containers are processes."""

    def __init__(self, folder: Path, database_port: int) -> None:
        self.folder, self.image, self.data = folder, folder / "image", folder / "data"
        self.services = read("compose.yaml", VARIABLES)["services"]
        self.ports = {"5432": database_port, "4200": free_port(), "8080": free_port()}
        self.data.mkdir()
        for sources, target in copied():
            for source in sources:
                there = self.image / target / (source if len(sources) > 1 else "")
                _copy(ROOT / source, there)
        deployments = self.image / "prefect.yaml"
        deployments.write_text(self.here(deployments.read_text()))

    def here(self, text: str) -> str:
        """Put this machine's addresses and paths in the place of the containers'."""
        for service in self.services:
            text = text.replace(f"@{service}:", "@127.0.0.1:").replace(f"//{service}:", "//127.0.0.1:")
        for port, ours in self.ports.items():
            text = text.replace(f":{port}", f":{ours}")
        text = text.replace("/data/", f"{self.data}/").replace("directory: /work", f"directory: {self.image}")
        return text.replace("/home/stackwise", str(self.folder))

    def environment(self, service: str) -> dict[str, str]:
        """Return what a container would have: the image's environment, the service's, and no more of ours."""
        (image,) = [arguments for instruction, arguments in instructions() if instruction == "ENV"]
        given = dict(pair.split("=", 1) for pair in shlex.split(image))
        given |= environment_of(self.services[service], VARIABLES)
        given = {name: self.here(value) for name, value in given.items()}
        if "PREFECT_WORKER_WEBSERVER_PORT" in given:
            given["PREFECT_WORKER_WEBSERVER_PORT"] = str(self.ports["8080"])
        outside = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(self.image)}
        return given | outside | {"OMP_NUM_THREADS": "1"}

    def stackwise(self, service: str, *arguments: str) -> dict[str, Any]:
        """Return what starts the entry point of a service, as arguments of subprocess.Popen."""
        return {
            "args": [sys.executable, "-c", _STACKWISE, *arguments],
            "env": self.environment(service),
            "cwd": self.here(self.services[service].get("working_dir", str(self.image)) + "/"),
            "stdin": subprocess.DEVNULL,
        }

    @contextlib.contextmanager
    def started(self, service: str, *more: str) -> Generator[None]:
        """Start a service, and give it when its health check passes."""
        log = self.folder / f"{service}.log"
        with log.open("wb") as output:
            how = self.stackwise(service, *self.services[service]["command"], *more)
            process = subprocess.Popen(**how, stdout=output, stderr=output, start_new_session=True)
        try:
            until = time.monotonic() + _PATIENCE_SECONDS
            while not self.is_healthy(service):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
            yield
        finally:
            end(process)

    def is_healthy(self, service: str) -> bool:
        """Run the service's own health check."""
        kind, program, *arguments = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        found = {"python": sys.executable, "pg_isready": str((programs() or Path()) / "pg_isready")}[program]
        command = [found, *(self.here(argument) for argument in arguments)]
        environment = {"PATH": os.environ["PATH"], "PGPORT": str(self.ports["5432"])}
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    def command(self, *arguments: str) -> str:
        """Run the command line's container with arguments; it succeeds. Returns its output."""
        how = self.stackwise("cli", *arguments)
        if arguments[0] == "prefect":
            how["args"] = [sys.executable, "-m", *arguments]
        done = subprocess.run(**how, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@pytest.mark.skipif(programs() is None, reason="Postgres is not installed; apt-get install postgresql")
def test_the_services_seal_a_run(tmp_path: Path) -> None:
    named = read("compose.yaml", VARIABLES)["services"]["postgres"]["environment"]
    with postgres(named["POSTGRES_USER"], named["POSTGRES_PASSWORD"], named["POSTGRES_DB"]) as port:
        host = Host(tmp_path, port)
        assert host.is_healthy("postgres")
        assert not host.is_healthy("server")
        with host.started("server", "--port", str(host.ports["4200"])):
            assert not host.is_healthy("worker")
            with host.started("worker"):
                config = tiny(tmp_path, {"training.progressive.target_stacks": 1})
                parameters = json.dumps({"config": config.model_dump(mode="json")})
                start = ("prefect", "deployment", "run", "train-rack/docker", "--params", parameters)
                host.command(*start, "--watch", "--watch-interval", "1")
                status = json.loads(host.command("status", "--json"))
                assert [(run["name"], run["state"]) for run in status["runs"]] == [("tiny", "done")]
                assert "all as sealed: 5 artifacts" in host.command("verify")
    assert (host.data / "artifacts" / "prefect").is_dir()  # results lie beside the artifacts
    assert not list(tmp_path.rglob("prefect.db"))  # nothing fell back to SQLite
