"""The artifacts on Prefect's pages: progress of a task, stage table, report and loss plot of a run."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Generator
from contextvars import copy_context
from functools import partial
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.runtime import flow_run

from flows.pages.comparison import markdown
from flows.pages.progress import RunProgress
from flows.pages.report import escaped, loss_plot, report
from flows.run.events import Event, RowsCached, RunStarted, StageDone, StageOpened, StepTaken, Subscriber, subscribed
from flows.run.numbers import loss, percent, size
from flows.run.stage import Stage
from flows.run.summary import STAGE_COLUMNS, StageSummary
from flows.run.terminal import PlainLines
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.errors import StageInterruptedError, shown

_SECONDS_BETWEEN_UPDATES = 5.0  # an update costs the server tens of milliseconds
_SECONDS_TO_FINISH = 5.0


def key_of(*parts: object) -> str:
    """Return an artifact key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


@contextlib.contextmanager
def progress_artifact(stage: Stage) -> Generator[None]:
    """Update the progress artifact of one task while the block runs."""
    page = ProgressPage(key_of(stage.config.run.name, "stage", stage.index))
    with subscribed(page):
        try:
            yield
        finally:
            page.finish()


class _Renewed:
    """Something on Prefect's pages that is renewed in threads: an update can take minutes if the server is down."""

    def __init__(self, what: str, show: Callable[[Any], None]) -> None:
        """Keep what to show with, in the context of now, which says whose page it is on."""
        self._what, self._show, self._context = what, show, copy_context()
        self._update: threading.Thread | None = None
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time for an update, and the last one has ended."""
        return time.monotonic() - self._last >= _SECONDS_BETWEEN_UPDATES and not self.is_under_way

    @property
    def is_under_way(self) -> bool:
        """Whether an update has not ended yet."""
        return self._update is not None and self._update.is_alive()

    def start(self, content: Any) -> None:
        """Begin an update, behind the one before."""
        self._last = time.monotonic()
        renew = partial(self._context.copy().run, self._renew, self._update, content)
        self._update = threading.Thread(target=renew, daemon=True, name="progress")
        self._update.start()

    def _renew(self, before: threading.Thread | None, content: Any) -> None:
        if before is not None:
            before.join()
        with _never_failing(self._what):
            self._show(content)

    def wait(self) -> None:
        """Wait for the last update, at most some seconds."""
        if self._update is not None:
            self._update.join(_SECONDS_TO_FINISH)


class ProgressPage:
    """A progress artifact; it is created at the first update, so that a short task has none."""

    def __init__(self, key: str) -> None:
        """Set the key."""
        self.key = key
        self.artifact: UUID | None = None
        self.latest = self.shown = (0.0, "")
        self._renewed = _Renewed("progress", self._show)

    def __call__(self, event: Event) -> None:
        """Start an update if one is due and the last one has ended."""
        if not isinstance(event, (StepTaken, RowsCached)):
            return
        self.latest = _progress_of(event)
        begun = self._renewed.is_under_way or self.artifact is not None
        if self._renewed.is_due or (self.latest[0] == 100.0 and begun):  # an artifact that exists must reach 100 %
            self._start()

    def _start(self) -> None:
        self.shown = self.latest
        self._renewed.start(self.latest)

    def _show(self, latest: tuple[float, str]) -> None:
        percent, text = latest
        self.artifact = self.artifact or _there(self.key)
        if self.artifact is None:
            self.artifact = cast("UUID", create_progress_artifact(percent, self.key, text))  # typed for async too
        else:
            update_progress_artifact(self.artifact, percent, text)

    def finish(self) -> None:
        """Show where the task ended, if it has an artifact, and wait for that, at most some seconds."""
        if self._renewed.is_under_way or self.artifact is not None:
            if self.shown != self.latest:
                self._start()
            self._renewed.wait()


@contextlib.contextmanager
def live_page(name: str) -> Generator[None]:
    """Show on the page of the current flow run how far the run is, renewed every few seconds while the block lasts."""
    if flow_run.id is None:  # it was called without Prefect, and has no page
        yield
        return
    progress, ended, outcome = RunProgress(), threading.Event(), ""

    def renew() -> None:
        while not ended.wait(_SECONDS_BETWEEN_UPDATES):
            show()
        show()

    def show() -> None:
        with _never_failing("page of now"):
            _publish(progress.markdown(outcome), key_of(name, "now"), progress.line(outcome))

    # By the clock, and not by events, of which none comes during a long validation.
    clock = threading.Thread(target=copy_context().run, args=(renew,), daemon=True, name="progress")
    clock.start()
    try:
        with subscribed(progress):
            yield
        outcome = f"Done: see its artifact {key_of(name, 'report')}"
        get_run_logger().info(progress.line(outcome))
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        stopped = isinstance(error, StageInterruptedError)
        outcome = f"{'Stopped' if stopped else 'Failed'}: {escaped(reason)}"
        how = "was stopped" if stopped else "failed"
        get_run_logger().info("when it %s: %s. Finished stages and the last checkpoint are kept", how, progress.stood())
        raise
    finally:
        ended.set()
        clock.join(_SECONDS_TO_FINISH)


def _there(key: str) -> UUID | None:
    """Return this flow run's artifact of a key: a page lists every artifact, so there is one, renewed in place."""
    if flow_run.id is None:
        return None
    mine = {"key": {"any_": [key]}, "flow_run_id": {"any_": [flow_run.id]}}
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter.model_validate(mine), limit=1)
    return found[0].id if found else None


