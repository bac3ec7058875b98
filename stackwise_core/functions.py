"""Functions that a configuration names as 'module:name'."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stackwise_core.errors import ConfigError, Fault


def load_function(name: str | Callable[..., Any], key: str) -> Callable[..., Any]:
    """Return the function that a key names; one that is given as an object is returned as it is.

    Modules are looked up as Python does, and in the working folder.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    if callable(name):
        return name
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        allowed = f"it cannot be imported from {Path.cwd()} ({type(error).__name__}: {error})"
        raise ConfigError([Fault(key, repr(name), allowed)]) from None
    if not callable(function):
        raise ConfigError([Fault(key, repr(name), "it is no function")])
    return function


def source_digest(function: Callable[..., Any], key: str) -> str:
    """Return the hash of a function's source text: what enters ids.

    Raises:
        ConfigError: it has no source text, as functions of compiled modules have none.
    """
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError) as error:
        allowed = f"its source cannot be read ({error}); write it in a Python file"
        raise ConfigError([Fault(key, repr(function), allowed)]) from None
