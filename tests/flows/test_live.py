"""How far a run is while it lives: its pace, the file beside its attempt, and what `status` says of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.cli import status
from flows.run import live, terminal
from flows.run.events import Judged, StagesPriced, StepTaken, TaskStarted, subscribed
from flows.run.live import LIVE, LiveFile, read_live
from flows.run.terminal import PlainLines
from support.clock import clock_of
from support.commands import Run
from support.runs import grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")


def test_time_left_of_the_run_is_by_flops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 1 takes 100 steps of 0.5 s; stage 2 costs three times as much, and stage 0 is there already."""
    now = clock_of(monkeypatch, live, terminal)
    lines = PlainLines(seconds_between_steps=0.0)
    lines(StagesPriced((0.0, 2e12, 6e12)))
    lines(TaskStarted(1, "train"))
    for number in range(1, 41):
        now.now += 0.5
        lines(StepTaken(1, number, 100, 2.0, n_tokens=64))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("30 s left, 3:00 left of the run (10\u00a0% trained), 128 tokens/s")
    lines(TaskStarted(2, "train"))
    for number in (1, 2, 3, 4):
        now.now += 1.5
        lines(StepTaken(2, number, 100, 2.0, n_tokens=64))
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("2:24 left, 43 tokens/s")
    )  # the last stage: the run's is the same


def test_a_line_for_every_step_is_none_for_every_row_that_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = clock_of(monkeypatch, live, terminal)
    lines = PlainLines(seconds_between_steps=0.0)
    lines(TaskStarted(1, "validate"))
    for done in range(1, 17):
        now.now += 0.3
        lines(Judged(1, done, 16, "cached rows compared"))
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["validate", "validating, 7 of 16 cached rows compared", "validating, 14 of 16 cached rows compared"]


def test_time_left_has_the_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 s and a validation 6 s: until one is measured, 2 s, as its FLOPs say at the speed of a step."""
    now = clock_of(monkeypatch, live)
    meter, record = live.Meter(), {"tokens_per_second": 64.0}
    # Stage 0 has validations after steps 10, 20 and at its end, and stage 1 those and is twice as dear.
    meter(StagesPriced((30e9, 60e9), ((30, 2e9), (30, 2e9)), every=10))
    meter(TaskStarted(0, "train"))

    def taken(step: int, loss: float | None = None) -> tuple[int, int]:
        now.now += 1.0 if loss is None else 7.0
        pace = meter(StepTaken(0, step, 30, 2.0, 64, validation_loss=loss, record=record))
        return (round(pace.seconds_left), round(pace.run_seconds_left or 0)) if pace else (0, 0)

    first = [taken(step) for step in range(1, 10)][-1]
    assert first == (21 + 2 * 2, 21 + 3 * 2 + 60 + 3 * 2)
    assert taken(10, 1.5) == (20 + 6, 20 + 2 * 6 + 60 + 3 * 6)
    assert [taken(step) for step in range(11, 20)][-1] == (11 + 6, 11 + 2 * 6 + 60 + 3 * 6)
    now.now += 5.0  # of the 7 s that the next step takes with its validation
    assert round(meter.run_seconds_left or 0) == 101 - 5
    now.now += 60.0  # it stands
    assert round(meter.run_seconds_left or 0) == 101 - 7
    meter(TaskStarted(0, "cache"))
    assert round(meter.run_seconds_left or 0) == 6 + 60 + 3 * 6
    meter(TaskStarted(1, "build"))
    assert round(meter.run_seconds_left or 0) == 60 + 3 * 6


def test_time_left_has_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 s; the first store takes 30 s instead of the 10 s of its FLOPs, and so will the second."""
    now = clock_of(monkeypatch, live)
    meter = live.Meter()
    meter(StagesPriced((30e9, 30e9, 30e9), filling=(10e9, 10e9, 0.0)))

    def left() -> int:
        return round(meter.run_seconds_left or 0)

    meter(TaskStarted(0, "train"))
    for step in range(1, 31):
        now.now += 1.0
        meter(StepTaken(0, step, 30, 2.0, 64))
    assert left() == 10 + 30 + 10 + 30
    meter(TaskStarted(0, "cache"))
    now.now += 10.0
    assert left() == 70
    now.now += 20.0  # it takes longer than it should
    assert left() == 70
    meter(TaskStarted(0, "validate"))
    assert left() == 30 + 30 + 30
    meter(TaskStarted(1, "train"))
    now.now += 5.0
    assert left() == 30 + 30 + 30
    meter(TaskStarted(2, "train"))
    assert left() == 30


