"""Functions that a configuration gives as 'module:name' or, in the library, as objects."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from stackwise_core.errors import ConfigError, Fault


def load_function(function: str | Callable[..., Any], key: str) -> Callable[..., Any]:
    """Return the function that a key holds or names.

    The working folder is not searched: it may be someone else's. Raises ConfigError if the module cannot be imported or
    has no such function.
    """
    if not isinstance(function, str):
        return function
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        allowed = f"cannot be imported ({type(error).__name__}: {error}); say where the module is, such as PYTHONPATH=."
        raise ConfigError([Fault(key, repr(function), allowed)]) from error
    found = getattr(module, name, None)
    if not callable(found):
        problem = "no function" if hasattr(module, name) else "nothing"
        raise ConfigError([Fault(key, repr(function), f"module {module_name} has {problem} called {name!r}")])
    return found


def source_digest(function: Callable[..., Any], key: str) -> str:
    """Return the hash of a function's source text, which enters ids; raises ConfigError if it cannot be read."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError) as error:
        allowed = f"its source cannot be read ({error}); write it in a Python file"
        raise ConfigError([Fault(key, repr(function), allowed)]) from None


def shown(value: Any) -> str:
    """Return a value for a message: a function by its name, others by their repr."""
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else repr(value)
