"""docker/compose.yaml as Compose reads it: variables filled in, the services with what they are started with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def filled_in(value: Any, variables: Mapping[str, str]) -> Any:
    """Fill in `${NAME}`, `${NAME:-default}` and `${NAME:?what is wrong without}`, wherever they are.

    Raises:
        KeyError: a variable that must be set is missing or empty; the message is the file's.
    """
    if isinstance(value, dict):
        return {key: filled_in(entry, variables) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled_in(entry, variables) for entry in value]
    return _VARIABLE.sub(lambda found: _value(*found.groups(), variables), value) if isinstance(value, str) else value


def _value(name: str, how: str | None, text: str | None, variables: Mapping[str, str]) -> str:
    value = variables.get(name, "")
    if not value and how == "?":
        raise KeyError(text)
    return value or (text or "" if how == "-" else "")


def read(name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """Return a compose file of ours with its variables filled in."""
    return filled_in(yaml.safe_load((DOCKER / name).read_text()), variables)


def environment_of(service: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, str]:
    """Return a service's environment; a name without a value is handed on, or not set."""
    given = {name: variables.get(name) if value is None else value for name, value in service["environment"].items()}
    return {name: value for name, value in given.items() if value is not None}


def instructions(name: str = "Dockerfile") -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / name).read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def copied() -> list[tuple[list[str], str]]:
    """Return what the Dockerfile copies out of the checkout, and to where."""
    copies = [arguments.split() for instruction, arguments in instructions() if instruction == "COPY"]
    return [(sources, target) for *sources, target in copies]
