"""Progress on stderr, as live bars on a terminal and as plain lines otherwise, and the stage tables."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from flows.run.events import (
    CorpusRead,
    DataReady,
    EndsAtOnce,
    Event,
    Judged,
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
from flows.run.live import Meter, of_rows, of_step, told
from flows.run.numbers import clock, percent, size
from flows.run.say import report, say, wrapped
from flows.run.summary import STAGE_COLUMNS, StageSummary
from stackwise_core.errors import shown


@dataclass(frozen=True)
class _Progress:
    """What an event says about a stage (-1: the corpus), as the text of a line or beside a bar."""

    stage: int
    task: str
    text: str
    """Its parts, by commas, the most important ones first."""
    completed: float | None = 1
    """None: as it was."""
    total: float | None = 1
    """None: a task has started, and its length is not known yet."""
    is_news: bool = True
    """Whether it is said at once, however short ago the last was."""


class _Describer:
    """Says in words what an event means."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._task = ""

    def describe(self, event: Event) -> str | _Progress | None:
        """Return a text about the whole run, the progress of a stage, or None if there is nothing to show."""
        pace = self.meter(event)
        match event:
            case RunStarted():
                return f"run {event.name}: {event.n_stages} stages in {event.folder}"
            case CorpusRead():
                total = max(event.of_bytes or 2 * event.n_bytes, event.n_bytes + 1)  # its end is not an event
                return _Progress(-1, event.what, _reading(event), event.n_bytes, total, is_news=False)
            case DataReady():
                text = f"{event.n_train:,} training and {event.n_validation:,} validation sequences"
                return _Progress(-1, "ready", text)
            case StageOpened() | StagesPriced() | TaskReused() | EndsAtOnce():
                return None
            case TaskStarted():
                self._task = event.task
                return _Progress(event.stage, event.task, "", 0, None)
            case StepTaken():
                news = event.validation_loss is not None or event.step == event.steps
                text = told(of_step(event, pace))
                return _Progress(event.stage, self._task or "train", text, event.step, event.steps, news)
            case RowsCached():
                done, text = max(event.n_bytes, event.computed), told(of_rows(event, pace))
                return _Progress(event.stage, "cache", text, done, event.of_bytes, event.n_bytes == event.of_bytes)
            case Judged() if self._task == "validate":
                return _Progress(event.stage, self._task, _judged(event), event.done, event.of, is_news=False)
            case Judged():  # inside a stage: its steps wait
                return _Progress(event.stage, self._task, _judged(event), None, None, is_news=False)
            case StageDone():
                return _Progress(event.stage, "done", event.summary.line)
            case Message():
                return event.text


def _judged(event: Judged) -> str:
    return f"validating, {event.done} of {event.of} {event.what}"


def _reading(event: CorpusRead) -> str:
    """Say how much of the corpus is read, how quickly, and how long the rest takes if its size is known."""
    speed = max(event.n_bytes, 1) / max(event.seconds, 1e-9)
    left = event.of_bytes - event.n_bytes
    known = f" of {size(event.of_bytes)}" if event.of_bytes else ""
    rest = f", {clock(left / speed)} left" if event.of_bytes and left >= 0 else ""
    return f"corpus: {event.what} {size(event.n_bytes)}{known}, {size(speed)}/s{rest}"


@contextmanager
def showing(*, quiet: bool = False, verbose: bool = False, lines: bool = False) -> Generator[Subscriber]:
    """Yield a subscriber that shows the progress of a run on stderr: as bars on a terminal, unless `lines`.

    `quiet` leaves out the progress, but not what is said of the run; `verbose` gives a line for every step and task.
    """
    console = plain_console(stderr=True)
    if quiet:
        yield lambda event: report(event.text) if isinstance(event, Message) else None
    elif lines or verbose or not sys.stderr.isatty() or console.is_dumb_terminal:
        yield PlainLines(seconds_between_steps=0.0 if verbose else 10.0)
    else:
        bars = LiveBars(console)
        with bars.live:
            console.show_cursor()  # a process that is killed cannot bring it back
            try:
                yield bars
            finally:
                bars.stop()


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

    def __call__(self, event: Event) -> None:
        """Write a line about the event, if it is due."""
        said = self._describer.describe(event)
        if isinstance(event, TaskReused) and self._seconds == 0.0:
            said = _Progress(event.stage, event.task, f"{event.task}: is there already")
        if isinstance(said, str):
            self._write(said)
        elif said and (said.is_news or time.monotonic() - self._last >= self._least_between(event)):
            self._last = time.monotonic()
            stage = f"stage {said.stage}: " if said.stage >= 0 else ""
            self._write(f"{stage}{said.text or said.task}")

    def _least_between(self, event: Event) -> float:
        """Return the seconds until a line about an event may follow: rows that are compared are no steps."""
        return max(self._seconds, 2.0) if isinstance(event, Judged) else self._seconds


def _print_line(text: str) -> None:
    with suppress(OSError):  # a reader that is gone must not stop the training
        report(text)


