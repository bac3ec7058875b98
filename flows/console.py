"""The console of a flow process, which a worker reads for as long as it lives."""

from __future__ import annotations

import logging

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console


class _LastingConsole(Console):
    """A console that falls silent when nobody reads it any more; rich would exit the process."""

    def on_broken_pipe(self) -> None:
        """Write nothing from now on."""
        self.quiet = True


def outlive_the_worker() -> None:
    """Let Prefect's log on the console not end this process when the worker that reads it is killed."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler) and not handler.console.is_terminal:
            handler.console = _LastingConsole(file=handler.stream, markup=False, highlight=False)
