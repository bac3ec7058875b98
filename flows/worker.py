"""Prefect's process worker, so that a retry survives it: importing this registers it."""

from __future__ import annotations

import warnings
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.workers.process import ProcessWorker, ProcessWorkerResult

with warnings.catch_warnings():  # of a second worker of type `process`: this one takes its place
    warnings.simplefilter("ignore")

    class PatientWorker(ProcessWorker):
        """A process worker that bears a retry within seconds of a crash."""

        async def run(self, *arguments: Any, **options: Any) -> ProcessWorkerResult:
            """Run a flow in a process.

            Returns:
                Status 0 in any case: the runner has reported another one. Prefect's worker reports it again a second
                later, which ends a retry that was started in between.
            """
            result = await super().run(*arguments, **options)
            return result.model_copy(update={"status_code": 0})

        async def _submit_scheduled_flow_runs(self, flow_run_response: list[WorkerFlowRunResponse]) -> list[FlowRun]:
            """Leave out, until it is asked again, a retry whose last process still has its slot: it ends the worker."""
            held = self._limiter.statistics().borrowers if self._limiter else ()
            free = [entry for entry in flow_run_response if entry.flow_run.id not in held]
            return await super()._submit_scheduled_flow_runs(free)
