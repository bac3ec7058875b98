"""Places where a process is killed or held, met in their order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from stackwise_core.failpoints import failpoint
from support.operating import until


@pytest.fixture
def caught() -> Generator[list[int]]:
    """Give the signals that this process gets from now on."""
    caught: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers}
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_place_is_met_once_and_in_turn(caught: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACKWISE_FAILPOINT", "train:2:USR1,cache:1:USR2")
    monkeypatch.setenv("STACKWISE_FAILPOINTS_MET", str(tmp_path))
    for task, step in [("cache", 1), ("train", 1), ("train", 2), ("train", 2), ("cache", 1), ("cache", 1)]:
        failpoint(task, step)
    assert caught == [signal.SIGUSR1, signal.SIGUSR2]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_without_a_folder_a_place_is_met_every_time(caught: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACKWISE_FAILPOINT", "train:2:USR1")
    failpoint("train", 2)
    failpoint("train", 2)
    assert caught == [signal.SIGUSR1, signal.SIGUSR1]


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGTERM])
def test_held_until_a_signal_comes(
    number: signal.Signals, caught: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGCONT lets it go on; SIGTERM does what it would do elsewhere, too."""
    monkeypatch.setenv("STACKWISE_FAILPOINT", "train:2:HOLD")
    monkeypatch.setenv("STACKWISE_FAILPOINTS_MET", str(tmp_path))
    before = {each: signal.getsignal(each) for each in (signal.SIGCONT, signal.SIGTERM, signal.SIGINT)}

    def signal_when_held() -> None:
        until((tmp_path / "0").exists, "process that is held")
        os.kill(os.getpid(), number)

    other = threading.Thread(target=signal_when_held)
    other.start()
    failpoint("train", 2)
    other.join()
    assert caught == [number] * (number == signal.SIGTERM)
    assert {each: signal.getsignal(each) for each in before} == before
