"""Prefect's settings: which server is meant and by which file, and files that cannot be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from flows import program
from flows.settings import Setting, SettingsError, _explain, find_api
from support.commands import Run
from support.fake_api import fake_api

LATIN1 = b"PREFECT_HOME=\xe9\n"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Work in an empty folder, with a home that holds no settings yet, and an environment thrown away with the test."""
    left = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    monkeypatch.setattr(os, "environ", left | {"PREFECT_HOME": str(tmp_path / "home")})
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def _url(number: int) -> str:
    return f"http://127.0.0.1:{number}/api"


def _give(number: int, home: Path) -> str:
    """Give an URL of that port in the source of that number, the first to win; return the file."""
    texts = {
        2: (".env", f"# ours\nPREFECT_API_URL={_url(2)}\nPREFECT_API_KEY=secret\n"),
        3: ("prefect.toml", f'[api]\nurl = "{_url(3)}"\n'),
        4: ("pyproject.toml", f'[project]\nname = "x"\n[tool.prefect.api]\nurl = "{_url(4)}"\n'),
        5: (
            str(home / "profiles.toml"),
            f'active = "b"\n[profiles.a]\nPREFECT_API_URL = "{_url(9)}"\n[profiles.b]\nPREFECT_API_URL = "{_url(5)}"\n',
        ),
    }
    if number == 1:
        os.environ["PREFECT_API_URL"] = _url(1)
        return ""
    name, text = texts[number]
    Path(name).write_text(text)
    return str(Path(name).absolute())


def test_the_server_is_the_one_that_prefect_would_use(home: Path) -> None:
    assert find_api() == Setting("PREFECT_API_URL")
    for number in (5, 4, 3, 2, 1):  # each wins over those before it
        source = _give(number, home)
        assert find_api() == Setting("PREFECT_API_URL", _url(number), source)
        assert os.environ.pop("PREFECT_API_URL") == _url(number)  # for what asks, and for child processes
    assert os.environ["PREFECT_API_KEY"] == "secret"


def test_a_profile_is_chosen_by_the_environment_and_may_lie_elsewhere(home: Path) -> None:
    _give(5, home)
    os.environ["PREFECT_PROFILE"] = "a"
    assert find_api().value == _url(9)
    os.environ.pop("PREFECT_API_URL")
    Path("p.toml").write_text('[profiles.a]\nPREFECT_API_URL = "http://elsewhere/api"\n')
    Path(".env").write_text("PREFECT_PROFILES_PATH=p.toml\n")
    assert find_api().value == "http://elsewhere/api"
    os.environ.pop("PREFECT_API_URL")
    os.environ |= {"PREFECT_PROFILE": "none"}
    assert find_api() == Setting("PREFECT_API_URL")


@pytest.mark.slow
def test_prefect_agrees(home: Path) -> None:
    script = "from prefect.settings import get_current_settings as s; print(s().api.url)"
    for number in (5, 4, 3, 2, 1):
        _give(number, home)
        asked = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
        assert asked.stdout.strip() == _url(number) == find_api().value, asked.stderr
        os.environ.pop("PREFECT_API_URL")


def test_a_server_in_a_file_is_used_and_told(home: Path, run: Run, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    with fake_api() as api:
        Path(".env").write_text(f"PREFECT_API_URL={api.url}\n")
        (found,) = [each for each in run("doctor", "--json").document["findings"] if each["what"] == "prefect"]
        assert found["says"].startswith(f"{api.url}, by PREFECT_API_URL in {tmp_path / '.env'} answers, version ")
    os.environ.pop("PREFECT_API_URL")
    told = run("heartbeat")
    assert told.code == 2
    assert f"PREFECT_API_URL in {tmp_path / '.env'}: got '{api.url}'; it does not answer" in told.err


@pytest.mark.parametrize("command", ["worker", "heartbeat"])
def test_nothing_is_told_to_the_makers_of_prefect(command: str, home: Path, run: Run) -> None:
    os.environ |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "DO_NOT_TRACK": "0"}
    assert run(command).code == 2
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert os.environ["DO_NOT_TRACK"] == "0"  # what the user has set stays
    del os.environ["DO_NOT_TRACK"]
    run(command)
    assert os.environ["DO_NOT_TRACK"] == "1"


