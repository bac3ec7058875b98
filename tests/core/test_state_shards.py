"""A checkpoint in one file for each process: whole or not there, and read by as many processes as there are."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.errors import StackWiseError
from stackwise_core.model import pieces
from stackwise_core.model.pieces import rows_of, shape_of
from stackwise_core.training import saved_state
from stackwise_core.training.saved_state import read_state, write_shard
from stackwise_core.training.stage_model import Ranks
from stackwise_core.training.training import TrainingState

COUNT = 3
WHOLE = {"model.w": torch.arange(14.0).view(7, 2), "model.b": torch.tensor([5.0, 6.0]), "o.step": torch.tensor(9.0)}


def shard(step: int, rank: int) -> TrainingState:
    """What a rank holds: rows as torch cuts them, and of what has none the first rank has all."""
    cut = {name: [*tensor.chunk(COUNT)] if tensor.dim() else [tensor] for name, tensor in WHOLE.items()}
    held = {name: rows[rank] + step for name, rows in cut.items() if rank < len(rows)}
    return TrainingState(step, held, [{"step": float(n)} for n in range(step)], {"processes": COUNT})


def write(folder: Path, step: int, *ranks: int, failed: bool = False) -> None:
    for rank in ranks:
        one = Ranks()
        one.rank, one.count, one.failed = rank, COUNT, failed
        rest = write_shard(folder / "state", folder / f"fresh-{step}", shard(step, rank), one)
        assert (rest is not None) == (rank == 0)
        if rest:
            rest()


def standing(folder: Path) -> TrainingState:
    found = read_state(folder / "state")
    assert found
    return found[0]


def test_what_was_cut_in_three_comes_together_for_any_number_which_read_their_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    opened = pieces.safe_open

    class Slice:
        def __init__(self, found: Any, name: str, file: str) -> None:
            self.found, self.at, self.get_shape = found, f"{name} of {file}", found.get_shape

        def __getitem__(self, rows: slice) -> torch.Tensor:
            read.append((self.at, rows.start, rows.stop))
            return self.found[rows]

    class Opened:
        def __init__(self, path: Path, framework: str) -> None:
            self.file, self.path = opened(path, framework), path
            self.keys, self.get_tensor = self.file.keys, self.file.get_tensor

        def get_slice(self, name: str) -> Any:
            return Slice(self.file.get_slice(name), name, self.path.stem)

    monkeypatch.setattr(pieces, "safe_open", Opened)
    write(tmp_path, 4, 2, 1, 0)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["rank-0.safetensors", "rank-1.safetensors", "rank-2.safetensors", "state.json"]
    state = standing(tmp_path)
    assert (state.step, len(state.records), state.fingerprint) == (4, 4, {"processes": 3})
    assert {name: shape_of(state.tensors, name) for name in state.tensors} == {n: t.shape for n, t in WHOLE.items()}
    assert all(state.tensors[name].equal(tensor + 4) for name, tensor in WHOLE.items())
    assert not read
    for count in (1, 2, 4, 7):
        first = 0
        for rows in (WHOLE["model.w"] + 4).chunk(count):
            assert rows_of(state.tensors, "model.w", first, first + len(rows)).equal(rows)
            first += len(rows)
    read.clear()
    rows_of(state.tensors, "model.w", 4, 7)  # of the second of two
    assert read == [("model.w of rank-1", 1, 3), ("model.w of rank-2", 0, 1)]
    assert rows_of(state.tensors, "model.w", 7, 7).shape == (0, 2)


def test_the_state_before_stands_until_the_shards_of_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 1, 2, 0)
    waits, go_on = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        go_on.wait()

    monkeypatch.setattr(saved_state.time, "sleep", sleep)
    write(tmp_path, 2, 1)
    first = threading.Thread(target=write, args=(tmp_path, 2, 0))
    first.start()
    waits.wait()
    assert standing(tmp_path).step == 1
    write(tmp_path, 3, 1)  # a rank that is ahead does not write into what the first one puts in place
    write(tmp_path, 2, 2)
    go_on.set()
    first.join()
    state = standing(tmp_path)
    assert state.step == 2
    assert all(state.tensors[name].equal(WHOLE[name] + 2) for name in WHOLE)
    write(tmp_path, 3, 2, 0)
    assert standing(tmp_path).step == 3


@pytest.mark.parametrize("harm", ["gone", "damaged", "of another step"])
def test_a_shard_that_is_not_what_it_was_is_named(harm: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 2, 0)
    file, told = tmp_path / "state/rank-1.safetensors", list[str]()
    if harm == "gone":
        file.unlink()
    elif harm == "damaged":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        write(tmp_path, 2, 1)
        (tmp_path / "fresh-2/rank-1.safetensors").replace(file)
    assert read_state(tmp_path / "state", tell=told.append) is None
    assert told == [f"{file} is damaged or missing"]


def test_a_rank_that_cannot_write_is_named_and_the_state_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 1, 2, 0)

    def full(path: Path, of: Any) -> str:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "write_pieces", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 2, 1)
    with pytest.raises(StackWiseError, match="rank 1 could not write its share of the checkpoint; the one before sta"):
        write(tmp_path, 2, 0)
    assert standing(tmp_path).step == 1


def test_a_rank_that_died_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 2, 0)
    write(tmp_path, 2, 1)
    with pytest.raises(StackWiseError, match="rank 2 could not write its share"):
        write(tmp_path, 2, 0, failed=True)
    assert standing(tmp_path).step == 1
