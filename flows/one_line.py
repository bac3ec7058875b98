"""Wrong parameters as the state message of a flow run: one line, however many faults there are."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from stackwise_core.errors import ConfigError, StackWiseError


class RefusedError(StackWiseError):
    """The parameters of a flow run are wrong; every fault stands in one line."""

    exit_code = 2


@contextlib.contextmanager
def told_in_one_line() -> Generator[None]:
    """Join the faults of a wrong configuration: the page of a run shows its state message as one line.

    Raises:
        RefusedError: in place of a ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        raise RefusedError("; ".join(str(fault) for fault in error.faults)) from None
