"""What an operator reads of a run that failed: its message, in one line, and no traceback where it says all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

import httpx
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from flows.server import lost_server
from stackwise_core.errors import ConfigError, StackWiseError


class RefusedError(StackWiseError):
    """The parameters of a flow run are wrong; every fault stands in one line."""

    exit_code = 2


@contextlib.contextmanager
def told_in_one_line() -> Generator[None]:
    """Join the faults of a wrong configuration: the page of a run shows its state message as one line.

    From here on Prefect's engine logs what is explained to the user without a traceback.

    Raises:
        RefusedError: in place of a ConfigError.
        ServerError: in place of what Prefect's client raises.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_says_all)  # once: it is the same one every time
    try:
        with server_explained():
            yield
    except ConfigError as error:
        raise RefusedError("; ".join(str(fault) for fault in error.faults)) from None


@contextlib.contextmanager
def server_explained() -> Generator[None]:
    """Say of a server that fails during a run what it was, and that nothing is lost.

    Raises:
        ServerError: in place of what Prefect's client raises.
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


def _says_all(record: logging.LogRecord) -> bool:
    """Leave of a line about an explained error its message."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (StackWiseError, httpx.TransportError)):
        text = str(error) if isinstance(error, StackWiseError) else f"Prefect's server cannot be reached: {error}"
        record.msg, record.args, record.exc_info = text, (), None
    return True
