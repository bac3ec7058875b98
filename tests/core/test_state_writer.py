"""States written in a thread: the bits of the moment, one after the other, and no error that is not told."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from stackwise_core.errors import NonFiniteLossError, StackWiseError, StageInterruptedError
from stackwise_core.model.saving import deserialised, safetensors_pieces, serialised
from stackwise_core.stages.stages import resolve_stage
from stackwise_core.stages.state_header import write_header
from stackwise_core.training import saved_state, training
from stackwise_core.training.saved_state import StateWriter, read_state, write_state
from stackwise_core.training.training import Hooks, StageInputs, TrainingState, train_stage
from support.training import STEPS, same_bits, stage_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread_per_module")


@pytest.fixture(autouse=True)
def _every_state_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_state, "_IN_A_THREAD", 0)


def state_of(step: int) -> TrainingState:
    tensors = {"model.w": torch.full((3, 5), float(step)).T, "optimizer.w.step": torch.tensor(float(step))}
    return TrainingState(step, tensors, [{"step": float(n)} for n in range(step)])


# ---------------------------------------------------------------- the file


def test_pieces_are_the_file_that_safetensors_would_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise_core.model.saving._PIECE", 24)
    floats = {name: torch.randn(shape) for name, shape in (("b", (7, 3)), ("a", ()), ("é\n", (2, 0)), ("c", (9,)))}
    pieces = list(safetensors_pieces({**floats, "b": floats["b"].T}))
    assert b"".join(pieces) == serialised({**floats, "b": floats["b"].T})
    assert max(map(len, pieces[1:])) == 24


def test_every_type_comes_back() -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    kinds += (torch.int8, torch.uint8, torch.bool)
    bits = torch.arange(-8, 32, dtype=torch.int8).view(torch.uint8)
    tensors = {str(kind): (bits % 2).bool() if kind is torch.bool else bits.view(kind) for kind in kinds}
    found = deserialised(b"".join(safetensors_pieces(tensors)))
    assert {name: tensor.dtype for name, tensor in found.items()} == {str(kind): kind for kind in kinds}
    assert all(found[name].view(torch.uint8).equal(tensors[name].view(torch.uint8)) for name in tensors)


def test_a_state_that_is_read_takes_no_memory_and_may_be_changed(tmp_path: Path) -> None:
    for step in (1, 2):  # the file of the first is replaced while it is still read
        write_state(tmp_path / "state", state_of(step))
        found = read_state(tmp_path / "state")
        assert found
        assert str(tmp_path / "state/state.safetensors") in Path("/proc/self/maps").read_text()
        assert same_bits(found[0].tensors, state_of(step).tensors)
        found[0].tensors["model.w"].zero_()
    again = read_state(tmp_path / "state")
    assert again
    assert same_bits(again[0].tensors, state_of(2).tensors)


def test_what_is_no_state_is_none_whatever_its_header_says(tmp_path: Path) -> None:
    write_state(tmp_path, state_of(1))
    for payload in (b"", b"no tensors", (2**62).to_bytes(8, "little")):
        (tmp_path / "state.safetensors").write_bytes(payload)
        write_header(tmp_path, {"step": 1, "tensors": hashlib.sha256(payload).hexdigest(), "records": []})
        assert read_state(tmp_path) is None


# ---------------------------------------------------------------- one state after the other


def test_a_state_is_as_it_was_when_it_was_put(tmp_path: Path) -> None:
    """The weights change before the thread begins to write, and memory is used again only when it has ended."""
    begin = threading.Event()

    def write(state: TrainingState) -> None:
        begin.wait()
        write_state(tmp_path / str(state.step), state)

    class Waiting(StateWriter):
        def settle(self) -> None:
            begin.set()
            super().settle()
            begin.clear()

    writer, live = Waiting(write), state_of(0).tensors
    for step in (1, 2, 3):
        for name, tensor in state_of(step).tensors.items():
            live[name].copy_(tensor)
        writer.put(TrainingState(step, dict(live), state_of(step).records))
        assert not (tmp_path / str(step)).exists()
    for tensor in live.values():
        tensor.fill_(-1.0)
    writer.settle()
    for step in (1, 2, 3):
        found = read_state(tmp_path / str(step))
        assert found
        assert (found[0].step, found[0].records) == (step, state_of(step).records)
        assert same_bits(found[0].tensors, state_of(step).tensors)


def test_the_memory_of_the_copy_is_used_again() -> None:
    places: list[set[int]] = []
    writer = StateWriter(lambda state: places.append({tensor.data_ptr() for tensor in state.tensors.values()}))
    for step in (1, 2):
        writer.put(state_of(step))
    new = {"model.new": torch.ones(2)}  # of a stack whose first step this was
    writer.put(TrainingState(3, {**state_of(3).tensors, **new}, []))
    writer.settle()
    assert places[0] == places[1] < places[2]


def test_a_small_state_is_on_the_disk_when_put_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_state, "_IN_A_THREAD", 65)  # 15 numbers and 1
    threads: list[threading.Thread] = []
    writer = StateWriter(lambda state: threads.append(threading.current_thread()))
    writer.put(state_of(1))
    assert threads == [threading.current_thread()]
    monkeypatch.setattr(saved_state, "_IN_A_THREAD", 64)
    writer.put(state_of(1))
    writer.settle()
    assert threads[1] != threads[0]


class FullError(StackWiseError):
    """A disk that is full."""


def fail(state: TrainingState) -> None:
    raise FullError(f"no space for step {state.step}")


def test_what_failed_is_told_once_by_the_next_call() -> None:
    writer = StateWriter(fail)
    writer.put(state_of(1))
    with pytest.raises(FullError, match="step 1"):
        writer.put(state_of(2))
    writer.settle()  # state 2 was not put
    writer.put(state_of(3))
    with pytest.raises(FullError, match="step 3"):
        writer.settle()


# ---------------------------------------------------------------- a stage


def train(writer: StateWriter, *, stop: int = -1, every: int = 2, minutes: float = 0.0) -> list[int]:
    """Train a tiny stage to its end, or to a stop; return the steps at which a state was put."""
    model, batches_from = stage_of(tiny(), 0)
    steps, taken = list[int](), list[object]()

    def put(state: TrainingState) -> None:
        steps.append(state.step)
        writer.put(state)

    hooks = Hooks(taken.append, put, settle=writer.settle, checkpoint_every=every, checkpoint_minutes=minutes)
    hooks.should_stop = lambda: len(taken) == stop
    train_stage(StageInputs(resolve_stage(tiny(), 0), model, batches_from(0)), hooks)
    return steps


def slow(write: Callable[[TrainingState], object]) -> StateWriter:
    """Return a writer that is not done with a state before somebody waits for it."""
    waited = threading.Event()

    def write_then(state: TrainingState) -> None:
        waited.wait()
        write(state)

    class Slow(StateWriter):
        def settle(self) -> None:
            waited.set()
            super().settle()
            waited.clear()

    return Slow(write_then)


def test_a_stop_waits_for_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StageInterruptedError):
        train(slow(partial(write_state, tmp_path / "state")), stop=3, every=0)
    found = read_state(tmp_path / "state")
    assert found
    assert found[0].step == 3


def test_the_end_of_a_stage_waits_too(tmp_path: Path) -> None:
    assert train(slow(partial(write_state, tmp_path / "state"))) == [2, 4, 6]
    found = read_state(tmp_path / "state")
    assert found
    assert found[0].step == 6


@pytest.mark.parametrize("stop", [-1, 2])
def test_a_checkpoint_that_failed_is_told_at_the_end_and_at_a_stop(stop: int) -> None:
    with pytest.raises(FullError, match="no space for step 2"):
        train(slow(fail), stop=stop)


def test_an_error_of_training_is_told_before_that_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    step_of = training.train_step

    def break_at_3(*args: object) -> dict[str, float]:
        record = step_of(*args)  # pyright: ignore[reportArgumentType]
        if record["step"] == 3:
            raise NonFiniteLossError("step 3")
        return record

    monkeypatch.setattr(training, "train_step", break_at_3)
    with pytest.raises(NonFiniteLossError):
        train(slow(fail))


def test_checkpoints_by_time_beside_those_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 25 s here, so that a minute is over after the third; each checkpoint begins a new minute."""
    hours = math.nan

    def clock() -> float:
        return hours

    model_step = training.train_step

    def slow_step(*args: object) -> dict[str, float]:
        nonlocal hours
        hours = 25.0 * (int(args[4]) + 1)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return model_step(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(training, "_now", clock)
    monkeypatch.setattr(training, "train_step", slow_step)
    hours = 0.0
    none = StateWriter(lambda state: None)
    assert train(none, every=0, minutes=1.0) == [3, 6]
    hours = 0.0
    assert train(none, every=4, minutes=1.0) == [3, 4]
    hours = 0.0
    assert train(none, every=0) == []
    assert STEPS == 7
