"""What a person is told, where and how often: by a clock that the test holds."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flows.run import live, terminal
from flows.run.events import (
    DataReady,
    Message,
    RowsCached,
    RunStarted,
    StageDone,
    StepTaken,
    TaskStarted,
    emit,
    stop_requested,
    stopping_on_signals,
    subscribed,
)
from flows.run.numbers import clock, parameters, size
from flows.run.run import add_stage
from flows.run.stage import Stage
from flows.run.terminal import LiveBars, PlainLines, showing
from stackwise_core.errors import StageInterruptedError
from support.clock import Clock, clock_of
from support.runs import grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


def step(number: int, stage: int = 1) -> StepTaken:
    return StepTaken(stage, number, 100, 2.5 - number / 100, n_tokens=64)


# ---------------------------------------------------------------- who hears


def test_everyone_who_listens_hears_for_as_long_as_they_listen() -> None:
    first, second = [], []
    with subscribed(first.append):
        emit(Message("a"))
        with contextlib.suppress(KeyError), subscribed(second.append):
            emit(Message("b"))
            raise KeyError
        emit(Message("c"))
    emit(Message("d"))
    assert [event.text for event in first] == ["a", "b", "c"]
    assert [event.text for event in second] == ["b"]


def test_a_run_tells_every_step_and_every_byte(tmp_path: Path) -> None:
    heard = grown(tiny(tmp_path, {"training.progressive.target_stacks": 2}), tmp_path / "a").events
    assert heard[0] == RunStarted("tiny", 2, str(tmp_path / "a"))
    assert [event.n_train for event in heard if isinstance(event, DataReady)] == [16]
    for stage in range(2):
        steps = [event for event in heard if isinstance(event, StepTaken) and event.stage == stage]
        assert [event.step for event in steps] == list(range(1, 13))
        assert {(event.steps, event.n_tokens) for event in steps} == {(12, 4 * 16)}
    cached = [
        (event.n_bytes, event.of_bytes) for event in heard if isinstance(event, RowsCached) and not event.computed
    ]
    total = (16 + 8) * 16 * 16 * 2
    assert cached == [(0, total), (16 * 16 * 16 * 2, total), (total, total)]
    done = [event for event in heard if isinstance(event, StageDone)]
    assert [event.summary.stage for event in done] == [0, 1]
    assert done[1].summary.validation_loss is not None


# ---------------------------------------------------------------- asked to stop


def test_the_first_signal_asks_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    heard: list[Any] = []
    with subscribed(heard.append):
        for number in (signal.SIGTERM, signal.SIGINT):
            with stopping_on_signals():
                assert not stop_requested()
                signal.raise_signal(number)
                assert stop_requested()
            assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert heard == [Message("stopping at the next safe point; once more to stop at once")] * 2
    with stopping_on_signals():
        assert not stop_requested()  # the request of an earlier run is not this one's
        signal.raise_signal(signal.SIGTERM)
        with stopping_on_signals():
            assert stop_requested()  # but it is one of every task of this run


def test_a_run_that_is_asked_between_two_tasks_stops_there(tmp_path: Path) -> None:
    def asked(event: Any) -> None:
        if isinstance(event, StageDone):
            signal.raise_signal(signal.SIGINT)

    def asked_first(stage: Stage) -> None:
        signal.raise_signal(signal.SIGTERM)
        add_stage(stage)

    with pytest.raises(StageInterruptedError, match="on request before stage 1; "), subscribed(asked):
        grown(tiny(tmp_path), tmp_path / "a")
    with pytest.raises(StageInterruptedError, match=r"on request before build-1-\w+; "):
        grown(tiny(tmp_path), tmp_path / "a", add=lambda stage: asked_first(stage) if stage.index else add_stage(stage))


def test_a_thread_leaves_signals_alone() -> None:
    seen: list[Any] = []

    def work() -> None:
        with stopping_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


# ---------------------------------------------------------------- Prefect's progress artifact


@pytest.mark.flow
def test_the_progress_artifact_is_updated_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update costs tens of milliseconds: 1,000 steps in 12 seconds are two of them."""
    from flows import artifacts

    monkeypatch.setattr(artifacts, "_SECONDS_BETWEEN_UPDATES", 5.0)
    now, calls = Clock(), []
    identity = uuid.uuid4()

    def create(percent: float, key: str, text: str) -> uuid.UUID:
        calls.append(("create", percent, key, text))
        return identity

    monkeypatch.setattr(artifacts, "time", now)
    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda *arguments: calls.append(("update", *arguments)))
    stage = SimpleNamespace(config=tiny(tmp_path, {"run.name": "My_Run.2"}), index=1)
    with artifacts.progress_artifact(stage):
        for number in range(1000):
            now.now = 1000.0 + number * 0.012
            emit(StepTaken(1, number, 1000, 1.5, 64))
            emit(TaskStarted(1, "train"))
            emit(Message("other events count for nothing"))
            until(lambda: not updates_under_way())
    assert [call[0] for call in calls] == ["create", "update", "update"]
    assert calls[0][1:] == (41.7, "my-run-2-stage-1", "step 417 of 1000, loss 1.5000")
    assert calls[1][1] == identity
    assert calls[1][2] == pytest.approx(83.4, abs=0.11)
    assert calls[2][2:] == (99.9, "step 999 of 1000, loss 1.5000")  # where the task ended

    with artifacts.progress_artifact(stage):
        emit(RowsCached(1, 2**20, 4 * 2**20))
        now.now += 60
        emit(RowsCached(1, 3 * 2**20, 4 * 2**20))
    assert calls[-1] == ("create", 75.0, "my-run-2-stage-1", "cached 3.0 MiB of 4.0 MiB")

    monkeypatch.setattr(artifacts, "_there", lambda key: identity)  # of the task before, or of an earlier attempt
    with artifacts.progress_artifact(stage):
        now.now += 60
        emit(RowsCached(1, 2**20, 4 * 2**20))
    assert calls[-1] == ("update", identity, 25.0, "cached 1.0 MiB of 4.0 MiB")


