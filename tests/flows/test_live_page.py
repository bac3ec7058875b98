"""What Prefect's page of a run shows while it lives: the numbers of now, and its curve so far."""

from __future__ import annotations

import base64
import itertools
import math
import re
import threading
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from flows.pages import progress as progress_module
from flows.pages.plots import running_mean
from flows.pages.progress import Curve, RunProgress
from flows.run import live
from flows.run.events import RowsCached, RunStarted, StageDone, StagesPriced, StepTaken, TaskStarted, emit
from support.clock import Clock, clock_of

pytestmark = pytest.mark.usefixtures("quick_disk")

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return clock_of(monkeypatch, live, progress_module)


def test_a_curve_keeps_the_mean_of_everything_in_few_points() -> None:
    curve, values = Curve(), [math.sin(step) for step in range(10_000)]
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    assert 100 <= len(curve.points) <= 300
    ends = [0, *(step for step, _ in curve.points)]
    for (start, end), (_, mean) in zip(itertools.pairwise(ends), curve.points, strict=True):
        assert mean == pytest.approx(math.fsum(values[start:end]) / (end - start))


def test_a_running_mean_begins_with_the_first_value_and_ends_with_a_mean() -> None:
    """A steep beginning is not flattened, and a last value that is noise does not bend the line."""
    means = running_mean([5.0, *[1.0] * 98, 4.0])
    assert (means[0], means[-1]) == (5.0, 2.0)


def steps(progress: RunProgress, now: Clock, stage: int, n: int, seconds: float) -> None:
    progress(TaskStarted(stage, "train"))
    for number in range(1, n + 1):
        now.now += seconds
        progress(StepTaken(stage, number, 10, 3.0 - number / 10, 640, 2e-3))


def test_the_numbers_of_now(now: Clock) -> None:
    progress = RunProgress()
    progress(RunStarted("tiny", 3, "/a"))
    assert "**preparing data**" in progress.markdown()
    progress(StagesPriced((1e12, 2e12, 4e12)))
    steps(progress, now, 0, 5, 1.0)
    text = progress.markdown()
    assert "**Stage 0 (the last is 2): step 5 of 10**" in text
    cells = dict(number.strip("*").split(" **") for number in text.splitlines()[2].split(" \u00b7 "))
    assert re.fullmatch(r"(\w+ \d+, )?\d\d:\d\d UTC", cells.pop("done about"))
    assert cells == {
        "trained": "7\u00a0%",
        "loss": "2.5000",
        "learning rate": "0.002",
        "tokens/s": "640",
        "left of the stage": "5 s",
        "left of the run": "1:05",  # 5 s, and six times the 10 s of this stage
    }
    assert "ago" not in text
    now.now += 40
    text = progress.markdown()
    assert "5 s after the start; the last step was 40 s ago." in text
    assert "left of the stage **4 s** \u00b7 left of the run **1:04**" in text  # it stands: a step takes no longer
    assert "ago" not in progress.markdown("Stopped")
    assert "left of" not in progress.markdown("Stopped") + progress.line("Stopped")  # nothing is
    assert progress.line() == "1:04 left, stage 0 step 5/10, loss 2.5000, 640 tokens/s, 7\u00a0% trained"
    progress(RowsCached(0, 0, 2**21, 2**20))
    assert "**Stage 0 (the last is 2): caching activations, 1.0 MiB of 2.0 MiB**" in progress.markdown()
    now.now += 10
    progress(RowsCached(0, 0, 2**21, 3 * 2**19))
    assert "left of the stage **10 s** \u00b7 left of the run **1:10**" in progress.markdown()
    assert (
        progress.line() == "1:10 left, stage 0 caching activations, 1.5 MiB of 2.0 MiB, 640 tokens/s, 7\u00a0% trained"
    )
    progress(TaskStarted(0, "validate"))
    assert "**Stage 0 (the last is 2): validating**" in progress.markdown()
    assert "left of the run **1:00**" in progress.markdown()
    assert "After all" in progress.markdown("After all")


def test_the_curve_goes_on_from_stage_to_stage(now: Clock) -> None:
    progress = RunProgress()
    progress(RunStarted("tiny", 2, "/a"))
    for stage in range(2):
        steps(progress, now, stage, 10, 1.0)
        progress(StageDone(stage, SimpleNamespace(validation_loss=2.5 - stage)))
    text = progress.markdown()
    assert "1.5000" in text
    (drawn,) = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", text)
    image = ElementTree.fromstring(base64.b64decode(drawn))
    (line,) = [each.get("points") for each in image.iter(f"{SVG}polyline")]
    xs = [float(point.split(",")[0]) for point in line.split()]
    assert len(xs) == 20
    assert xs == sorted(xs)
    dots = [float(each.get("cx")) for each in image.iter(f"{SVG}circle")]
    assert dots == [xs[9], xs[19]]
    assert "The line begins above" not in text


