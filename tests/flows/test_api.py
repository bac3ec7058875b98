"""What is wrong with PREFECT_API_URL, told in one message with the remedy, before prefect is imported."""

from __future__ import annotations

import base64
import importlib.metadata
import socket
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from flows.server import fault_of
from support.commands import Run
from support.fake_api import FakeApi, fake_api
from support.runs import tiny


@pytest.fixture
def api() -> Generator[FakeApi]:
    with fake_api() as served:
        yield served


def test_a_healthy_server_of_our_version_has_no_fault(api: FakeApi) -> None:
    assert fault_of(api.url) == ""
    assert fault_of(api.url + "/") == ""


NO_URLS = ["", "127.0.0.1:4200/api", "localhost", "ftp://here/api", "http:///api", "file:///etc"]
NO_URLS += ["http://here:abc/api", " http://here/api", "http://here/api\n"]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url(url: str) -> None:
    assert fault_of(url) == "the URL of Prefect's API is expected, such as http://127.0.0.1:4200/api"


def test_a_password_in_a_url_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://ada:lovelace@127.0.0.1:4200/api"
    assert "PREFECT_API_AUTH_STRING=NAME:PASSWORD" in fault_of(url)
    monkeypatch.setenv("PREFECT_API_URL", url)
    for result in (run("worker"), run("doctor")):
        assert "http://***@127.0.0.1:4200/api" in result.out + result.err
        assert "lovelace" not in result.out + result.err


def test_what_speaks_another_protocol() -> None:
    def greet() -> None:
        with server.accept()[0] as connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as server:
        greeting = threading.Thread(target=greet)
        greeting.start()
        fault = fault_of(f"http://127.0.0.1:{server.getsockname()[1]}/api")
        greeting.join()
    assert fault.startswith("what answers is not Prefect's API")


def test_nobody_answers() -> None:
    with fake_api() as gone:
        url = gone.url
    fault = fault_of(url)
    assert fault.startswith("it does not answer (")
    assert "Connection refused" in fault
    assert fault.endswith("start it with `stackwise server`; without it `stackwise train` embeds one")


def test_something_else_answers(api: FakeApi) -> None:
    assert "(HTTP 404); its URL ends in /api" in fault_of(api.url.removesuffix("/api"))  # the server, its API forgotten
    api.text = "<html>Prefect</html>"  # as its pages do, at every path that they do not know
    assert fault_of(api.url).startswith("what answers is not Prefect's API; its URL ends in /api")
    api.text = '{"status": "fine"}'
    assert fault_of(api.url).startswith("what answers is not Prefect's API; its URL ends in /api")


def test_a_server_whose_disk_is_full(api: FakeApi) -> None:
    api.status = 503
    assert fault_of(api.url) == "it is unhealthy (HTTP 503); its log says why: a full disk, a database that is gone"


def test_a_server_that_wants_a_password(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ada:lovelace")
    assert fault_of(api.url) == ""
    assert api.headers == [f"Basic {base64.b64encode(b'ada:lovelace').decode()}"] * 2
    monkeypatch.setenv("PREFECT_API_KEY", "key")
    assert fault_of(api.url) == ""
    assert api.headers[-1] == "Bearer key"
    api.status = 401
    assert fault_of(api.url).startswith("it denies access (HTTP 401); set PREFECT_API_AUTH_STRING")


@pytest.mark.parametrize(
    ("theirs", "serves"),
    [
        ("3.8.8", True),
        ("3.8.1", True),  # of a patch nothing depends
        ("3.9.0", True),
        ("3.10.2+5.gabc", True),
        ("3.7.9", False),
        ("2.20.1", False),
        ("4.0.0", False),
    ],
)
def test_a_server_of_another_version(theirs: str, serves: bool, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.server.version", lambda name: {"prefect": "3.8.8"}[name])
    api.answers["/admin/version"] = theirs
    expected = f"the server is Prefect {theirs}, this is 3.8.8; run both with one version: `pip install prefect==3.8.8`"
    assert fault_of(api.url) == ("" if serves else expected)


@pytest.mark.parametrize("command", [("train", "tiny.yaml"), ("worker",), ("heartbeat",)])
def test_commands_refuse_it_before_they_begin(
    command: tuple[str, ...], run: Run, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path).to_yaml(tmp_path / "tiny.yaml")
    api.answers["/admin/version"] = "2.0.0"
    monkeypatch.setenv("PREFECT_API_URL", api.url)
    result = run(*command)
    ours = importlib.metadata.version("prefect")
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        f"stackwise: PREFECT_API_URL: got '{api.url}'; the server is Prefect 2.0.0, this is {ours}; "
        f"run both with one version: `pip install prefect=={ours}`"
    )