def test_time_left_of_a_validation_is_by_what_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its FLOPs say 2 s; 16 rows take 2 s each, and three stacks 10 s each. The next stage takes 30 s and 2 s."""
    now = clock_of(monkeypatch, live)
    meter = live.Meter()
    meter(StagesPriced((30e9, 30e9), ((30, 2e9), (30, 2e9))))
    meter(TaskStarted(0, "train"))
    for number in range(1, 31):
        now.now += 1.0
        meter(StepTaken(0, number, 30, 2.0, 64))
    meter(TaskStarted(0, "validate"))
    for row in range(1, 17):
        now.now += 2.0
        meter(Judged(0, row, 16, "cached rows compared"))
        assert meter.run_seconds_left == pytest.approx((16 - row) * 2.0 + 2.0 + 32.0)
    for stack in range(1, 4):
        now.now += 10.0
        meter(Judged(0, stack, 3, "stacks"))
        assert meter.run_seconds_left == pytest.approx((3 - stack) * 10.0 + 32.0)
    meter(TaskStarted(1, "train"))
    meter(StepTaken(1, 30, 30, 2.0, 64))
    meter(TaskStarted(1, "validate"))
    assert meter.run_seconds_left == pytest.approx(2.0)
    now.now += 2.0  # it takes longer than it should, and how much longer nobody knows
    assert meter.run_seconds_left is None


def test_a_live_run_says_how_far_it_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(live, "_SECONDS_TO_TELL", 0.0)
    root, said = tmp_path / "a", list[str]()

    def look(event: object) -> None:
        if isinstance(event, StepTaken) and (event.stage, event.step) == (1, 5):
            said.append(run("status", "tiny", "--artifacts", root).out)
            said.append(run("status", "tiny", "--artifacts", root, "--json").out)
            with monkeypatch.context() as later:
                later.setattr(status, "time", SimpleNamespace(time=lambda: time.time() + 90))
                said.append(run("status", "tiny", "--artifacts", root).out)

    quick = {"training.steps_per_stack": 6, "training.progressive.target_stacks": 2}
    with subscribed(look):
        grown(tiny(tmp_path, quick), root)
    line = r"^stage 1, train: step 4/6, loss \d\.\d{4}, (\d+ s left, )?[\d,]+ tokens/s$"
    assert re.search(line, said[0], re.MULTILINE)
    assert re.search(r"^1 +stack-1-\w+ +being made\b", said[0], re.MULTILINE)
    assert re.search(r"^1 +validation-1-\w+ +absent\b", said[0], re.MULTILINE)
    assert re.search(r"^stage 1, train: step 4/6, .* tokens/s; that was 1:3\d ago$", said[2], re.MULTILINE)
    progress = json.loads(said[1])["progress"]
    assert (progress["stage"], progress["task"], progress["step"], progress["steps"]) == (1, "train", 4, 6)
    after = run("status", "tiny", "--artifacts", root, "--json").document
    assert "progress" not in after
    assert not list(root.rglob("*live.json*"))


def test_a_full_disk_or_a_damaged_file_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LiveFile(tmp_path / "missing")
    file(StepTaken(1, 1, 3, 2.0, 64))
    file = LiveFile(tmp_path)
    file(StepTaken(1, 1, 3, 2.0, 64))
    assert read_live(tmp_path) is not None
    file(StepTaken(1, 2, 3, 2.0, 64))
    assert (read_live(tmp_path) or {})["step"] == 1  # two seconds are not over
    for text in ("", "[1]", '{"stage": 1}', "{" * 10_000):
        (tmp_path / LIVE).write_text(text)
        assert read_live(tmp_path) is None
    (tmp_path / LIVE).unlink()
    assert read_live(tmp_path) is None


def test_follow_prints_what_changed_until_the_run_ends(
    reference: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [{"stage": 1, "task": "train", "at": 0.0, "step": n, "steps": 3, "loss": 2.0} for n in (1, 1, 2)]
    monkeypatch.setattr(status, "read_live", lambda folder: states.pop(0))
    monkeypatch.setattr(status, "is_live", lambda artifacts, name: bool(states))
    monkeypatch.setattr(status, "_SECONDS_BETWEEN_LOOKS", 0.0)
    lines = run("status", "tiny", "--artifacts", reference(), "--follow").out.splitlines()
    assert lines[:2] == ["stage 1, train: step 1/3, loss 2.0000", "stage 1, train: step 2/3, loss 2.0000"]
    assert lines[2].startswith("tiny: done")


@pytest.mark.parametrize("arguments", [(), ("tiny", "--json"), ("nobody",)])
def test_follow_wants_one_run(reference: Callable[..., Path], run: Run, arguments: tuple[str, ...]) -> None:
    said = run("status", *arguments, "--artifacts", reference(), "--follow")
    assert said.code == 2