def _publish(content: str | list[dict[str, Any]], key: str, description: str) -> None:
    """Show markdown or a table; renew it if this flow run has shown one before, also in an earlier attempt."""
    if there := _there(key):
        data = content if isinstance(content, str) else json.dumps(content)
        with get_client(sync_client=True) as client:
            client.update_artifact(there, ArtifactUpdate(data=data, description=description))
    elif isinstance(content, str):
        create_markdown_artifact(content, key, description)
    else:
        create_table_artifact(content, key, description)


@contextlib.contextmanager
def _never_failing(what: str) -> Generator[None]:
    """Log a failed update and continue: the display must not stop the training."""
    try:
        yield
    except Exception as error:  # the HTTP client has many errors for a server that is down
        get_run_logger().warning("the %s on Prefect's pages was not updated: %s", what, error)


def _progress_of(event: StepTaken | RowsCached) -> tuple[float, str]:
    if isinstance(event, StepTaken):
        done, of, text = event.step, event.steps, f"step {event.step} of {event.steps}, loss {event.loss:.4f}"
    else:
        done, of, text = event.n_bytes, event.of_bytes, f"cached {size(event.n_bytes)} of {size(event.of_bytes)}"
    return 1000 * done // max(1, of) / 10, text  # a percentage in tenths, because the page prints every digit


def run_log() -> Subscriber:
    """Return a subscriber that writes progress to the log of the current flow run, every minute.

    Its page opens with that log; what a task or a subflow logs is on pages of their own.
    """
    if flow_run.id is None:  # it was called without Prefect, and has no page
        return lambda event: None
    return PlainLines(get_run_logger().info, seconds_between_steps=60.0)


def publish_run(config: StackWiseConfig, root: str) -> Subscriber:
    """Return a subscriber that publishes the stage table, the report and the loss plot after every stage."""
    name = config.run.name
    done: list[StageSummary] = []
    runs: dict[int, str] = {}
    n_stages = 0

    def publish(event: Event) -> None:
        nonlocal n_stages
        if isinstance(event, RunStarted):
            n_stages = event.n_stages
        if isinstance(event, StageOpened):
            runs[event.stage] = event.flow_run
        if isinstance(event, StageDone):
            done.append(event.summary)
            with _never_failing("stage table and report"):
                _publish([_row(summary) for summary in done], key_of(name, "stages"), f"Stages of {name}")
                text = report(name, root, done, runs, notes(config), n_stages)
                _publish(text, key_of(name, "report"), _sofar(done, n_stages))
                # Markdown, because the page of an image artifact prints its address, here the whole image.
                _publish(loss_plot(done), key_of(name, "loss"), f"Validation loss of {name} by stage")

    return publish


def _sofar(done: list[StageSummary], n_stages: int) -> str:
    """Return what the card of a report says on the run's own page."""
    judged = f", validation loss {loss(last)}" if (last := done[-1].validation_loss) is not None else ""
    return f"{len(done)} of {n_stages} stages are done{judged}"


def publish_comparison(document: dict[str, Any]) -> None:
    """Show a comparison on the page of the current flow run."""
    with _never_failing("comparison"):
        _publish(markdown(document), key_of(document["name"], "comparison"), f"Comparison {document['name']}")


def _row(summary: StageSummary) -> dict[str, Any]:
    """Return a row with the important columns first: the page shows 580 pixels of a table, the rest is scrolled to."""
    names = (name.removeprefix("|") for name in STAGE_COLUMNS)
    return {
        **dict(zip(names, map(shown, summary.cells), strict=True)),
        "trained": summary.trainable_parameters,
        "blocks": summary.blocks,
        **{f"at {percent(float(ratio))} masked": loss(value) for ratio, value in summary.by_mask_ratio.items()},
        "stack": summary.artifacts["stack"],
    }