@pytest.mark.flow
def test_a_page_that_cannot_be_updated_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import artifacts

    monkeypatch.setattr(artifacts, "_SECONDS_BETWEEN_UPDATES", 5.0)
    now, warnings, calls = Clock(), [], []

    def down(*arguments: Any) -> None:
        calls.append(arguments)
        raise ConnectionError("the server is down")

    monkeypatch.setattr(artifacts, "time", now)
    monkeypatch.setattr(artifacts, "create_progress_artifact", down)
    monkeypatch.setattr(artifacts, "create_table_artifact", down)
    logger = SimpleNamespace(warning=lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logger)
    page = artifacts.ProgressPage("tiny-stage-0")
    for number in range(4):
        now.now += 3.0
        page(step(number + 1))
        until(lambda: not updates_under_way())
    assert len(calls) == 2  # tried again, and still no more often than by time
    heard = grown(tiny(tmp_path, {"training.progressive.target_stacks": 1}), tmp_path / "a").events
    publish = artifacts.publish_run(tiny(tmp_path), "a")
    for event in heard:
        publish(event)
    assert len(calls) == 3
    assert len(warnings) == 3
    assert all("was not updated: the server is down" in text for text in warnings)


@pytest.mark.flow
def test_progress_is_in_the_log_of_the_run_and_not_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import artifacts

    of_run, of_task = list[str](), list[str]()
    loggers = iter([SimpleNamespace(info=of_run.append), SimpleNamespace(info=of_task.append)])
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: next(loggers))
    monkeypatch.setattr(artifacts, "flow_run", SimpleNamespace(id="a flow run"))
    writes = artifacts.run_log()  # as the flow of the run begins
    writes(TaskStarted(1, "train"))
    writes(step(100))
    assert (len(of_run), of_task) == (2, [])
    assert of_run[1].startswith("stage 1: step 100/100, loss 1.5000")


@pytest.mark.flow
def test_progress_is_shown_by_time_and_ends_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import artifacts

    monkeypatch.setattr(artifacts, "_SECONDS_BETWEEN_UPDATES", 5.0)
    now, shown = Clock(), []
    monkeypatch.setattr(artifacts, "time", now)
    monkeypatch.setattr(
        artifacts, "create_progress_artifact", lambda percent, *_: shown.append(percent) or uuid.uuid4()
    )
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, percent, text: shown.append(percent))
    stage = SimpleNamespace(config=tiny(tmp_path), index=0)
    with artifacts.progress_artifact(stage):
        for number in range(1, 13):
            now.now += 1.0
            emit(StepTaken(0, number, 12, 2.5, 64))
            until(lambda: not updates_under_way())
    assert shown == [41.6, 83.3, 100.0]
    shown.clear()
    with artifacts.progress_artifact(stage):
        emit(StepTaken(0, 12, 12, 2.5, 64))
    assert shown == []  # over before a page of it was worth one


@pytest.mark.flow
def test_training_does_not_wait_for_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import artifacts

    monkeypatch.setattr(artifacts, "_SECONDS_BETWEEN_UPDATES", 5.0)
    now, shown, back = Clock(), [], threading.Event()

    def asked_for_over_a_minute(percent: float, *_: object) -> uuid.UUID:
        back.wait(240)  # whoever waits for this is told by what is shown then
        shown.append(percent)
        return uuid.uuid4()

    monkeypatch.setattr(artifacts, "time", now)
    monkeypatch.setattr(artifacts, "_SECONDS_TO_FINISH", 0.01)
    monkeypatch.setattr(artifacts, "create_progress_artifact", asked_for_over_a_minute)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, percent, text: shown.append(percent))
    with artifacts.progress_artifact(SimpleNamespace(config=tiny(tmp_path), index=0)):
        for number in range(1, 13):
            now.now += 6.0
            emit(StepTaken(0, number, 12, 2.5, 64))
        assert len(updates_under_way()) == 2  # the first, and the end behind it: none was begun in between
    assert shown == []
    back.set()
    until(lambda: not updates_under_way())
    assert shown == [8.3, 100.0]