class LiveBars:
    """A bar per stage (its task, loss, time left, tokens/s, cache bytes), and one for the run below them."""

    def __init__(self, console: Console) -> None:
        """Draw on a console while `live` is entered."""
        self.console = console
        self.progress, self._whole = _progress(console), _progress(console)
        bars = _Narrower(Group(self.progress, self._whole))
        self.live = Live(bars, console=console, refresh_per_second=_FRAMES_PER_SECOND)
        self._bars: dict[int, tuple[str, TaskID]] = {}
        """Per stage: the task that is shown, and its bar."""
        self._describer = _Describer()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        said = self._describer.describe(event)
        if isinstance(said, str):
            self.console.print(Text(shown(said)))
        elif isinstance(event, EndsAtOnce):
            self.stop()
            self.live.stop()
        elif said:
            parts = said.text.removeprefix(f"corpus: {said.task} ").split(", ")
            self._show_run(said.stage)
            detail = tuple(shown(part) for part in parts if _FOR_RUN not in part)  # the bar of the run says it
            bar = self._bar_of(said)
            self.progress.update(bar, completed=said.completed, total=said.total, detail=detail)
            if isinstance(event, (DataReady, StageDone)):
                self._leave_behind(said.stage, bar)

    def _leave_behind(self, stage: int, bar: TaskID) -> None:
        """Print a bar that is done above the others, which fit on a screen however many stages there are."""
        drawn = self.progress.make_tasks_table([task for task in self.progress.tasks if task.id == bar])
        self.progress.remove_task(bar)
        del self._bars[stage]
        self.console.print(drawn)

    def _show_run(self, stage: int) -> None:
        """Move the bar of the run, which is there from the first stage on."""
        if (share := self._describer.meter.run_share) is None or stage < 0:
            return
        if not self._whole.tasks:
            self._whole.add_task("run", total=1.0, detail=self._of_run)
        self._whole.update(self._whole.task_ids[0], completed=share)

    def _of_run(self) -> tuple[str, ...]:
        """Return how far the run is as of now: between two events too the time left runs."""
        meter = self._describer.meter
        left = meter.run_seconds_left
        return (percent(meter.run_share or 0.0), *([] if left is None else [f"{clock(left)} left"]))

    def stop(self) -> None:
        """Show what is not finished as stopped: no process moves it any more."""
        for shown_ in (self.progress, self._whole):
            for task in shown_.tasks:
                if not task.finished:
                    detail = ("stopped", *_parts_said(task))
                    detail = tuple(part for part in detail if part and not part.endswith(" left"))
                    shown_.update(task.id, detail=detail, stopped=True)

    def _bar_of(self, said: _Progress) -> TaskID:
        """Return the bar of a task; each task gets a new one, because rich cannot reset a bar to unknown length."""
        task, bar = self._bars.get(said.stage, ("", None))
        if bar is not None and task == said.task:
            return bar
        if bar is not None:
            self.progress.remove_task(bar)
        name = f"stage {said.stage}" if said.stage >= 0 else "corpus"
        bar = self.progress.add_task(f"{name:<7} {said.task:<8}", total=said.total, detail=())
        self._bars[said.stage] = said.task, bar
        return bar


_FOR_RUN = " left of the run"
_FRAMES_PER_SECOND = 4


@dataclass(frozen=True)
class _Narrower:
    """Leaves room at the end of lines for the ^C that a terminal echoes: on a line of its own it would stay."""

    inside: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.inside, options.update_width(max(20, options.max_width - len("^C"))))


def _progress(console: Console) -> Progress:
    """Return bars without any: a mark, what it is, the bar, and as much of the detail as fits."""
    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=16))
    return Progress(
        _Mark(),
        what,
        _Bar(8 if console.width < 90 else 16),
        _Detail(table_column=Column(ratio=1)),
        console=console,
        expand=True,
    )


class _Mark(SpinnerColumn):
    """Turns while a task lasts, and says how it ended."""

    def __init__(self) -> None:
        super().__init__(finished_text="✓", style=None)  # the colour of the text, as of the bar

    def render(self, task: Task) -> RenderableType:
        return Text("■") if task.fields.get("stopped") else super().render(task)


