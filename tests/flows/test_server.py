"""`stackwise train` with Prefect behind it: its own server or another one, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flows import server
from flows.cli.main import main
from flows.server import EmbeddedServer, ServerError, check_api, embedded_server, quiet_prefect
from stackwise_core.errors import ConfigError
from support.fake_api import fake_api
from support.processes import processes_with, wait_until_gone
from support.runs import digests, folder_of, manifests, tiny, tiny_values, write_corpus

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]
TWO = {"training.progressive.target_stacks": 2}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = tiny_values(write_corpus(tmp_path / "corpus.txt"))
    values["training"]["progressive"]["target_stacks"] = 2
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Train:
    """`stackwise train` as a process of its own."""

    def __init__(self, config: Path, home: Path, failpoint: str = "", **environment: str) -> None:
        self.home = home
        env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        env |= {"PREFECT_HOME": str(home), "COLUMNS": "120", **environment}
        if failpoint:
            env["STACKWISE_FAILPOINT"] = failpoint
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from flows.cli.main import main; sys.exit(main())",
                "train",
                config.name,
            ],
            cwd=config.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def wait_until_stopped(self) -> None:
        """Wait until it has stopped itself at a failpoint."""
        status = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert status is not None
        assert status.si_status == signal.SIGSTOP, self.process.communicate()

    def processes(self) -> list[int]:
        """Return every process that lives with this home, by the environment that it was started with."""
        return processes_with(f"PREFECT_HOME={self.home}")


# ---------------------------------------------------------------- which server


_NO_URL = "the URL of Prefect's API is expected, such as"


@pytest.mark.parametrize(
    ("url", "fault"),
    [("http://127.0.0.1:9/api", "it does not answer ("), ("nonsense", _NO_URL), ("http://[half/api", _NO_URL)],
)
def test_an_api_that_does_not_answer(
    url: str, fault: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180")
    assert main(["train", config.name]) == 2
    assert os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"  # as often as the automation expects them
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"stackwise: PREFECT_API_URL: got '{url}'; {fault}")
    assert err.count("\n") == 1


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "true")
    quiet_prefect()
    assert os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "INFO"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "1"
    monkeypatch.delenv("DO_NOT_TRACK")


def test_a_server_that_does_not_start_is_an_error_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_STARTUP_SECONDS", 0.0)
    never = EmbeddedServer(9, tmp_path / "server.log")
    monkeypatch.setattr(never.ready, "wait", lambda seconds: False)
    with pytest.raises(ServerError, match=f"did not start .* see {tmp_path}/server.log") as error:
        never.wait_until_ready()
    assert error.value.exit_code == 1
    never.stop()  # harmless: it never began


def test_a_server_that_ends_while_it_starts_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with embedded_server(tmp_path / "server.log") as server, pytest.raises(ServerError) as error:
        server.wait_until_ready()
    home = f"(its PREFECT_HOME is {tmp_path / 'home'})"
    assert "did not start: sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) unable to open" in str(
        error.value
    )
    assert str(error.value).endswith(f"{home}; see {tmp_path / 'server.log'}")
    assert error.value.exit_code == 1


def _unknown() -> Exception:
    from prefect.exceptions import ObjectNotFound

    return ObjectNotFound(http_exc=_refused())


def _refused() -> Exception:
    """What Prefect's client raises when its server answers with an error."""
    from prefect.exceptions import PrefectHTTPStatusError

    response = httpx.Response(500, request=httpx.Request("POST", "http://there/api/flow_runs"), json={})
    try:
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        return PrefectHTTPStatusError.from_httpx_error(error)
    raise AssertionError


def _broken() -> Exception:
    return httpx.ReadError("reset by peer")


_SEEN = {
    _refused: "it answered: Server error '500 Internal Server Error'",
    _broken: "broke: reset by peer",
    _unknown: "it does not know the run any more: its database was replaced, or the run deleted",
}


