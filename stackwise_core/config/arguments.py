"""Checks on the arguments of the public library: each raises ConfigError with name, value and what is allowed."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral
from typing import Any

from stackwise_core.errors import ConfigError, Fault, shortened


def check_type(name: str, value: Any, kind: type | tuple[type, ...], allowed: str) -> None:
    """Reject a value of another type."""
    if not isinstance(value, kind):
        raise ConfigError([Fault(name, describe(value), allowed)])


def check_integer(name: str, value: Any, least: int, most: int | None = None, what: str = "an integer") -> None:
    """Reject a value that is not an integer within bounds; booleans do not count as integers."""
    number = int(value) if isinstance(value, Integral) and value is not True and value is not False else None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError([Fault(name, describe(value), f"{what} {bounds} is expected")])


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Reject a value that is not one of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError([Fault(name, describe(value), f"{' or '.join(map(repr, choices))} is expected")])


def describe(value: Any) -> str:
    """Return a value for a message: itself if it is short, else its type, with its shape if it has one."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if shape is not None:
        return f"{kind} of {getattr(value, 'dtype', 'no dtype')} and shape {tuple(shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return shortened(value, 40)
    return kind
