"""Fixtures and hooks of all tests.

Prefect is never imported here: the tests that need it are marked `flow` and share one server.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support.commands import Result, Run
from support.processes import MARK, kill_leftovers
from support.runs import grown, tiny

# How long a draw takes says how busy the machine is, nothing of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the mark of its session
    os.environ[MARK] = uuid.uuid4().hex

_PREFECT_HOME = tempfile.mkdtemp(prefix="stackwise-prefect-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME  # read when prefect is first imported: the user's own stays untouched
os.environ.pop("PREFECT_API_URL", None)
os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"  # Prefect must not start a server that no test asked for
# Read when torch is first imported: threads that wait must not spin while other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported: a test asks no hub


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Replace the scheduler of `--dist loadfile`."""
    if config.getoption("dist") != "loadfile":
        return None
    from support.scheduling import OneServerScheduling

    return OneServerScheduling(config, log)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name no test by bytes: a compressed file holds the time of day, and two workers must collect the same names."""
    return "bytes" if isinstance(val, bytes) else None


_LEFT_BEHIND = pytest.StashKey[list[str]]()


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, those of a site: another process does the rest."""
    items.sort(key=lambda item: "site" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(trylast=True)  # when the fixtures of the session and the workers have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that leaves processes behind, and kill them."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (left := kill_leftovers()):
        session.config.stash[_LEFT_BEHIND] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with the processes left behind, and the table of what was killed, how it recovered and what came of it."""
    if left := terminalreporter.config.stash.get(_LEFT_BEHIND, []):
        terminalreporter.section("processes left behind")
        for line in left:
            terminalreporter.line(line, red=True)
    properties = [entry for report in terminalreporter.getreports("passed") for entry in report.user_properties]
    if rows := [row for name, row in properties if name == "kill"]:
        terminalreporter.section("kills and recoveries")
        head = ["killed", "recovered by", "Prefect showed", "reused", "until further", "same bits"]
        for row in (head, ["---"] * len(head), *rows):
            terminalreporter.line(f"| {' | '.join(row)} |")


@pytest.fixture
def one_thread() -> Generator[None]:
    """Let torch use one thread: tensors this small gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_disk() -> Generator[None]:
    """Leave out fsync, which only a power cut would tell from doing it: a run is three times as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Callable[..., Path]:
    """Give the artifacts of an undisturbed run of a configuration: made once, to be compared with, not changed."""
    made: dict[str, Path] = {}

    def of(changes: dict[str, Any] | None = None) -> Path:
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            grown(tiny(folder, changes), folder / "artifacts")
            made[key] = folder / "artifacts"
        return made[key]

    return of


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Start the one Prefect server of the session and return its API."""
    from flows.server import embedded_server, quiet_prefect

    before = dict(os.environ)
    quiet_prefect()
    try:
        with embedded_server(tmp_path_factory.mktemp("server") / "server.log") as server:
            from prefect.context import refresh_global_settings_context  # imported while the server starts

            refresh_global_settings_context()  # a test module may have imported prefect before there was an API
            server.wait_until_ready()
            yield server.url
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """Start the session's one site: a server and a worker as an operator runs them, the deployments applied."""
    from support.operating import operating

    with operating(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="session")
def s3_server() -> Generator[Any]:
    """Start the one S3-speaking server of the session."""
    from support.s3_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give an empty place in an object store, with the environment that leads there."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket()


# ---------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        from flows.cli.main import main

        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run
