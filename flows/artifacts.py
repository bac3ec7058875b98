"""What Prefect's pages show of a run: progress while it works, the stage table and the report after each stage."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.numbers import clock, size, stage_line
from flows.progress import Event, Listener, RowsCached, StageDone, StepTaken
from flows.stage import Stage
from flows.summary import StageSummary
from flows.terminal import PlainLines

_SECONDS_BETWEEN_UPDATES = 5.0
"""An update costs tens of milliseconds on the server: by time, never by step."""


def key_of(*parts: object) -> str:
    """Return an artifact key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def progress_artifact(stage: Stage) -> Listener:
    """Return a listener that keeps a progress artifact of one task up to date."""
    artifact: UUID | None = None
    last = time.monotonic()

    def listen(event: Event) -> None:
        nonlocal artifact, last
        if not isinstance(event, (StepTaken, RowsCached)) or time.monotonic() - last < _SECONDS_BETWEEN_UPDATES:
            return
        last = time.monotonic()
        percent, text = _progress_of(event)
        with _never_failing("progress"):
            if artifact is None:
                key = key_of(stage.config.run.name, "stage", event.stage)
                artifact = cast("UUID", create_progress_artifact(percent, key, text))  # typed for async callers too
            else:
                update_progress_artifact(artifact, percent, text)

    return listen


@contextlib.contextmanager
def _never_failing(what: str) -> Generator[None]:
    """Log that a page could not be updated, and go on: no training stops for its display."""
    try:
        yield
    except Exception as error:  # whatever an HTTP client raises when a server is down or slow
        get_run_logger().warning("the %s on Prefect's pages was not updated: %s", what, error)


def _progress_of(event: StepTaken | RowsCached) -> tuple[float, str]:
    if isinstance(event, StepTaken):
        return 100.0 * event.step / event.steps, f"step {event.step} of {event.steps}, loss {event.loss:.4f}"
    done = f"cached {size(event.n_bytes)} of {size(event.of_bytes)}"
    return 100.0 * event.n_bytes / max(1, event.of_bytes), done


def run_log() -> Listener:
    """Return a listener that writes what happens into the log of the flow or task that runs, by the minute."""
    return PlainLines(lambda text: get_run_logger().info(text), seconds_between_steps=60.0)


def publish_run(name: str, root: str) -> Listener:
    """Return a listener that publishes the stage table and the run report after every stage."""
    done: list[StageSummary] = []

    def listen(event: Event) -> None:
        if isinstance(event, StageDone):
            done.append(event.summary)
            with _never_failing("stage table and report"):
                create_table_artifact([_row(summary) for summary in done], key_of(name, "stages"), f"Stages of {name}")
                create_markdown_artifact(report(name, root, done), key_of(name, "report"), f"Report of {name}")

    return listen


def _row(summary: StageSummary) -> dict[str, Any]:
    return {
        "stage": summary.stage,
        "how": summary.name,
        "blocks": summary.blocks,
        "parameters": summary.rack_parameters,
        "trained": summary.trainable_parameters,
        "training loss": _rounded(summary.train_loss),
        "validation loss": _rounded(summary.validation_loss),
        **{f"at {float(ratio):.0%} masked": _rounded(loss) for ratio, loss in summary.by_mask_ratio.items()},
        "time": clock(summary.seconds or 0.0),
        "cache": size(summary.cache_bytes) if summary.cache_bytes is not None else "none",
        "stack": summary.artifacts["stack"],
    }


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)


def report(name: str, root: str, stages: list[StageSummary]) -> str:
    """Return the run as markdown: a sentence and a paragraph per stage."""
    lines = [f"# {name}", "", f"{len(stages)} stages so far. Artifacts are in `{root}`.", ""]
    for stage in stages:
        lines += [f"## Stage {stage.stage}: {stage.name}", "", stage_line(stage) + ".", ""]
        lines += [f"- {kind}: `{artifact}` ({stage.states[kind]})" for kind, artifact in stage.artifacts.items()]
        if "activations" not in stage.artifacts:
            lines.append(f"- activations: none, {stage.cache_note}")
        lines.append("")
    return "\n".join(lines)
