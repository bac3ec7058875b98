"""The services of docker/compose.yaml: as plain processes, and from the image as it is built."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Generator
from pathlib import Path

import pytest

from benchmarks.postgres import postgres, programs
from stackwise_core.config import StackWiseConfig
from support.compose import ROOT, instructions, read
from support.operating import until
from support.processes import processes_with
from support.runs import tiny
from support.services import VARIABLES, Containers, Host

pytestmark = [pytest.mark.slow, pytest.mark.flow]

_NO_POSTGRES = pytest.mark.skipif(programs() is None, reason="Postgres is not installed; apt-get install postgresql")


@contextlib.contextmanager
def database() -> Generator[int]:
    """Start Postgres with the names of the compose file; return its port."""
    named = read("compose.yaml", VARIABLES)["services"]["postgres"]["environment"]
    with postgres(named["POSTGRES_USER"], named["POSTGRES_PASSWORD"], named["POSTGRES_DB"]) as port:
        yield port


@_NO_POSTGRES
def test_the_services_seal_a_run(tmp_path: Path) -> None:
    with database() as port:
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


# ---------------------------------------------------------------- the image


def why_no_image() -> str:
    """Return why no image can be built here, '' if one can; docs/docker.md says how to get there."""
    if shutil.which("buildah") is None:
        return "buildah is not installed"
    base = dict(instructions())["FROM"]
    known = subprocess.run(["buildah", "inspect", "--type", "image", base], capture_output=True).returncode == 0
    return "" if known else f"{base} is not on this machine"


@_NO_POSTGRES
@pytest.mark.skipif(bool(why_no_image()), reason=why_no_image())
def test_the_image_trains_is_killed_and_goes_on(tmp_path: Path) -> None:
    changes = {"training.steps_per_stack": 20, "training.progressive.target_stacks": 2, "data.max_sequences": 100}
    config = StackWiseConfig.from_yaml(ROOT / "configs/quickstart.yaml", changes)
    with database() as port, contextlib.ExitStack() as ending:
        host = Containers(tmp_path, port)
        ending.callback(host.remove_image)
        assert host.output("id", "-u") == "1000"
        assert host.output("sh", "-c", "touch /work/here || touch /work/flows/here || echo refused") == "refused"
        (host.data / "quickstart.yaml").write_text(config.to_yaml())
        with host.started("server", "--port", str(host.ports["4200"])):
            with urllib.request.urlopen(f"http://127.0.0.1:{host.ports['4200']}/", timeout=60) as page:
                assert b"<!doctype html" in page.read().lower()
            with host.started("worker"):
                parameters = json.dumps({"config": config.model_dump(mode="json")})
                host.command("prefect", "deployment", "run", "train-rack/docker", "--params", parameters)
                until(lambda: state_of(host) == ("running", 1), "first stage")
                for pid in processes_with(host.mark_of("worker")):  # its container dies, and the run with it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                until(lambda: state_of(host) == ("killed", 1), "killed run")
            with host.started("worker"):
                said = host.command("train", "/data/quickstart.yaml")
                assert "quickstart is done: 2 stacks" in said
                assert state_of(host) == ("done", 2)
                assert "all as sealed" in host.command("verify")
    owners = {path.stat().st_uid for path in (host.data / "artifacts").rglob("*")}
    assert owners == {1000}
    assert not list(host.data.rglob("prefect.db"))  # nothing fell back to SQLite


def state_of(host: Host) -> tuple[str, int] | None:
    """Return the state of the only run, and how many of its stages are done."""
    runs = json.loads(host.command("status", "--json"))["runs"] if (host.data / "artifacts/runs").is_dir() else []
    return (runs[0]["state"], runs[0]["stages_done"]) if runs else None
