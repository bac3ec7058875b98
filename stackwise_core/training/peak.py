"""The most bytes that the tensors of a stage hold while it trains, to be shown beside the forecast."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from stackwise_core.objectives.losses import Batch

WATCHED = 20
"""The step of an attempt that is watched on a CPU, counted from 1."""


class Peak:
    """The peak of a stage: throughout on a CUDA device, which counts by itself, and of one step on a CPU.

    There torch's profiler reports every allocation and release of the step, which takes it some milliseconds. What was
    there before is added: the weights, the optimizer's state and the batch, each as large as its storage.
    """

    def __init__(self, device: torch.device, modules: Iterable[nn.Module], n_processes: int = 1) -> None:
        """Take the device, what is in its memory, and how many processes train.

        Of several, no step is watched: gradients lie in buffers of theirs.
        """
        self._device, self._modules = device, tuple(modules)
        self._watches = device.type == "cpu" and n_processes == 1
        self._steps, self._watched = 0, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def n_bytes(self) -> int | None:
        """Return what was measured so far; None if no step was."""
        if self._device.type == "cuda" and self._steps:
            return torch.cuda.max_memory_allocated(self._device)
        return self._watched or None

    @contextmanager
    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Generator[None]:
        """Take a step in the block, and watch it if it is its turn and nobody else is profiling."""
        self._steps += 1
        profiling: Any = torch.autograd
        if not self._watches or self._steps != WATCHED or profiling._profiler_enabled():
            yield
            return
        optimizer.zero_grad(set_to_none=True)  # or the last step's gradients would go while this one is watched
        weights = (tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers()))
        state = (value for values in optimizer.state.values() for value in values.values())
        held = _bytes_of((*weights, *state, *batch.values()))
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it would write two lines to stderr
        profiler: Any = profile(profile_memory=True)
        with profiler:
            yield
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = held
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()  # negative if it is released
            most = max(most, now)
        self._watched = most


def _bytes_of(values: Iterable[object]) -> int:
    storages = (value.untyped_storage() for value in values if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
