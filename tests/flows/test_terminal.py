"""What a terminal shows of a run: bars of every width, how they end, and the lines of a log."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from flows.run import live, terminal
from flows.run.events import (
    Event,
    Judged,
    Message,
    RowsCached,
    StagesPriced,
    StepTaken,
    TaskReused,
    TaskStarted,
    stopping_on_signals,
    subscribed,
)
from flows.run.say import complain, wrapped
from flows.run.terminal import LiveBars, PlainLines, TableOf, plain_console, print_tables, showing
from support.clock import Clock, clock_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stand for the time of the meter and of the lines."""
    return clock_of(monkeypatch, live, terminal)


def bars_of(width: int) -> LiveBars:
    return LiveBars(Console(file=io.StringIO(), width=width, force_terminal=True, markup=False))


def drawn(bars: LiveBars) -> list[str]:
    """Return the lines of the bars of now, without the spinner."""
    out = io.StringIO()
    Console(file=out, width=bars.console.width, color_system=None).print(bars.live.renderable)
    return [line[2:].rstrip() for line in out.getvalue().splitlines()]


def train(shows: Callable[[Event], None], clock: Clock, steps: int) -> None:
    shows(StagesPriced((0.0, 2e12, 6e12)))
    shows(TaskStarted(1, "train"))
    for number in range(1, steps + 1):
        clock.now += 0.5
        shows(StepTaken(1, number, 100, 2.0, n_tokens=64))


@pytest.mark.parametrize(
    ("width", "stage"),
    [
        (60, "stage 1 train    ███░░░░░ step 40/100, loss 2.0000"),
        (80, "stage 1 train    ███░░░░░ step 40/100, loss 2.0000, 30 s left, 128 tokens/s"),
        (120, "stage 1 train    ██████░░░░░░░░░░ step 40/100, loss 2.0000, 30 s left, 128 tokens/s"),
    ],
)
def test_bars_show_what_fits_and_cut_no_number(clock: Clock, width: int, stage: str) -> None:
    """The run: 40 of 100 steps of a stage that costs a quarter of it; 30 s, and three times 50 s."""
    bars = bars_of(width)
    train(bars, clock, 40)
    said = drawn(bars)
    assert said[0] == stage
    assert re.fullmatch(r"run +[█░]+ 10\u00a0%, 3:00 left", said[1])
    assert said[1].index("10\u00a0%") == said[0].index("step")


def test_the_bar_of_the_run_moves_in_its_last_stage_and_between_events(clock: Clock) -> None:
    bars = bars_of(80)
    bars(StagesPriced((0.0, 2e12)))
    bars(TaskStarted(1, "train"))
    for number in range(1, 41):
        clock.now += 0.5
        bars(StepTaken(1, number, 100, 2.0, n_tokens=64))
        assert re.fullmatch(rf"run +[█░]+ {number}\u00a0%(, \d+ s left)?", drawn(bars)[1])
    assert drawn(bars)[1].endswith("40\u00a0%, 30 s left")
    clock.now += 0.5
    assert drawn(bars)[1].endswith("40\u00a0%, 30 s left")  # 29.5
    clock.now += 60.0
    assert drawn(bars)[1].endswith("40\u00a0%, 30 s left")  # it stands: a step takes half a second
    bars(TaskStarted(1, "validate"))
    bars(Judged(1, 1, 2, "stacks"))
    assert drawn(bars)[1].endswith("40\u00a0%")  # nothing is known of it


def test_lines_leave_room_for_the_echo_of_a_key(clock: Clock) -> None:
    """On a full line the ^C of a terminal would go to the next one, and a line of the bars would stay behind it."""
    bars, out = bars_of(60), io.StringIO()
    train(bars, clock, 40)
    Console(file=out, width=60, color_system=None).print(bars.live.renderable)
    assert {len(line) for line in out.getvalue().splitlines()} == {60 - len("^C")}