BROKEN = {
    ".env": LATIN1,
    "prefect.toml": b"api = \n",
    "pyproject.toml": b"[tool\n",
    "profiles.toml": b"profiles = 3\nactive = 'x'\n",
}


@pytest.mark.parametrize("command", [("heartbeat",), ("worker",), ("server",), ("doctor", "--json")])
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_prefect_cannot_read_is_named(
    name: str, command: tuple[str, ...], home: Path, run: Run, tmp_path: Path
) -> None:
    path = home / name if name == "profiles.toml" else tmp_path / name  # where `run` works
    path.write_bytes(BROKEN[name])
    told = run(*command)
    if command[0] == "doctor":
        (found,) = [each for each in told.document["findings"] if each["what"] == "prefect"]
        assert (told.code, found["ok"]) == (1, False)
        said = found["says"]
    else:
        assert told.code == 2
        (said,) = told.faults
    assert said.startswith(f"{path}: Prefect reads this file, but ")
    assert said.endswith("mend it" if name == "profiles.toml" else "; mend it, or run the command in another folder")


def test_a_folder_in_place_of_a_file_is_named_too(home: Path) -> None:
    Path("pyproject.toml").mkdir()
    with pytest.raises(SettingsError, match=r"pyproject.toml: Prefect reads this file, but Is a directory"):
        find_api()


class LoggingSettings(BaseModel):
    """As Prefect's, which says no more of where a value comes from."""

    level: Literal["DEBUG", "INFO"]


def test_a_value_that_prefect_refuses_is_told_with_its_file() -> None:
    given = [Setting("PREFECT_API_URL", "http://x"), Setting("PREFECT_LOGGING_LEVEL", "verbose", "/there/.env")]
    with pytest.raises(ValidationError) as refused:
        LoggingSettings(level="VERBOSE")  # pyright: ignore[reportArgumentType]
    told = _explain(refused.value, given)
    assert told == "PREFECT_LOGGING_LEVEL in /there/.env: got 'verbose'; Input should be 'DEBUG' or 'INFO'"
    assert _explain(TypeError("no table\nat all"), given) == (
        "Prefect refuses a setting (no table); given are those in /there/.env"
    )


def test_a_wrong_setting_of_the_worker_or_the_server_ends_it_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise SettingsError("PREFECT_LOGGING_LEVEL: got 'x'; no\nPREFECT_API_KEY: got 'y'; no")

    monkeypatch.setattr(program, "load_prefect", refused)
    assert program.main() == 2
    assert [line.split(":")[:2] for line in capsys.readouterr().err.splitlines()] == [
        ["stackwise", " PREFECT_LOGGING_LEVEL"],
        ["stackwise", " PREFECT_API_KEY"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        (".env", "PREFECT_LOGGING_LEVEL=verbose", "PREFECT_LOGGING_LEVEL in "),
        ("prefect.toml", '[api]\nrequest_timeout = "soon"', "PREFECT_API_REQUEST_TIMEOUT in "),
        ("pyproject.toml", "[tool.prefect]\napi = 3", "Prefect refuses a setting ("),
        ("x", "", "PREFECT_LOGGING_LEVEL: got 'verbose'"),
    ],
)
def test_prefect_refuses_a_value(file: str, text: str, names: str, home: Path) -> None:
    Path(file).write_text(text)
    os.environ |= {} if text else {"PREFECT_LOGGING_LEVEL": "verbose"}
    script = "from flows.program import main; import sys; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, "version"], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"stackwise: {names}")
    assert file == "x" or str(Path(file).absolute()) in done.stderr


@pytest.mark.flow
def test_what_prefect_logs_later_is_heard(tmp_path: Path) -> None:
    """Its log handlers are made while it is imported, when its stderr is held back."""
    script = (
        "from flows.settings import load_prefect; load_prefect(); "
        "from prefect.logging import get_logger; get_logger('runner').warning('a process exited')"
    )
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a process exited" in done.stderr