def updates_under_way() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.flow
def test_artifact_keys_are_what_prefect_takes() -> None:
    from flows.artifacts import key_of

    assert key_of("My_Run.v2", "stage", 3) == "my-run-v2-stage-3"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key_of("A--b__", "stages"))


# ---------------------------------------------------------------- the terminal


def test_plain_lines_begin_end_and_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = clock_of(monkeypatch, live, terminal)
    lines = PlainLines()
    lines(RunStarted("tiny", 3, "/a"))
    lines(TaskStarted(-1, "prepare data"))
    lines(DataReady(12_345, 67))
    lines(TaskStarted(1, "train"))
    for number in range(1, 101):  # a step takes half a second
        now.now += 0.5
        lines(step(number))
    lines(RowsCached(1, 512, 2048))
    lines(RowsCached(1, 2048, 2048))
    lines(Message("by the way"))
    said = [_untimed(line) for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "run tiny: 3 stages in /a",
        "prepare data",
        "12,345 training and 67 validation sequences",
        "stage 1: train",
        *[
            f"stage 1: step {n}/100, loss {2.5 - n / 100:.4f}, {(100 - n) // 2} s left, 128 tokens/s"
            for n in (20, 40, 60, 80)
        ],
        "stage 1: step 100/100, loss 1.5000, 128 tokens/s",
        "stage 1: cached 2.0 KiB of 2.0 KiB",
        "by the way",
    ]


def _untimed(line: str) -> str:
    """Return a line of a log without the time of day at its beginning."""
    assert re.match(r"\d\d:\d\d:\d\d ", line)
    return line[9:]


def test_speed_counts_from_the_second_step_of_the_task(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed stage has 10 steps left at 1 s each: not 90 steps in no time. Its first step took 30 s to warm up."""
    now = clock_of(monkeypatch, live, terminal)
    lines = PlainLines(seconds_between_steps=0.0)
    now.now += 1000.0  # earlier tasks
    lines(TaskStarted(1, "train"))
    for number in range(91, 101):
        now.now += 30.0 if number == 91 else 1.0
        lines(step(number))
    said = capsys.readouterr().err.splitlines()
    for early in (1, 2, 3):  # a guess from fewer than three steps is often off by several times
        assert said[early].endswith(f"step {90 + early}/100, loss {1.6 - early / 100:.4f}")
    assert said[4].endswith("step 94/100, loss 1.5600, 6 s left, 64 tokens/s")
    assert said[-1].endswith("step 100/100, loss 1.5000, 64 tokens/s")


def test_no_bars_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with showing() as listener:
        assert isinstance(listener, PlainLines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with showing() as listener:
        assert isinstance(listener, LiveBars)
    assert capsys.readouterr().out == ""


def test_bars_show_stages_and_escape_names(tmp_path: Path) -> None:
    out = io.StringIO()
    bars = LiveBars(Console(file=out, width=150, force_terminal=True, color_system=None))
    with bars.live, subscribed(bars):
        grown(tiny(tmp_path, {"training.progressive.target_stacks": 2}), tmp_path / "a")
        bars(Message("[red]not markup[/red]"))
    text = out.getvalue()
    assert "tiny: 2 stages in" in text
    assert "[red]not markup[/red]" in text
    assert text.count("validation loss") >= 2
    assert all(f"✓ {done}" in text for done in ("corpus  ready", "stage 0 done", "stage 1 done"))
    assert not bars.progress.tasks  # what is done is left behind, so that a hundred stages fit on a screen


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (clock, 0.4, "0 s"),
        (clock, 59.4, "59 s"),
        (clock, 59.6, "1:00"),
        (clock, 187, "3:07"),
        (clock, 3723, "1:02:03"),
        (size, 512, "512 B"),
        (size, 1023, "1023 B"),
        (size, 3.5 * 2**20, "3.5 MiB"),
        (size, 2.0**41, "2.0 TiB"),
        (parameters, 912, "912"),
        (parameters, 43_210, "43.2 k"),
        (parameters, 43_000, "43.0 k"),
        (parameters, 124_000, "124 k"),
        (parameters, 999_900, "1.00 M"),
        (parameters, 1_270_000, "1.27 M"),
        (parameters, 7_000_000_000, "7.00 B"),
        (parameters, None, "-"),
    ],
)
def test_numbers_for_people(show: Callable[[Any], str], value: Any, text: str) -> None:
    assert show(value) == text


def test_a_listener_that_fails_fails_the_run_where_it_stands(tmp_path: Path) -> None:
    """Nothing is swallowed; what was sealed is there for the next run."""

    def listen(event: Any) -> None:
        if isinstance(event, StageDone):
            raise RuntimeError("no room on the page")

    with pytest.raises(RuntimeError, match="no room"), subscribed(listen):
        grown(tiny(tmp_path), tmp_path / "a", add=add_stage)
    assert grown(tiny(tmp_path), tmp_path / "a").made[0] == "build 1"
