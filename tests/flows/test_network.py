"""What stands between a command and Prefect's server: proxies, a server that is silent, a home that cannot be used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from flows import network
from flows.network import ask, bypass_proxy, check_proxies, is_loopback
from flows.server import check_home
from stackwise_core.errors import ConfigError
from support.commands import Run
from support.fake_api import FakeApi, fake_api

NOBODY = "http://127.0.0.1:9"
"""A proxy that refuses every connection."""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without proxies, thrown away with the test."""
    left = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    monkeypatch.setattr(os, "environ", left)
    return left


@pytest.fixture
def api() -> Generator[FakeApi]:
    with fake_api() as served:
        yield served


# ---------------------------------------------------------------- proxies


@pytest.mark.parametrize(
    ("proxy", "own"),
    [
        ("http_proxy", {}),
        ("HTTP_PROXY", {"no_proxy": "intranet, .example"}),
        ("ALL_PROXY", {"NO_PROXY": "intranet,.example"}),
        ("all_proxy", {"no_proxy": "", "NO_PROXY": "intranet"}),
    ],
)
def test_loopback_is_asked_without_a_proxy(
    proxy: str, own: dict[str, str], environment: dict[str, str], api: FakeApi
) -> None:
    environment |= {proxy: NOBODY, **own}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{api.url}/health", verify=False)
    assert ask(api.url, "/health") is True  # even where nothing prepared the environment
    bypass_proxy()
    bypass_proxy()
    assert httpx.get(f"{api.url}/health", verify=False).json() is True  # as Prefect's client asks
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://elsewhere.test", verify=False)  # what is not here still goes through the proxy
    wanted = {entry.strip() for value in own.values() for entry in value.split(",") if entry}
    for name in ("no_proxy", "NO_PROXY"):
        entries = environment[name].split(",")
        assert wanted <= set(entries)
        assert len(entries) == len(set(entries))


def test_another_address_of_this_machine_bypasses_the_proxy_too(environment: dict[str, str]) -> None:
    environment |= {"http_proxy": NOBODY, "no_proxy": "*"}
    bypass_proxy("127.0.0.2")
    assert environment["no_proxy"] == "*"  # everything does already; urllib wants it alone
    environment["no_proxy"] = "10.0.0.1"
    bypass_proxy("127.0.0.2")
    bypass_proxy("10.0.0.2")
    assert environment["no_proxy"] == "10.0.0.1,localhost,127.0.0.1,::1,127.0.0.2"
    assert [is_loopback(host) for host in ("::1", "127.8.9.1", "a.localhost", "localhost.example", "10.0.0.1", "")] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_without_a_proxy_nothing_is_set(environment: dict[str, str]) -> None:
    bypass_proxy()
    assert "no_proxy" not in environment


def test_a_proxy_that_prefect_cannot_read_is_named_without_its_password(
    environment: dict[str, str], run: Run, api: FakeApi
) -> None:
    environment |= {"ALL_PROXY": "socks5://127.0.0.1:9"}
    check_proxies()
    environment |= {"ALL_PROXY": "gopher://me:secret@127.0.0.1:9", "PREFECT_API_URL": api.url}
    told = run("heartbeat")
    assert told.code == 2
    assert told.faults[0].startswith("ALL_PROXY, NO_PROXY: got 'gopher://***@127.0.0.1:9', ")
    assert "Unknown scheme" in told.faults[0]
    assert "secret" not in told.err


# ---------------------------------------------------------------- a home that cannot be used


@pytest.mark.parametrize("variable", ["PREFECT_HOME", "HOME"])
@pytest.mark.parametrize("command", [("server",)])
def test_a_home_that_cannot_be_used_names_prefect_home(
    variable: str, command: tuple[str, ...], environment: dict[str, str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    environment.pop("PREFECT_HOME", None)
    environment[variable] = str(tmp_path / "file")
    told = run(*command)
    received = repr(str(tmp_path / "file")) if variable == "PREFECT_HOME" else "nothing, so ~/.prefect is used"
    assert told.code == 2
    assert told.faults[0].startswith(f"PREFECT_HOME: got {received}; Prefect keeps its database there, but ")
    assert told.faults[0].endswith("set PREFECT_HOME to a folder that can be written")


def test_a_home_is_made(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment["PREFECT_HOME"] = str(tmp_path / "deep" / "home")
    check_home()
    assert (tmp_path / "deep" / "home").is_dir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a read-only disk
    with pytest.raises(ConfigError, match="home cannot be written; set PREFECT_HOME"):
        check_home()


# ---------------------------------------------------------------- a server that is silent


class Clock:
    """Time that goes on by a question of the watch, which ends after some of them."""

    def __init__(self, questions: int) -> None:
        self.now, self.left = 0.0, questions

    def wait(self, seconds: float) -> bool:
        self.now, self.left = self.now + seconds, self.left - 1
        return self.left < 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Watch a server for some questions, given which of them it answers; return whether the watch gave up."""

    def begin(questions: int, answers: set[int], *, computing: bool = False) -> bool:
        clock, gave_up = Clock(questions), list[str]()

        def asked(url: str) -> str:
            return "" if questions - clock.left in answers else "timed out"

        monkeypatch.setattr(network, "_silence", asked)
        monkeypatch.setattr(network.time, "monotonic", lambda: clock.now)
        monkeypatch.setattr(network, "_is_computing", lambda: computing)
        monkeypatch.setattr(network, "_give_up", lambda url, ended: gave_up.append(url))
        network._watch("http://u:secret@there/api", cast(threading.Event, clock))
        return bool(gave_up)

    return begin


def test_a_silent_server_is_told_once_and_waited_for_in_vain_for_two_minutes(
    watch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not watch(23, set())
    assert watch(24, set())  # of five seconds each
    told = capsys.readouterr().err.splitlines()
    assert told[0][9:] == (  # behind the time of day
        "Prefect's server http://***@there/api does not answer (timed out); waiting for it at most 2 minutes between "
        "two tasks"
    )
    assert len(told) == 2  # once by each watch


def test_a_server_that_is_slow_once_is_not_told(watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not watch(60, set(range(2, 61, 2)))
    assert capsys.readouterr().err == ""


def test_a_server_that_comes_back_is_told_and_the_wait_begins_anew(
    watch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not watch(40, {20})
    assert [line.rpartition("/api ")[2].split(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        *("does not answer", "answers again"),
        "does not answer",
    ]


def test_a_stage_that_computes_needs_no_server(watch: Any) -> None:
    assert not watch(1000, set(), computing=True)


@pytest.mark.parametrize(("module", "computes"), [("storage.x", True), ("prefect.x", False), ("elsewhere", False)])
def test_whether_a_run_computes_is_read_from_where_it_is(module: str, computes: bool) -> None:
    there: dict[str, Any] = {"__name__": module, "ask": network._is_computing}
    exec("def inside(): return ask()", there)
    assert there["inside"]() is computes


@pytest.mark.parametrize("answer", [{}, {"/ready": "OK"}])
def test_only_silence_counts_as_silence(answer: dict[str, Any], api: FakeApi) -> None:
    api.answers |= answer
    assert network._silence(api.url) == ""
    assert "refused" in network._silence(f"{NOBODY}/api")
