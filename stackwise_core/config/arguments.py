"""What a caller of the library hands in, checked at the door: the argument, its value, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from stackwise_core.errors import ConfigError, Fault


def check_type(name: str, value: Any, kind: type | tuple[type, ...], allowed: str) -> None:
    """Refuse a value that is of no such type.

    Raises:
        ConfigError: names the argument, what it is, and what is allowed.
    """
    if not isinstance(value, kind):
        raise ConfigError([Fault(name, describe(value), allowed)])


def check_integer(name: str, value: Any, least: int, most: int | None = None, what: str = "an integer") -> None:
    """Refuse what is no integer within bounds; True is none.

    Raises:
        ConfigError: names the argument, its value, and the bounds.
    """
    number = int(value) if isinstance(value, Integral) and value is not True and value is not False else None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError([Fault(name, describe(value), f"{what} {bounds} is expected")])


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ConfigError: names the argument, its value, and the choices.
    """
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = " or ".join(map(repr, choices))
        raise ConfigError([Fault(name, describe(value), f"{allowed} is expected")])


def describe(value: Any) -> str:
    """Return a value as a message shows it: itself if it is short, else its type, with the shape if it has one."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if shape is not None:
        return f"{kind} of {getattr(value, 'dtype', 'no dtype')} and shape {tuple(shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return kind
