"""Batches made ahead: the same ones, in order, few at a time, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackwise_core.objectives.batches import prefetched
from stackwise_core.objectives.losses import Batch


class Source:
    """Numbered batches; it counts those made, and fails at one of them."""

    def __init__(self, n: int, fails_at: int = -1) -> None:
        self.n, self.fails_at = n, fails_at
        self.made = 0
        self.threads: set[str] = set()
        self.has_made = threading.Condition()

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.n):
            if number == self.fails_at:
                raise ZeroDivisionError(number)
            self.threads.add(threading.current_thread().name)
            with self.has_made:
                self.made += 1
                self.has_made.notify_all()
            yield {"number": number}

    def wait_for(self, n: int) -> bool:
        with self.has_made:
            return self.has_made.wait_for(lambda: self.made >= n, timeout=240)


@given(st.integers(0, 12), st.integers(1, 5))
def test_the_same_batches_in_order(n: int, depth: int) -> None:
    assert [batch["number"] for batch in prefetched(Source(n), depth)] == list(range(n))


def test_they_are_made_ahead_in_another_thread_and_no_further() -> None:
    source = Source(20)
    for number, _ in enumerate(prefetched(source, 3)):
        assert source.wait_for(min(20, number + 4))  # without being asked for the next
        assert source.made <= number + 4
    assert len(source.threads) == 1
    assert threading.current_thread().name not in source.threads


def test_an_error_comes_after_the_batches_before_it() -> None:
    batches = prefetched(Source(9, fails_at=3), 2)
    assert [next(batches)["number"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="3"):
        next(batches)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_caller_that_stops_early_stops_the_thread() -> None:
    source = Source(1000)
    batches = prefetched(source, 2)
    assert next(batches)["number"] == 0
    assert len(running()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert running() == []
    assert source.made <= 3
