"""The services of docker/compose.yaml on this machine: as plain processes, or in containers of the built image.

Commands, environment and health checks are those of the file. Names and paths of containers are replaced by those of
this machine, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from benchmarks.postgres import end, free_port, programs
from support.compose import ROOT, copied, environment_of, instructions, read

VARIABLES = {"POSTGRES_PASSWORD": "f00ba4"}
_PATIENCE_SECONDS = 900
_STACKWISE = "import sys; from flows.cli.main import main; sys.exit(main())"


class Host:
    """One machine on which all containers are processes; what an image would hold is copied by the COPY lines."""

    def __init__(self, folder: Path, database_port: int) -> None:
        self.folder, self.image, self.data = folder, folder / "image", folder / "data"
        self.services = read("compose.yaml", VARIABLES)["services"]
        self.ports = {"5432": database_port, "4200": free_port(), "8080": free_port()}
        self.data.mkdir()
        self.make_image()

    def make_image(self) -> None:
        """Copy together what an image would hold."""
        for sources, target in copied():
            for source in sources:
                there = self.image / target / (source if len(sources) > 1 else "")
                _copy(ROOT / source, there)
        deployments = self.image / "prefect.yaml"
        deployments.write_text(self.here(deployments.read_text()))

    def here(self, text: str) -> str:
        """Put this machine's addresses and paths in the place of the containers'."""
        text = self.addressed(text)
        text = text.replace("/data/", f"{self.data}/").replace("directory: /work", f"directory: {self.image}")
        return text.replace("/home/stackwise", str(self.folder))

    def addressed(self, text: str) -> str:
        """Put this machine's addresses in the place of the containers'."""
        for service in self.services:
            text = text.replace(f"@{service}:", "@127.0.0.1:").replace(f"//{service}:", "//127.0.0.1:")
        for port, ours in self.ports.items():
            text = text.replace(f":{port}", f":{ours}")
        return text

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
        program = ["-m"] if arguments[0] == "prefect" else ["-c", _STACKWISE]
        return {
            "args": [sys.executable, *program, *arguments],
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
            process = subprocess.Popen[bytes](**how, stdout=output, stderr=output, start_new_session=True)
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
        done = subprocess.run(**how, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


class Containers(Host):
    """One machine on which each service runs in a container of the built image, on the network of the machine.

    There is no engine: buildah runs programs in the image's file system, as its user, with the volume mounted.
    """

    def make_image(self) -> None:
        """Build the image, and fill the volume as an engine does: with what the image has at its place."""
        options = shlex.split(os.environ.get("STACKWISE_BUILD_OPTIONS", ""))
        build = ["buildah", "build", "--isolation", "chroot", "--format", "docker", "--network", "host", "--pull-never"]
        self.image_id = _output([*build, *options, "-f", str(ROOT / "docker/Dockerfile"), "--quiet", str(ROOT)])
        self.container = _output(["buildah", "from", "--pull-never", self.image_id])
        _output(self.within("cp", "-a", "/data/.", "/copied", user="0", volume="/copied"))

    def remove_image(self) -> None:
        """Remove container and image; layers that others share stay."""
        _output(["buildah", "rm", self.container])
        _output(["buildah", "rmi", self.image_id])

    def within(self, *command: str, user: str = "1000", volume: str = "/data", **environment: str) -> list[str]:
        """Return the command that runs another in the container."""
        how = ["buildah", "run", "--isolation", "chroot", "--network", "host", "--user", user]
        how += [option for name, value in environment.items() for option in ("--env", f"{name}={value}")]
        return [*how, "--volume", f"{self.data}:{volume}", self.container, "--", *command]

    def environment(self, service: str) -> dict[str, str]:
        """Return what Compose would set; the rest is in the image."""
        given = {
            name: self.addressed(value) for name, value in environment_of(self.services[service], VARIABLES).items()
        }
        if "PREFECT_WORKER_WEBSERVER_PORT" in given:
            given["PREFECT_WORKER_WEBSERVER_PORT"] = str(self.ports["8080"])
        name, _, value = self.mark_of(service).partition("=")
        return given | {"OMP_NUM_THREADS": "1", name: value}

    def mark_of(self, service: str) -> str:
        """Return a variable that all processes in the containers of a service have, and no others."""
        return f"STACKWISE_TEST_SERVICE={service} of {self.image_id[:12]}"

    def output(self, *command: str) -> str:
        """Run a command in the container, and return its output."""
        return _output(self.within(*command))

    def stackwise(self, service: str, *arguments: str) -> dict[str, Any]:
        """Return what starts the entry point of a service, as arguments of subprocess.Popen."""
        program = [] if arguments[0] == "prefect" else ["stackwise"]
        command = self.within(*program, *arguments, **self.environment(service))
        where = self.services[service].get("working_dir", "/work")
        return {"args": [*command[:2], "--workingdir", where, *command[2:]], "stdin": subprocess.DEVNULL}


def _output(command: list[str]) -> str:
    """Run a command, which succeeds, and return its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()