@pytest.mark.flow
@pytest.mark.parametrize("raised", [_refused, _broken, _unknown])
@pytest.mark.parametrize(
    ("status", "says"),
    [
        (0, "it does not answer ([Errno 111] Connection refused); start it with"),
        (507, "it is unhealthy (HTTP 507); its log says why: a full disk"),
        (200, _SEEN),
    ],
)
def test_a_server_that_fails_during_a_run_is_told_in_one_message(
    raised: Callable[[], Exception], status: int, says: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import train_rack

    def fails(*arguments: Any) -> None:
        raise raised()

    monkeypatch.setattr(train_rack, "train_rack", fails)
    with fake_api() as api:
        api.status = status
        monkeypatch.setenv("PREFECT_API_URL", api.url if status else "http://127.0.0.1:9/api")
        expected = says if isinstance(says, str) else says[raised]
        with pytest.raises(ServerError, match=re.escape(expected)) as error:
            train_rack.run_to_the_end(tiny(tmp_path), str(tmp_path / "artifacts"), -1, "")
    assert str(error.value).count("\n") == 0
    assert "what was sealed is kept" in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.flow
def test_the_shared_server_answers(prefect_api: str) -> None:
    check_api(prefect_api)
    with pytest.raises(ConfigError):
        check_api(prefect_api.replace("/api", "/nothing"))


# ---------------------------------------------------------------- the whole way


@pytest.fixture
def here(config: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process, on the shared server."""
    monkeypatch.chdir(config.parent)
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["train", config.name, *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.mark.slow
@pytest.mark.flow
def test_killed_with_its_own_server_stopped_on_another_done_on_a_third_try(
    config: Path, tmp_path: Path, prefect_api: str, here: Any, reference: Reference
) -> None:
    """One command, three times: SIGKILL takes its server along, SIGTERM ends it with a line, then it is done."""
    home = _home_with_tables(tmp_path / "home")
    first = Train(config, home, "train:6:STOP")
    first.wait_until_stopped()
    others = [pid for pid in first.processes() if pid != first.process.pid]
    assert any(b"prefect.server.api.server" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in others)
    first.process.kill()
    assert first.ended()[0] == -signal.SIGKILL
    for pid in others:
        wait_until_gone(pid)
    assert first.processes() == []

    second = Train(config, tmp_path / "other-home", "train:9:TERM", PREFECT_API_URL=prefect_api)
    code, out, err = second.ended()
    assert (code, out, "Traceback" in err) == (1, "", False), err
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in err.splitlines()]
    assert "stage 0 goes on from its checkpoint at step 4" in lines
    assert "stopping at the next safe point; once more to stop at once" in lines
    assert lines[-1] == "stackwise: stopped on request after step 9 of 12; run the same command to go on"
    assert not (tmp_path / "other-home/prefect.db").exists()  # no server of its own

    code, out, err = here()
    assert code == 0, err
    assert "stage 0 goes on from its checkpoint at step 9" in err
    assert "stage 1: step 12/12, loss " in err
    assert "tiny is done: 2 stacks" in out
    assert digests(tmp_path / "artifacts") == digests(reference(TWO))
    states = _states_of_runs("grow tiny to 2 stacks", str(tmp_path))
    assert sorted(map(str, states)) == ["Cancelled", "Completed"]


def _home_with_tables(home: Path) -> Path:
    """Return a PREFECT_HOME whose database is made already: a copy of the session's, which took a server seconds."""
    home.mkdir()
    with (
        contextlib.closing(sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")) as made,
        contextlib.closing(sqlite3.connect(home / "prefect.db")) as copy,
    ):
        made.backup(copy)
    return home


def _states_of_runs(name: str, root: str) -> list[str | None]:
    """Return the states of the runs of that name whose artifacts lie below a folder, as the API has them."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    return [run.state_name for run in runs if run.name == name and str(run.parameters["artifacts"]).startswith(root)]


@pytest.mark.flow
def test_exit_codes_come_through_the_flow(here: Any, tmp_path: Path, reference: Reference) -> None:
    code, out, err = here("--set", "training.learning_rate=1e30", "--set", "run.name=hot")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("stackwise: stage 0: step 2: loss ")

    code, out, err = here("--set", "cache.max_gb=0.000001", "--set", "run.name=small")
    assert code == 2
    assert err.splitlines()[-1].startswith("stackwise: cache.max_gb: got 1e-06; the largest store of this run needs")

    wide = ("--set", "training.batch_size=9999", "--set", "data.max_sequences=0", "--set", "run.name=wide")
    code, out, err = here(*wide)
    assert code == 2
    assert "training.batch_size: got 9999; the corpus gives only " in err.splitlines()[-1]

    code, out, err = here()
    assert code == 0, err
    assert "tiny is done: 2 stacks" in out
    root = tmp_path / "artifacts"
    assert {name: digests(root)[name] for name in digests(reference(TWO))} == digests(reference(TWO))

    shard = folder_of(root, "activations", 0) / "store.zarr/activations/c.0.0.0"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    shutil.rmtree(folder_of(root, "stack", 1))
    code, out, err = here()
    assert code == 3
    assert err.splitlines()[-1].startswith(f"stackwise: {shard}: ")
    assert manifests(root)[folder_of(root, "activations", 0).name]  # it is left for a person to see
