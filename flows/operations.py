"""The maintenance flows: verify a run, collect garbage. Their results go into the run's log."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.errors import one_line_errors
from flows.flow_runs import tagged
from flows.run.maintenance import bytes_freed, collect_garbage, removal_lines, verify
from stackwise_core.errors import StackWiseError
from storage.artifacts import artifacts_at


class VerificationError(StackWiseError):
    """The verification found problems."""

    exit_code = 3


@flow(name="validate", flow_run_name=lambda: f"verify {flow_run.parameters['run'] or 'everything'}")
def validate_run(run: str = "", artifacts: str = "artifacts") -> None:
    """Recompute every checksum of a run's artifacts, and recompute sampled rows of its caches from tokens.

    Args:
        run: Name of the run; empty verifies everything.
        artifacts: Folder that holds it, or s3://BUCKET/PREFIX.
    """
    log = get_run_logger().info
    with one_line_errors(), tagged(run) if run else nullcontext():
        found = verify(artifacts, run or None, on_artifact=log)
    log("\n".join([*found.problems, *found.notes, found.verdict]))
    if found.problems:
        raise VerificationError(f"{run or artifacts}: not everything is as it was sealed; see the log of this run")


@flow(name="gc", flow_run_name="collect garbage")
def collect(
    artifacts: str = "artifacts",
    keep_last: Annotated[int, Field(ge=-1, le=1_000_000)] = -1,
    superseded: bool = False,
    dry_run: bool = False,
) -> None:
    """Remove what no run reaches, and leftovers of killed processes.

    Args:
        artifacts: The artifacts folder.
        keep_last: Only this many runs count, the newest; -1 keeps all.
        superseded: Of each run, only the newest attempt counts.
        dry_run: List what would be removed, and remove nothing.
    """
    with one_line_errors():
        place = artifacts_at(artifacts).existing()
        keep = None if keep_last == -1 else keep_last
        found = collect_garbage(place, keep, superseded=superseded, dry_run=dry_run)
    lines = removal_lines(place, found)
    freed = bytes_freed(found, dry_run=dry_run)
    get_run_logger().info("\n".join([*lines, *found.damaged, *found.notes, freed]))
