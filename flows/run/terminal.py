"""Progress on stderr, as live bars on a terminal and as plain lines otherwise, and the stage tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from flows.run.events import (
    CorpusRead,
    DataReady,
    Event,
    Message,
    RowsCached,
    RunStarted,
    StageDone,
    StageOpened,
    StagesPriced,
    StepTaken,
    Subscriber,
    TaskReused,
    TaskStarted,
    subscribed,
)
from flows.run.live import Meter, Pace, of_step, told
from flows.run.numbers import clock, size
from flows.run.say import complain, say
from flows.run.summary import STAGE_COLUMNS, StageSummary
from stackwise_core.errors import shown


@dataclass(frozen=True)
class _Progress:
    """What an event says about a stage (-1: the corpus), as the text of a line or beside a bar."""

    stage: int
    task: str
    text: str
    completed: float = 1
    total: float | None = 1
    """None: a task has started, and its length is not known yet."""
    is_news: bool = False
    """Whether it is said at once, however short ago the last was."""


class _Describer:
    """Says in words what an event means."""

    def __init__(self) -> None:
        self._meter = Meter()

    def describe(self, event: Event) -> str | _Progress | None:
        """Return a text about the whole run, the progress of a stage, or None if there is nothing to show."""
        pace = self._meter(event)
        match event:
            case RunStarted():
                return f"run {event.name}: {event.n_stages} stages in {event.folder}"
            case CorpusRead():
                total = max(event.of_bytes or 2 * event.n_bytes, event.n_bytes + 1)  # its end is not an event
                return _Progress(-1, event.what, _reading(event), event.n_bytes, total)
            case DataReady():
                text = f"{event.n_train:,} training and {event.n_validation:,} validation sequences"
                return _Progress(-1, "ready", text)
            case StageOpened() | StagesPriced() | TaskReused():
                return None
            case TaskStarted():
                return _Progress(event.stage, event.task, "", 0, None)
            case StepTaken():
                validated = event.validation_loss is not None
                return _Progress(event.stage, "train", _step(event, pace), event.step, event.steps, validated)
            case RowsCached():
                text = f"cached {size(event.n_bytes)} of {size(event.of_bytes)}"
                return _Progress(event.stage, "cache", text, event.n_bytes, event.of_bytes)
            case StageDone():
                return _Progress(event.stage, "done", event.summary.line)
            case Message():
                return event.text


def _step(event: StepTaken, pace: Pace | None) -> str:
    return told(of_step(event, pace))


def _reading(event: CorpusRead) -> str:
    """Say how much of the corpus is read, how quickly, and how long the rest takes if its size is known."""
    speed = max(event.n_bytes, 1) / max(event.seconds, 1e-9)
    left = event.of_bytes - event.n_bytes
    known = f" of {size(event.of_bytes)}" if event.of_bytes else ""
    rest = f", {clock(left / speed)} left" if event.of_bytes and left >= 0 else ""
    return f"corpus: {event.what} {size(event.n_bytes)}{known}, {size(speed)}/s{rest}"


@contextmanager
def showing() -> Generator[Subscriber]:
    """Yield a subscriber that shows the progress of a run on stderr."""
    if not sys.stderr.isatty():
        yield PlainLines()
        return
    bars = LiveBars(plain_console(stderr=True))
    with bars.live:
        yield bars


@contextmanager
def reading_shown() -> Generator[None]:
    """Show on stderr how a command reads the corpus before anything else; a quick reading says nothing."""

    def show(event: Event) -> None:
        if isinstance(event, CorpusRead):
            lines(event)

    lines = PlainLines()
    with subscribed(show):
        yield


class PlainLines:
    """A line when a task begins or ends, and one every few seconds in between."""

    def __init__(self, write: Callable[[str], None] | None = None, seconds_between_steps: float = 10.0) -> None:
        """Write lines with `write`; by default they are printed to stderr."""
        self._write = write or _print_line
        self._seconds = seconds_between_steps
        self._describer = _Describer()
        self._last = 0.0
        self._n_stages = 0

    def __call__(self, event: Event) -> None:
        """Write a line about the event, if it is due."""
        if isinstance(event, RunStarted):
            self._n_stages = event.n_stages
        said = self._describer.describe(event)
        if isinstance(said, str):
            self._write(said)
        elif said and (
            said.is_news or said.total in (None, said.completed) or time.monotonic() - self._last >= self._seconds
        ):
            self._last = time.monotonic()
            stage = f"stage {said.stage} ({said.stage + 1} of {self._n_stages}): " if said.stage >= 0 else ""
            self._write(f"{stage}{said.text or said.task}")


def _print_line(text: str) -> None:
    with suppress(OSError):  # a reader that is gone must not stop the training
        complain(text)


class LiveBars:
    """A bar per stage: its task, loss, tokens/s, time left, cache bytes."""

    def __init__(self, console: Console) -> None:
        """Draw on a console while `live` is entered."""
        self.console = console
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
        )
        self.live = Live(self.progress, console=console, refresh_per_second=8)
        self._bars: dict[int, tuple[str, TaskID]] = {}
        """Per stage: the task that is shown, and its bar."""
        self._describer = _Describer()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        said = self._describer.describe(event)
        if isinstance(said, str):
            self.console.print(Text(shown(said)))
        elif said:
            bar = self._bar_of(said)
            self.progress.update(bar, completed=said.completed, total=said.total, detail=shown(said.text))

    def _bar_of(self, said: _Progress) -> TaskID:
        """Return the bar of a task; each task gets a new one, because rich cannot reset a bar to unknown length."""
        task, bar = self._bars.get(said.stage, ("", None))
        if bar is not None and task == said.task:
            return bar
        if bar is not None:
            self.progress.remove_task(bar)
        name = f"stage {said.stage}" if said.stage >= 0 else "corpus"
        bar = self.progress.add_task(f"{name:<9}{said.task:<9}", total=said.total, detail=shown(said.text))
        self._bars[said.stage] = said.task, bar
        return bar


def stage_tables(summaries: list[StageSummary]) -> Group:
    """Return the stage table and, if mask ratios differ, a table of losses at the ratios that all stages share."""
    stages = plain_table(*STAGE_COLUMNS)
    for summary in summaries:
        stages.add_row(*summary.cells)
    by_ratio = _ratio_table(summaries)
    return Group(stages, *(["", by_ratio] if by_ratio else []))


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
    table = _PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for name in columns:
        table.add_column(name.removeprefix("|"), justify="right" if name.startswith("|") else "left")
    return table


class TableOf(NamedTuple):
    """A table in text."""

    title: str
    columns: Sequence[str]
    """| before a name aligns the column right."""
    rows: Sequence[Sequence[str]]


def print_tables(tables: Iterable[TableOf]) -> None:
    """Print tables under their titles."""
    for each in tables:
        say("", each.title)
        drawn = plain_table(*each.columns)
        for column in drawn.columns:
            column.overflow, column.no_wrap = "fold", column.justify == "right"
        for row in each.rows:
            drawn.add_row(*row)
        plain_console().print(drawn)


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console on which a text is only drawn: nothing in it is markup, an emoji or a control character."""
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


class _PlainConsole(Console):
    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text, keep="\n"), **how)


class _PlainTable(Table):
    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        super().add_row(*(Text(shown(cell)) if isinstance(cell, str) else cell for cell in cells), **how)
