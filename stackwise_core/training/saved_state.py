"""The state of a stage in a folder: safetensors and JSON, nothing that runs code when opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise_core.files import recover_folder, replace_folder, write_pieces
from stackwise_core.model.saving import mapped, safetensors_pieces
from stackwise_core.stages.state_header import read_header, write_header
from stackwise_core.training.training import TrainingState

_TENSORS = "state.safetensors"
_IN_A_THREAD = 64 * 2**20
"""Bytes from which a state is written while training goes on."""


class StateWriter:
    """Writes the states of a stage one after the other: a large one from a copy, in a thread, while training goes on.

    A kill then loses the steps since the state before it (docs/decisions/0033).
    """

    def __init__(self, write: Callable[[TrainingState], object]) -> None:
        """Take what writes a state durably."""
        self._write = write
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[object] | None = None
        self._copies: dict[str, Tensor] = {}
        """Memory on the CPU, used again for every state; pinned where the state is on a GPU."""

    def put(self, state: TrainingState) -> None:
        """Begin to write a state, whose tensors may change afterwards; waits for the one before, raises its error."""
        self.settle()
        if sum(tensor.nbytes for tensor in state.tensors.values()) < _IN_A_THREAD:
            self._write(state)
        else:
            self._pending = self._thread.submit(self._write, replace(state, tensors=self._copied(state.tensors)))

    def settle(self) -> None:
        """Wait until what was put is on the disk; raises what failed, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
    header = {"step": state.step, "tensors": digest, "records": state.records}
    more = {"fingerprint": state.fingerprint, "made_by": made_by}
    write_header(fresh, {**header, **{name: value for name, value in more.items() if value}})
    replace_folder(fresh, folder)


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]] | None:
    """Return the state in a folder and what it was made by; None if there is none, or if it is damaged."""
    recover_folder(folder)
    header, path = read_header(folder), folder / _TENSORS
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if header is None or digest != header["tensors"]:
            return None
        tensors = mapped(path)  # a stage holds the state that it began with, as long as it trains
    except (OSError, ValueError):
        return None
    state = TrainingState(header["step"], tensors, header["records"], header.get("fingerprint", {}))
    return state, header.get("made_by", {})
