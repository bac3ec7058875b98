"""Progress on stderr, as live bars on a terminal and as plain lines otherwise, and the stage tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table

from flows.run.events import (
    DataReady,
    Event,
    Message,
    RowsCached,
    RunStarted,
    StageDone,
    StageOpened,
    StepTaken,
    Subscriber,
    TaskReused,
    TaskStarted,
)
from flows.run.numbers import clock, size
from flows.run.summary import STAGE_COLUMNS, StageSummary


class _Speed:
    """Tokens per second and time left, from the steps since a task began."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.steps = 0

    def update(self, event: StepTaken) -> tuple[float, float]:
        """Return (tokens/s, seconds left)."""
        self.steps += 1
        elapsed = max(time.monotonic() - self.began, 1e-9)
        return self.steps * event.n_tokens / elapsed, (event.steps - event.step) * elapsed / self.steps


@contextmanager
def showing() -> Generator[Subscriber]:
    """Yield a subscriber that shows the progress of a run on stderr."""
    if not sys.stderr.isatty():
        yield PlainLines()
        return
    bars = LiveBars(Console(stderr=True))
    with bars.live:
        yield bars


class PlainLines:
    """A line when a task begins or ends, and one every few seconds in between."""

    def __init__(self, write: Callable[[str], None] | None = None, seconds_between_steps: float = 10.0) -> None:
        """Write lines with `write`; by default they are printed to stderr."""
        self._write = write or _print_line
        self.seconds = seconds_between_steps
        self.speed = _Speed()
        self.last = 0.0
        self.n_stages = 0

    def __call__(self, event: Event) -> None:
        """Write a line about the event, if it is due."""
        match event:
            case RunStarted():
                self.n_stages = event.n_stages
                self._write(f"run {event.name}: {event.n_stages} stages in {event.folder}")
            case DataReady():
                self._write(_sequences(event))
            case TaskStarted():
                self.speed = _Speed()
                self._write_of(event.stage, event.task)
            case StepTaken():
                speed, left = self.speed.update(event)
                if event.step == event.steps or self._is_due():
                    step = f"step {event.step}/{event.steps}, loss {event.loss:.4f}"
                    self._write_of(event.stage, f"{step}, {speed:,.0f} tokens/s, {clock(left)} left")
            case RowsCached():
                if event.n_bytes == event.of_bytes or self._is_due():
                    self._write_of(event.stage, f"cached {size(event.n_bytes)} of {size(event.of_bytes)}")
            case StageDone():
                self._write_of(event.stage, event.summary.line)
            case Message():
                self._write(event.text)
            case StageOpened() | TaskReused():
                pass

    def _is_due(self) -> bool:
        return time.monotonic() - self.last >= self.seconds

    def _write_of(self, stage: int, text: str) -> None:
        self.last = time.monotonic()
        self._write(f"stage {stage} ({stage + 1} of {self.n_stages}): {text}" if stage >= 0 else text)


def _print_line(text: str) -> None:
    with suppress(OSError):  # a reader that is gone must not stop the training
        print(text, file=sys.stderr, flush=True)


def _sequences(event: DataReady) -> str:
    return f"{event.n_train:,} training and {event.n_validation:,} validation sequences"


class LiveBars:
    """A bar per stage: its task, loss, tokens/s, time left, cache bytes."""

    def __init__(self, console: Console) -> None:
        """Draw on a console while `live` is entered."""
        self.console = console
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[detail]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        self.live = Live(self.progress, console=console, refresh_per_second=8)
        self.bars: dict[int, TaskID] = {}
        self.showing: dict[int, str] = {}
        self.speed = _Speed()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        match event:
            case RunStarted():
                self.console.print(f"[bold]{escape(event.name)}[/]: {event.n_stages} stages in {escape(event.folder)}")
            case DataReady():
                self._update(-1, "ready", completed=1, total=1, detail=_sequences(event))
            case TaskStarted():
                self.speed = _Speed()
                self._update(event.stage, event.task, completed=0, total=None, detail="")
            case StepTaken():
                speed, left = self.speed.update(event)
                detail = f"{event.step}/{event.steps}  loss {event.loss:.4f}  {speed:,.0f} tokens/s  {clock(left)} left"
                self._update(event.stage, "train", completed=event.step, total=event.steps, detail=detail)
            case RowsCached():
                detail = f"{size(event.n_bytes)} of {size(event.of_bytes)}"
                self._update(event.stage, "cache", completed=event.n_bytes, total=event.of_bytes, detail=detail)
            case StageDone():
                self._update(event.stage, "done", completed=1, total=1, detail=event.summary.line)
            case Message():
                self.console.print(escape(event.text))
            case StageOpened() | TaskReused():
                pass

    def _update(self, stage: int, task: str, *, completed: float, total: float | None, detail: str) -> None:
        name = f"stage {stage}" if stage >= 0 else "corpus"
        description = f"{name:<9}{task:<9}"
        if self.showing.get(stage) != task:  # a new bar for a new task, since rich cannot reset one to unknown length
            if stage in self.bars:
                self.progress.remove_task(self.bars[stage])
            self.bars[stage] = self.progress.add_task(description, total=total, detail=detail)
            self.showing[stage] = task
        self.progress.update(self.bars[stage], completed=completed, total=total, detail=detail)


def stage_tables(summaries: list[StageSummary]) -> Group:
    """Return the stage table and, if mask ratios differ, a table of losses at the ratios that all stages share."""
    by_ratio = _ratio_table(summaries)
    return Group(_stage_table(summaries), *(["", by_ratio] if by_ratio else []))


def _stage_table(summaries: list[StageSummary]) -> Table:
    table = plain_table(*STAGE_COLUMNS)
    for summary in summaries:
        table.add_row(*summary.cells)
    return table


def _ratio_table(summaries: list[StageSummary]) -> Table | None:
    """Return the validation losses at shared mask ratios, or None if the ratios of the stages do not differ."""
    judged = [row for row in summaries if row.by_mask_ratio]
    if not judged:
        return None
    ratios = list(judged[0].by_mask_ratio)
    table = plain_table("stage", "|masked here", *(f"|{float(ratio):.0%}" for ratio in ratios))
    for row in judged:
        losses = [f"{row.by_mask_ratio[ratio]:.4f}" for ratio in ratios]
        table.add_row(str(row.stage), f"{row.mask_ratio:.0%}", *losses)
    return table


def plain_table(*columns: str) -> Table:
    """Return an empty table without lines; | before a name aligns the column right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name.removeprefix("|"), justify="right" if name.startswith("|") else "left")
    return table
