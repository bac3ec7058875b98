"""The flows of upkeep: verify a run, collect garbage. What the commands print goes into the run's log."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.cli.gc import collect_garbage
from flows.cli.verify import verify
from flows.errors import told_in_one_line
from stackwise_core.errors import StackWiseError

NumberOfRuns = Annotated[int, Field(ge=-1, le=1_000_000)]


class VerificationError(StackWiseError):
    """Something is not as it was sealed."""

    exit_code = 3


def _name_of_validation() -> str:
    return f"verify {flow_run.parameters['run'] or 'everything'}"


@flow(name="validate", flow_run_name=_name_of_validation)
def validate_run(run: str = "", artifacts: str = "artifacts") -> None:
    """Recompute every checksum of a run's artifacts, and derive sampled rows of its caches again from tokens.

    Args:
        run: name of the run; empty verifies everything.
        artifacts: folder that holds it, or s3://BUCKET/PREFIX.
    """
    with told_in_one_line(), _printing_to_the_log():
        code = verify(artifacts, run or None)
    if code:
        raise VerificationError(f"{run or artifacts}: not all is as it was sealed; the log of this run says what")


@flow(name="gc", flow_run_name="collect garbage")
def collect(
    artifacts: str = "artifacts",
    keep_last: NumberOfRuns = -1,
    superseded: bool = False,
    dry_run: bool = False,
) -> None:
    """Remove what no run reaches, and what dead processes left.

    Args:
        artifacts: folder to clean.
        keep_last: only so many runs count, started last; -1 keeps all.
        superseded: of each run only the newest attempt counts.
        dry_run: list what would go, and remove nothing.
    """
    with told_in_one_line(), _printing_to_the_log():
        collect_garbage(
            artifacts,
            keep_last=None if keep_last == -1 else keep_last,
            superseded=superseded,
            dry_run=dry_run,
            as_json=False,
        )


@contextlib.contextmanager
def _printing_to_the_log() -> Generator[None]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        if text := said.getvalue().rstrip():
            get_run_logger().info(text)