def test_losses_above_the_axis_are_said(now: Clock) -> None:
    progress = RunProgress()
    progress(RunStarted("tiny", 1, "/a"))
    progress(TaskStarted(0, "train"))
    for number in range(1, 21):
        progress(StepTaken(0, number, 20, 90.0 if number == 1 else 2.5, 640, 2e-3))
    assert "The line begins above the axis, at 90.0000." in progress.markdown()


class Ticks:
    """The timer of a page: waits as the test lets it, and notes for how long it was asked to."""

    def __init__(self) -> None:
        self.asked, self.ended = list[float](), False
        self._go, self._waiting = threading.Semaphore(0), threading.Semaphore(0)

    def set(self) -> None:
        self.ended = True
        self._go.release()

    def wait(self, seconds: float) -> bool:
        self.asked.append(seconds)
        self._waiting.release()
        self._go.acquire()
        return self.ended

    def tick(self) -> None:
        """Let a wait be over, and come back in the next one."""
        assert self._waiting.acquire(timeout=60)
        self._go.release()
        assert self._waiting.acquire(timeout=60)
        self._waiting.release()


@pytest.mark.flow
def test_it_is_renewed_by_the_clock_and_not_by_the_thread_that_trains(
    now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import artifacts

    shown, ticks = list[tuple[str, str, str]](), Ticks()
    timer = SimpleNamespace(Event=lambda: ticks, Thread=threading.Thread)
    monkeypatch.setattr(artifacts, "threading", timer)
    monkeypatch.setattr(artifacts, "_SECONDS_BETWEEN_UPDATES", 5.0)
    publish = lambda text, key, _: shown.append((threading.current_thread().name, key, text))  # noqa: E731
    monkeypatch.setattr(artifacts, "_publish", publish)
    monkeypatch.setattr(artifacts, "flow_run", SimpleNamespace(id="a flow run"))
    said = list[str]()
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: SimpleNamespace(info=said.append))
    with artifacts.live_page("My_Run"):
        emit(RunStarted("My_Run", 1, "/a"))
        for number in range(1, 13):
            now.now += 1.0
            emit(StepTaken(0, number, 12, 2.5, 64, 1e-3))
        assert shown == []
        ticks.tick()
        now.now += 60
        ticks.tick()  # nothing happened meanwhile
    assert [name for name, _, _ in shown] == ["progress"] * 3
    assert {key for _, key, _ in shown} == {"my-run-now"}
    assert ["step 12 of 12" in shown[0][2], "the last step was 1:00 ago" in shown[1][2]] == [True, True]
    assert "**Done: see its artifact my-run-report**" in shown[-1][2]
    assert ticks.asked == [5.0] * 3
    assert said == ["Done after 1:12: see its artifact my-run-report"]


@pytest.mark.flow
def test_a_failed_run_says_so_and_a_server_that_is_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import artifacts

    shown, warnings = list[str](), list[str]()

    def away(text: str, *_: Any) -> None:
        shown.append(text)
        raise ConnectionError("the server is away")

    monkeypatch.setattr(artifacts, "_publish", away)
    monkeypatch.setattr(artifacts, "flow_run", SimpleNamespace(id="a flow run"))
    infos = list[str]()
    logger = SimpleNamespace(
        warning=lambda text, *values: warnings.append(text % values),
        info=lambda text, *values: infos.append(text % values),
    )
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logger)
    events = [RunStarted("tiny", 3, "/a"), StagesPriced((1e12, 1e12, 2e12)), TaskStarted(1, "train")]

    def fail() -> None:
        for event in (*events, StepTaken(1, 6, 10, 2.5, 640, 1e-3, 2.75), StepTaken(1, 8, 10, 2.4, 640, 1e-3)):
            emit(event)
        raise ArithmeticError("stage 1: the loss is <b>not</b> finite\nand so on")

    with pytest.raises(ArithmeticError), artifacts.live_page("tiny"):
        fail()
    assert "**Failed: stage 1: the loss is \\<b\\>not" in shown[0]
    assert "Where it stood: stage 1 (the last is 2), step 8 of 10." in shown[0]
    assert "trained **45\u00a0%** \u00b7 loss **2.4000** \u00b7 last validation loss **2.7500**" in shown[0]
    assert "and so on" not in shown[0]
    stood = "stage 1 step 8/10, loss 2.4000, validation 2.7500 (2 steps before), 45\u00a0% trained"
    assert infos == [f"when it failed: {stood}. Finished stages and the last checkpoint are kept"]
    assert warnings == ["the page of now on Prefect's pages was not updated: the server is away"]