class _Bar(ProgressColumn):
    """Fills with the colour of the text, so that it reads alike on light and dark backgrounds."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self._cells = cells

    def render(self, task: Task) -> Text:
        share = min(task.completed / task.total, 1.0) if task.total else 0.0
        return Text(f"{'█' * int(share * self._cells):░<{self._cells}}")


class _Detail(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return _Parts(_parts_said(task))


def _parts_said(task: Task) -> tuple[str, ...]:
    """Return the detail of a bar, which may be a function that says it as of now."""
    detail: tuple[str, ...] | Callable[[], tuple[str, ...]] = task.fields["detail"]
    return detail if isinstance(detail, tuple) else detail()


@dataclass(frozen=True)
class _Parts:
    """Parts of a line, of which those that fit are drawn: a number that is cut says something else."""

    parts: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Generator[RenderableType]:
        first = " ".join(self.parts[:1]).split()
        fits = [", ".join(self.parts[:n]) for n in range(len(self.parts), 0, -1)]
        fits += [" ".join(first[:n]) + " …" for n in range(len(first) - 1, 0, -1)]
        yield Text(next((text for text in fits if cell_len(text) <= options.max_width), ""), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


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
    table = plain_table("stage", "|masked here", *(f"|{percent(float(ratio))}" for ratio in ratios))
    for row in judged:
        losses = [f"{row.by_mask_ratio[ratio]:.4f}" for ratio in ratios]
        table.add_row(str(row.stage), percent(row.mask_ratio), *losses)
    return table


def plain_table(*columns: str) -> Table:
    """Return an empty table without lines; | before a name aligns the column right.

    Where it is too wide, headers and texts are wrapped, then it becomes several tables that begin with the same column:
    no number, date or name is cut.
    """
    table = _PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for name in columns:
        justify = "right" if name.startswith("|") else "left"
        table.add_column(name.removeprefix("|"), justify=justify, overflow="fold")
    return table


class TableOf(NamedTuple):
    """A table in text."""

    title: str
    columns: Sequence[str]
    """| before a name aligns the column right."""
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What the columns mean, for pages: a terminal has little room, and docs/reports.md."""
    short: str = ""
    """What of it a reader of the terminal cannot guess."""


def without_empty_columns(table: TableOf) -> TableOf:
    """Return a table without columns of which nothing is known, nor the sentences of notes that begin with one."""
    full = [at for at in range(len(table.columns)) if any(row[at] not in ("", "-") for row in table.rows)]
    empty = {name.removeprefix("|").lower() for at, name in enumerate(table.columns) if at not in full}

    def known(text: str) -> str:
        sentences = re.split(r"(?<=\.) (?=[A-Z])", text)
        return " ".join(each for each in sentences if each.partition(":")[0].lower() not in empty)

    return table._replace(
        columns=[table.columns[at] for at in full],
        rows=[[row[at] for at in full] for row in table.rows],
        note=known(table.note),
        short=known(table.short),
    )


def print_tables(tables: Iterable[TableOf]) -> None:
    """Print tables under their titles."""
    for each in tables:
        say("")
        plain_console().print(Text(each.title, style="bold"))
        drawn = plain_table(*each.columns)
        for row in each.rows:
            drawn.add_row(*row)
        plain_console().print(drawn)
        if each.short:
            say_hanging("", each.short)


def say_hanging(head: str, text: str) -> None:
    """Print a text behind a head; on a terminal its further lines begin below its first, and no word is cut."""
    if not sys.stdout.isatty():
        say(head + text)
        return
    width = max(plain_console().width - cell_len(head), 20)
    first, *more = wrapped(text, width)
    say(head + first, *(f"{'':<{len(head)}}{line}" for line in more))


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console on which a text is only drawn: nothing in it is markup, an emoji or a control character."""
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


class _PlainConsole(Console):
    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text, keep="\n"), **how)


class _PlainTable(Table):
    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        super().add_row(*(Text(shown(cell)) if isinstance(cell, str) else cell for cell in cells), **how)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        caption, columns = self.caption, self.columns
        parts = _parts_of(columns, options.max_width)
        for part in parts:
            self.columns, self.caption = part, caption if part is parts[-1] else None
            yield from super().__rich_console__(console, options)
        self.columns, self.caption = columns, caption


_GAP = 2
"""Cells between two columns."""
_TEXT = 14
"""Cells below which a column of text is not made narrower."""
_WORD = 40
"""Length of the longest word that is kept whole in a text."""


def _parts_of(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Cut columns into parts that fit a width, each with the first column and with the widths of all settled."""
    sizes = [_sizes(column) for column in columns]
    parts = [[0]]
    for at in range(1, len(columns)):
        if sum(sizes[other][1] + _GAP for other in (*parts[-1], at)) > width + _GAP and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(at)
    settled: list[list[Column]] = []
    for part in parts:
        widths = {at: sizes[at][0] for at in part}
        over = sum(widths.values()) + _GAP * (len(part) - 1) - width
        for at in sorted(part, key=lambda at: sizes[at][1] - sizes[at][0]):  # what can give most gives first
            given = max(0, min(over, widths[at] - sizes[at][1]))
            widths[at], over = widths[at] - given, over - given
        widths[part[-1]] = max(min(widths[part[-1]], _TEXT), widths[part[-1]] - max(0, over))  # a very long word breaks
        settled.append([replace(columns[at], width=widths[at], _index=place) for place, at in enumerate(part)])
    return settled


def _sizes(column: Column) -> tuple[int, int]:
    """Return how wide a column would be, and how wide it must be."""
    header, *cells = [str(cell) for cell in (column.header, *column.cells)]
    wide, words = max(map(cell_len, (header, *cells))), [max(map(cell_len, text.split()), default=0) for text in cells]
    longest = max(map(cell_len, header.split()), default=0)
    if column.justify == "right":
        return wide, max(longest, *map(cell_len, cells)) if cells else longest
    return wide, min(wide, max(_TEXT, min(max(words, default=0), _WORD)))
