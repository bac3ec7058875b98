"""How a flow reports errors: in one line and without needless tracebacks, on a console that outlives its reader."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

import httpx
from prefect.exceptions import CancelledRun, ObjectNotFound, PrefectHTTPStatusError
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console

from flows.server import lost_server
from stackwise_core.errors import ConfigError, StackWiseError, shown

_MOST_OF_A_RECORD = 500_000
"""Characters. A verification is one record, with a line for each problem."""


class RefusedError(StackWiseError):
    """The parameters of a flow run are wrong; all faults are in one line."""

    exit_code = 2


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """Join the faults of a wrong configuration, because the page of a run shows its state message as one line.

    From here on, Prefect's engine logs explained errors without a traceback, and its logs hold only what is drawn.

    Raises:
        RefusedError: instead of a ConfigError.
        ServerError: instead of an error of Prefect's client.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_explain)  # adding the same filter again has no effect
    try:
        with explained_server_errors():
            yield
    except ConfigError as error:
        raise RefusedError("; ".join(str(fault) for fault in error.faults)) from None


@contextlib.contextmanager
def explained_server_errors() -> Generator[None]:
    """Explain the failure of a server during a run.

    Raises:
        ServerError: instead of an error of Prefect's client.
    """
    try:
        yield
    except PrefectHTTPStatusError as error:
        answer = str(error).partition(" for url ")[0]
        raise lost_server(f"it answered: {answer}; its log says why: a full disk, a database that is gone") from error
    except ObjectNotFound as error:
        raise lost_server("it does not know the run any more: its database was replaced, or the run deleted") from error
    except httpx.TransportError as error:
        raise lost_server(f"the connection to it broke: {error}") from error


def _explain(record: logging.LogRecord) -> bool:
    """Reduce the log record of an explained error to its message, and any message to what a terminal only draws.

    A stop on request is no error.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, CancelledRun):
        return False
    if str(record.msg).startswith("Finished in state Cancelled"):
        record.levelno, record.levelname = logging.INFO, "INFO"
    if isinstance(error, (StackWiseError, httpx.TransportError)):
        text = str(error) if isinstance(error, StackWiseError) else f"Prefect's server cannot be reached: {error}"
        record.msg, record.args, record.exc_info = text, (), None
    record.msg, record.args = shown(record.getMessage(), _MOST_OF_A_RECORD, keep="\n"), ()
    return True


class _LastingConsole(Console):
    """A console that becomes silent when its reader is gone; rich would exit the process."""

    def on_broken_pipe(self) -> None:
        """Write nothing from now on."""
        self.quiet = True


def outlive_the_worker() -> None:
    """Keep Prefect's console log from ending this process when the worker that reads it is killed."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler) and not handler.console.is_terminal:
            handler.console = _LastingConsole(file=handler.stream, markup=False, highlight=False)
