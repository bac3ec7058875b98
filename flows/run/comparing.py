"""Running what is missing of a comparison, some runs at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from flows.run.comparison import Chosen, Comparison, Result
from flows.run.events import GO_ON, Message, emit, emit_waiting, stop_requested, stopping_on_signals
from flows.run.field import Field
from flows.run.numbers import clock, loss
from flows.run.prepare import check_validation, prepare_data
from flows.run.reading import Reading
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StackWiseError, StageInterruptedError
from storage.adopt import plan_in
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.errors import ArtifactError
from storage.runs import retire_stores

_SECONDS_BETWEEN_LOOKS = 0.2


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> str | None:
        """Return None while it runs, then '' or what went wrong."""

    def stop(self) -> None:
        """Ask it to stop at its next safe point."""


Start = Callable[[StackWiseConfig, Artifacts], Job]


class RunsFailedError(StackWiseError):
    """Some runs of a comparison have no result."""


def open_field(comparison: Comparison, root: str) -> Field:
    """Pack the corpus if need be, and balance the arms on its rows; see `Field`."""
    artifacts = artifacts_at(root).open()
    config, plan = plan_in(artifacts, comparison.config, Reading("read"))
    with without_gc(artifacts, emit_waiting):
        data = prepare_data(config, artifacts, plan)
        check_validation(config, artifacts, plan)
    return Field(comparison, artifacts, data)


def known_results(field: Field, *, failed: bool = False) -> dict[Chosen, Result]:
    """Return the results that there are, those of runs that failed only if asked: they are tried again.

    They decide which further runs are looked for.
    """
    results: dict[Chosen, Result] = {}
    while found := {
        run: result
        for run in field.wanted(results)
        if run not in results and (result := field.look(run) or (field.ended(run) if failed else None))
    }:
        results |= found
    return results


def run_missing(field: Field, start: Start, jobs: int) -> dict[Chosen, Result]:
    """Run what has no result, `jobs` at a time, and return all results. A failed run does not stop the others.

    Raises:
        StageInterruptedError: a stop was asked for; the runs that were at work have stopped at a safe point.
    """
    results = known_results(field)
    running: dict[Chosen, tuple[Job, float]] = {}
    with stopping_on_signals():
        while missing := [run for run in field.wanted(results) if run not in results]:
            if stop_requested():
                _stop(running)
            for run in [run for run in missing if run not in running][: jobs - len(running)]:
                emit(
                    Message(
                        f"{told(field, run)}: starts ({len(results)} of {len(results) + len(missing)} runs are done)"
                    )
                )
                running[run] = start(field.config_of(run), field.artifacts), time.monotonic()
            for run, (job, began) in list(running.items()):
                if (problem := job.poll()) is not None:
                    del running[run]
                    results[run] = _result(field, run, problem)
                    emit(Message(f"{told(field, run)}: {_said(results[run])} in {clock(time.monotonic() - began)}"))
            if running:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    return results


def _stop(running: dict[Chosen, tuple[Job, float]]) -> None:
    for job, _ in running.values():
        job.stop()
    while any(job.poll() is None for job, _ in running.values()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise StageInterruptedError(f"stopped on request; {GO_ON}")


def _result(field: Field, run: Chosen, problem: str) -> Result:
    """Return the result of a run that has ended, and drop the stores that only growing on it would read."""
    if found := field.look(run):
        if found.state == "done" and field.config_of(run).cache.keep == "last":
            try:
                retire_stores(field.artifacts, field.plan_of(run), field.config_of(run).run.name)
            except ArtifactError as error:  # of another run, whose plan cannot be read
                emit(Message(f"the stores of {told(field, run)} are kept: {error}"))
        return found
    return field.ended(run) or Result("failed", math.inf, message=problem or "it ended without a result")


def told(field: Field, run: Chosen) -> str:
    """Return a run in words."""
    rate = field.config_of(run).training.learning_rate
    return f"{run.arm}, rate {rate:g}, seed {run.seed}, budget {run.budget:g}"


def _said(result: Result) -> str:
    return f"loss {loss(result.loss)}" if result.state == "done" else f"{result.state} ({result.message})"
