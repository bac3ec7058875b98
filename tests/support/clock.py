"""Time that a test moves."""

from __future__ import annotations

from types import ModuleType

import pytest


class Clock:
    """Stands for a module's `time`, and stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def clock_of(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Clock:
    """Return a clock that is the time of some modules."""
    now = Clock()
    for module in modules:
        monkeypatch.setattr(module, "time", now)
    return now
