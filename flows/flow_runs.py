"""Our flow runs on Prefect's server: the tags by which its pages find what belongs to a run or to a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from prefect import tags
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.services import TAG


def tags_of(run: str) -> set[str]:
    """Return the tags of a flow run that works on a run."""
    return {TAG, f"run:{run}"}


@contextlib.contextmanager
def tagged(run: str) -> Generator[None]:
    """Tag this flow run, and the subflows that start while the block runs, with the run that they work on.

    Only a flow run that was started as ours is marked as ours: another may send heartbeats too seldom.
    """
    before = set(flow_run.tags)
    now = before | (tags_of(run) - {TAG})
    if flow_run.id and now != before:  # a deployment does not know the name
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, tags=now)
    with tags(*now & tags_of(run)):
        yield
