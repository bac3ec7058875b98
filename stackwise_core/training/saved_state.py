"""The state of a stage in a folder: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise_core.errors import StackWiseError
from stackwise_core.failpoints import failpoint
from stackwise_core.files import recover_folder, replace_folder, sync, write_file, write_pieces
from stackwise_core.model.pieces import Pieces
from stackwise_core.model.saving import mapped, safetensors_pieces
from stackwise_core.stages.state_header import read_header, write_header
from stackwise_core.training.stage_model import ALONE, Ranks
from stackwise_core.training.training import TrainingState

_AGAIN = "run the same command again in a minute"
_LOOK_SECONDS = 0.02
_TENSORS = "state.safetensors"
_IN_A_THREAD = 64 * 2**20
"""Bytes from which a state is written while training goes on."""


class StateWriter:
    """Writes the states of a stage one after the other: a large one from a copy, in a thread, while training goes on.

    A kill then loses the steps since the state before it (docs/decisions/0033).
    """

    def __init__(self, write: Callable[[TrainingState], object]) -> None:
        """Take what writes a state durably; what it returns, if it can be called, is left to the thread in any case."""
        self._write = write
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[object] | None = None
        self._copies: dict[str, Tensor] = {}
        """Memory on the CPU, used again for every state; pinned where the state is on a GPU."""

    def put(self, state: TrainingState) -> None:
        """Begin to write a state, whose tensors may change afterwards; waits for the one before, raises its error."""
        self.settle()
        if sum(tensor.nbytes for tensor in state.tensors.values()) < _IN_A_THREAD:
            if callable(rest := self._write(state)):
                self._pending = self._thread.submit(rest)
        else:
            self._pending = self._thread.submit(self._write_all, replace(state, tensors=self._copied(state.tensors)))

    def _write_all(self, state: TrainingState) -> None:
        if callable(rest := self._write(state)):
            rest()

    def settle(self) -> None:
        """Wait until what was put is on the disk; raises what failed, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_gpu = [tensor for tensor in tensors.values() if tensor.is_cuda]
        for name, tensor in tensors.items():
            there = self._copies.get(name)
            if there is None or (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
                there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = there
            there.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(on_gpu[0].device)
        return {name: self._copies[name] for name in tensors}


def write_state(folder: Path, state: TrainingState, made_by: dict[str, Any] | None = None) -> None:
    """Replace the state in a folder; after a kill the old one or the new one is there. `made_by` is JSON beside it."""
    fresh = folder.with_name(f"{folder.name}.tmp")
    fresh.mkdir(parents=True, exist_ok=True)
    digest = write_pieces(fresh / _TENSORS, safetensors_pieces(state.tensors))
    _put(fresh, folder, state, {"tensors": digest, "made_by": made_by})


def write_shard(folder: Path, fresh: Path, state: TrainingState, ranks: Ranks) -> Callable[[], None] | None:
    """Write what one of several processes holds of a state to a folder that is theirs alone, `fresh`.

    In the first process, return what waits for the shards of all, and puts them in the place of the state in `folder`.
    It looks for them, since a collective in a thread would get between those of training; see docs/decisions/0034.
    """
    rank = ranks.rank
    fresh.mkdir(parents=True, exist_ok=True)
    try:
        digest = write_pieces(fresh / shard_file(rank), safetensors_pieces(state.tensors))
        sync(fresh / shard_file(rank))
        failpoint(f"shard-{rank}", state.step)
    except BaseException:
        _tell(fresh, rank, "")
        raise
    _tell(fresh, rank, digest)
    header = replace(state, tensors={})
    return partial(_put_together, folder, fresh, header, ranks) if rank == 0 else None


def _put_together(folder: Path, fresh: Path, state: TrainingState, ranks: Ranks) -> None:
    digests = [_told(fresh, other, ranks) for other in range(ranks.count)]
    for other in range(ranks.count):
        (fresh / f"rank-{other}.sha256").unlink()
    _put(fresh, folder, state, {"shards": digests})


def shard_file(rank: int) -> str:
    """Return the name of the file with what a process holds."""
    return f"rank-{rank}.safetensors"


def _tell(fresh: Path, rank: int, digest: str) -> None:
    """Let the first process know the digest of a shard, or by an empty file that there will be none."""
    note = fresh / f"rank-{rank}.sha256"
    write_file(note.with_suffix(".tmp"), digest.encode())
    note.with_suffix(".tmp").rename(note)


def _told(fresh: Path, rank: int, ranks: Ranks) -> str:
    """Wait until a process has written its shard, and return the digest; training notices first if it died."""
    note = fresh / f"rank-{rank}.sha256"
    while note.name not in os.listdir(fresh):  # opening a folder of NFS asks the server, looking for a file may not
        if ranks.failed:
            break
        time.sleep(_LOOK_SECONDS)
    else:
        if digest := note.read_text():
            return digest
    raise StackWiseError(f"rank {rank} could not write its share of the checkpoint; the one before stands")


def _put(fresh: Path, folder: Path, state: TrainingState, more: dict[str, Any]) -> None:
    """Write the header of a state whose tensors are in `fresh`, and replace the state in a folder."""
    header = {"step": state.step, "records": state.records, "fingerprint": state.fingerprint, **more}
    write_header(fresh, {name: value for name, value in header.items() if value or name in ("step", "records")})
    replace_folder(fresh, folder)


def read_state(
    folder: Path, ranks: Ranks = ALONE, tell: Callable[[str], object] = lambda why: None
) -> tuple[TrainingState, dict[str, Any]] | None:
    """Return the state in a folder and what it was made by; None if there is none, or if it is damaged.

    Of several processes all call this; each reads a share of the files to check it, and then only the rows that it
    holds. `tell` gets what is damaged.

    Raises:
        StackWiseError: processes on other nodes still see another state.
    """
    recover_folder(folder)
    header = read_header(folder)
    step, files = _step_and_files(header)
    if len(set(ranks.gather([step]))) > 1:
        raise StackWiseError(f"{folder}: not all nodes see the same checkpoint yet; {_AGAIN}")
    ours = list(enumerate(files.items()))[ranks.rank :: ranks.count]
    if damaged := ranks.gather([number for number, (name, digest) in ours if _digest(folder / name) != digest]):
        tell(f"{folder / list(files)[damaged[0]]} is damaged or missing")
        return None
    if header is None or not files:
        return None
    try:
        paths = [folder / name for name in files]
        # A stage holds the state that it began with, as long as it trains: mapped, or still on the disk.
        tensors = mapped(paths[0]) if len(paths) == 1 else Pieces(paths)
    except ValueError as error:
        tell(str(error))
        return None
    state = TrainingState(header["step"], tensors, header["records"], header.get("fingerprint", {}))
    return state, header.get("made_by", {})


def _step_and_files(header: dict[str, Any] | None) -> tuple[int, dict[str, str]]:
    """Return the step of a state, and the files of its tensors with their digests."""
    if header is None or not header.keys() >= {"step", "records"}:
        return -1, {}
    if shards := header.get("shards"):
        return header["step"], {shard_file(rank): digest for rank, digest in enumerate(shards)}
    return header["step"], {_TENSORS: header.get("tensors", "")}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
