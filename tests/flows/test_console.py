"""A flow's log on a console that nobody reads any more."""

from __future__ import annotations

import io
import logging
import os

import pytest


@pytest.mark.flow
def test_a_log_whose_reader_died_does_not_end_the_process() -> None:
    from prefect.logging.handlers import PrefectConsoleHandler

    from flows.errors import outlive_the_worker

    reader, writer = os.pipe()
    handler = PrefectConsoleHandler(stream=os.fdopen(writer, "w", closefd=False))
    logging.getLogger().addHandler(handler)
    try:
        outlive_the_worker()
        logging.getLogger("flow").warning("step [1] of 2")
        assert os.read(reader, 100) == b"step [1] of 2\n"
        os.close(reader)
        for _ in range(2):
            logging.getLogger("flow").warning("step [2] of 2")
    finally:
        logging.getLogger().removeHandler(handler)
        os.close(writer)


@pytest.mark.flow
def test_what_others_wrote_is_only_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.errors import one_line_errors

    stream = io.StringIO()
    logger, handler = logging.getLogger("prefect.flow_runs"), logging.StreamHandler(stream)
    for name, value in {"handlers": [handler], "propagate": False, "disabled": False}.items():
        monkeypatch.setattr(logger, name, value)  # whatever other tests made of Prefect's logging
    with one_line_errors():
        arguments = ("a\x1b[2J\u202eb\nc", 1)
        logger.handle(logging.LogRecord(logger.name, logging.WARNING, "", 1, "%s of %d", arguments, None))
    assert stream.getvalue() == "a\\x1b[2J\\u202eb\nc of 1\n"
