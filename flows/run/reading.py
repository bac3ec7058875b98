"""Progress of what reads the whole corpus: as events, once it takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

from flows.run.events import GO_ON, CorpusRead, emit
from stackwise_core.errors import StageInterruptedError

_FIRST, _BETWEEN = 2.0, 0.5
"""Seconds until the first event, and between two."""


class Reading:
    """Adds up the bytes of the corpus that are read or packed; a stop that was asked for is obeyed here."""

    def __init__(self, what: str, of_bytes: int = 0, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Say what is done with the bytes, such as 'packed', and how many there are; 0 if that is not known."""
        self._should_stop = should_stop
        self._what, self._of_bytes, self._n_bytes = what, of_bytes, 0
        self._began: float | None = None  # what is imported before the first bytes takes a while
        self._next = 0.0

    def __call__(self, n_bytes: int) -> None:
        """Count bytes; raises StageInterruptedError if a stop was asked for."""
        self._n_bytes += n_bytes
        if self._should_stop():
            raise StageInterruptedError(f"stopped on request while the corpus was being {self._what}; {GO_ON}")
        now = time.monotonic()
        if self._began is None:
            self._began, self._next = now, now + _FIRST
        if now >= self._next:
            self._next = now + _BETWEEN
            emit(CorpusRead(self._what, self._n_bytes, self._of_bytes, now - self._began))