def test_a_bar_moves_while_a_shard_is_computed_and_while_a_rack_is_judged(clock: Clock) -> None:
    bars = bars_of(80)
    train(bars, clock, 2)
    bars(Judged(1, 1, 2, "stacks"))
    assert drawn(bars)[0] == "stage 1 train    ░░░░░░░░ validating, 1 of 2 stacks"  # where its steps stand
    bars(TaskStarted(1, "cache"))
    bars(RowsCached(1, 0, 4096))
    clock.now += 3.0
    bars(RowsCached(1, 0, 4096, computed=3072))
    assert drawn(bars)[0] == "stage 1 cache    ██████░░ cached 0 B of 4.0 KiB, 3.0 KiB computed, 1 s left"
    bars(TaskStarted(1, "validate"))
    bars(Judged(1, 1, 2, "stacks"))
    assert drawn(bars)[0] == "stage 1 validate ████░░░░ validating, 1 of 2 stacks"


def test_what_is_stopped_looks_stopped(clock: Clock) -> None:
    bars = bars_of(80)
    train(bars, clock, 40)
    bars.stop()
    said = drawn(bars)
    assert said[0] == "stage 1 train    ███░░░░░ stopped, step 40/100, loss 2.0000, 128 tokens/s"
    assert said[1].endswith("stopped, 10\u00a0%")
    bars = bars_of(80)
    bars(TaskStarted(1, "train"))
    bars.stop()
    assert drawn(bars)[0] == "stage 1 train    ░░░░░░░░ stopped"


def test_the_second_signal_leaves_no_spinner_behind() -> None:
    """The process ends by the signal, as it must, after its bars have."""
    code = """
import io, signal, sys
from flows.run.events import TaskStarted, stopping_on_signals, subscribed
from flows.run.terminal import LiveBars
from rich.console import Console
bars = LiveBars(Console(file=sys.stderr, width=60, force_terminal=True, color_system=None))
with bars.live, subscribed(bars), stopping_on_signals():
    bars(TaskStarted(1, "train"))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rindex("■ stage 1 train    ░░░░░░░░ stopped") > done.stderr.rindex("stopping at the next")
    assert not re.search("[⠀-⣿]", done.stderr[done.stderr.rindex("■") :])


def test_quiet_says_what_is_noted_and_verbose_every_step(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with showing(quiet=True) as quiet:
        train(quiet, clock, 2)
        quiet(Message("stage 1 is worse"))
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == ["stage 1 is worse"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with showing(verbose=True) as verbose:
        verbose(TaskReused(0, "train"))
        train(verbose, clock, 2)
    assert capsys.readouterr().err.splitlines() == [
        "stage 0: train: is there already",
        "stage 1: train",
        *[f"stage 1: step {n}/100, loss 2.0000" for n in (1, 2)],
    ]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with showing() as listener:
        assert isinstance(listener, PlainLines)


def test_a_signal_is_answered_on_a_console_too(capsys: pytest.CaptureFixture[str]) -> None:
    bars = LiveBars(plain_console(stderr=True))
    with subscribed(bars), stopping_on_signals():
        signal.raise_signal(signal.SIGINT)
    assert "stopping at the next safe point" in capsys.readouterr().err


def test_a_number_stays_with_its_unit_where_a_line_is_wrapped() -> None:
    assert wrapped("weights 2.0 MiB, 48 steps, 1 block", 12) == ["weights", "2.0 MiB,", "48 steps,", "1 block"]


def test_an_error_is_wrapped_between_words_and_a_path_stays_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "/a/folder-with/a-name-that-is/longer-than.the-line"
    complain(f"stackwise: {path}: is damaged", "  of old")
    assert capsys.readouterr().err.splitlines() == [f"stackwise: {path}: is damaged", "  of old"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    complain(f"stackwise: {path}: is damaged; run the same command", "  of old", "")
    said = ["stackwise:", f"{path}:", "is damaged; run the same", "command", "  of old", ""]
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("width", [30, 60, 120])
def test_a_table_cuts_no_number_however_narrow(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    numbers = [[f"{stage}", "insert below 1, frozen, full", *(f"{stage}{n}.3456" for n in range(8))] for stage in "12"]
    print_tables([TableOf("Stages", ["|stage", "how", *(f"|loss {n}" for n in range(8))], numbers)])
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width
    words = out.split()
    assert {word for row in numbers for word in row[2:]} <= {*words}
    assert (words.count("insert"), words.count("below")) == (2, 2)
