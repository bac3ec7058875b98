"""Prefect's settings, read as Prefect reads them but without importing it, and what is wrong with them in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from pydantic import ValidationError

from stackwise_core.errors import StackWiseError

_OF_THE_API = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")
_OURS = (
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL",
    "PREFECT_LOGGING_INTERNAL_LEVEL",
    "PREFECT_LOGGING_TO_API_BATCH_INTERVAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY",
    "PREFECT_API_URL",
    "PREFECT_HOME",
)
"""Variables that this system sets, or checks by itself: none of them is wrong."""


class SettingsError(StackWiseError):
    """A file of settings cannot be read, or Prefect refuses a setting; the message names it."""

    exit_code = 2


class Setting(NamedTuple):
    """A setting that is given somewhere; a value of '' is none."""

    name: str
    """Such as PREFECT_API_URL."""
    value: str = ""
    source: str = ""
    """The file that gives it; '' for the environment."""

    def __str__(self) -> str:
        """Return its name and, unless it is in the environment, where it is given."""
        return f"{self.name} in {self.source}" if self.source else self.name

    @property
    def by(self) -> str:
        """Return what to say of a value that a file gives."""
        return f", by {self}" if self.source else ""


def find_api() -> Setting:
    """Return which API Prefect would use, and put that and its credentials into the environment, for all that asks.

    Raises:
        SettingsError: a file that Prefect reads cannot be read.
    """
    given = given_settings()
    found = {name: next((each for each in given if each.name == name and each.value), None) for name in _OF_THE_API}
    os.environ.update({name: each.value for name, each in found.items() if each})
    return found["PREFECT_API_URL"] or Setting("PREFECT_API_URL")


def given_settings() -> list[Setting]:
    """Return the settings of environment, .env, prefect.toml, pyproject.toml and profile, those that win first.

    Raises:
        SettingsError: one of these files cannot be read.
    """
    found = [Setting(name.upper(), value) for name, value in os.environ.items() if name.upper().startswith("PREFECT_")]
    found += _in_file(Path(".env"), _dotenv)
    found += _in_file(Path("prefect.toml"), lambda path: dict(_flat(_toml(path))))
    found += _in_file(Path("pyproject.toml"), lambda path: dict(_flat(_toml(path).get("tool", {}).get("prefect", {}))))
    return found + _in_file(_profiles_file(found), _profile)


def _in_file(path: Path, read: Callable[[Path], dict[str, str]]) -> list[Setting]:
    if not path.exists():
        return []
    try:
        return [Setting(name.upper(), value, str(path.absolute())) for name, value in read(path).items()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # the last: a value for a table
        reason = getattr(error, "strerror", None) or str(error)
        elsewhere = "" if path.is_absolute() else ", or run the command in another folder"
        raise SettingsError(f"{path.absolute()}: Prefect reads this file, but {reason}; mend it{elsewhere}") from None


def _dotenv(path: Path) -> dict[str, str]:
    from dotenv import dotenv_values

    logging.getLogger("dotenv.main").setLevel(logging.ERROR)  # lines for other programs; it does not name the file
    return {name: value for name, value in dotenv_values(path, encoding="utf-8").items() if value is not None}


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _flat(table: dict[str, Any], prefix: str = "PREFECT") -> Iterator[tuple[str, str]]:
    """Yield the names and values of a table in a file: `url` in `api` is PREFECT_API_URL."""
    for key, value in table.items():
        name = f"{prefix}_{key.upper()}"
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), name)
        else:
            yield name, str(value)


def _profiles_file(found: list[Setting]) -> Path:
    """Return where the profiles are: a file of the user, or the one that comes with Prefect."""
    if given := next((each.value for each in found if each.name == "PREFECT_PROFILES_PATH" and each.value), ""):
        return Path(given)
    if home := os.environ.get("PREFECT_HOME"):
        return Path(home) / "profiles.toml"
    own = Path(os.path.expanduser("~/.prefect/profiles.toml"))
    spec = find_spec("prefect")
    return own if own.exists() or spec is None or spec.origin is None else _packaged(spec.origin)


def _packaged(origin: str) -> Path:
    return Path(origin).with_name("settings") / "profiles.toml"


def _profile(path: Path) -> dict[str, str]:
    """Return the settings of the active profile."""
    document = _toml(path)
    name = os.environ.get("PREFECT_PROFILE") or document.get("active")
    return {key: str(value) for key, value in document.get("profiles", {}).get(name, {}).items()}


def load_prefect() -> None:
    """Import prefect, which reads its settings.

    Raises:
        SettingsError: it refuses one.
    """
    given = given_settings()
    said = _Held(sys.stderr)  # what its plugins say of the same error
    try:
        with contextlib.redirect_stderr(said):
            import_module("prefect.main")
    except ImportError:  # an installation that does not fit together
        said.release()
        raise
    except Exception as error:
        raise SettingsError(_explain(error, given)) from None
    said.release()


class _Held(io.TextIOBase):
    """Stands for a stream and keeps what is written until it is released; log handlers hold on to it after that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.kept: list[str] | None = []

    def release(self) -> None:
        """Write what was kept, and from now on everything at once."""
        kept, self.kept = self.kept or [], None
        self.stream.write("".join(kept))

    def write(self, text: str) -> int:
        if self.kept is None:
            return self.stream.write(text)
        self.kept.append(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] -- typeshed has an attribute
        return self.stream.encoding


def _explain(error: Exception, given: list[Setting]) -> str:
    """Say which setting Prefect refuses, where it is given and why."""
    lines = list[str]()
    for fault in error.errors() if isinstance(error, ValidationError) else []:
        leaf, value = f"_{fault['loc'][-1]}".upper(), str(fault["input"]).lower()  # Prefect changes the case of some
        if named := [each for each in given if each.name.endswith(leaf) and each.value.lower() == value]:
            lines.append(f"{named[0]}: got {named[0].value!r}; {fault['msg']}")
    if lines:
        return "\n".join(lines)
    sources = dict.fromkeys(each.source or each.name for each in given if each.source or each.name not in _OURS)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"Prefect refuses a setting ({reason}); given are those in {', '.join(sources) or 'no file'}"
