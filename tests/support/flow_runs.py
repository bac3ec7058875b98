"""Flow runs of train-rack on the session's server, as Prefect's API has them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID


class FlowRun:
    """What the API knows of a run of train-rack."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.id: UUID = state.state_details.flow_run_id

    @property
    def name(self) -> str:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id).name

    def stages(self) -> list[Any]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

        mine = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[self.id]))
        with get_client(sync_client=True) as client:
            return sorted(client.read_flow_runs(flow_run_filter=mine), key=lambda run: run.name)

    def tasks(self, count: int) -> dict[str, str]:
        """Return {task run name: state name}; the server learns of task runs by events, a little later."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in self.stages()]))

        def read() -> dict[str, str]:
            with get_client(sync_client=True) as client:
                return {run.name: run.state_name or "" for run in client.read_task_runs(flow_run_filter=mine)}

        def arrived(found: dict[str, str]) -> bool:
            return len(found) >= count and not {"Pending", "Running"} & set(found.values())

        return until(read, arrived)


def until(read: Callable[[], Any], arrived: Callable[[Any], bool]) -> Any:
    """Ask the server again until it knows; it takes a fraction of a second."""
    end = time.monotonic() + 240
    while not arrived(found := read()):
        assert time.monotonic() < end, f"the server still says {found}"
        time.sleep(0.1)
    return found


def run_flow(config: Any, root: Path, **how: Any) -> FlowRun:
    from prefect import tags

    from flows.train_rack import train_rack

    with tags("stackwise"):  # as `stackwise train` and the deployments do
        return FlowRun(train_rack(config, str(root), **how, return_state=True))
