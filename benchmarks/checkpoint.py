"""How long training stands still for a checkpoint of 1 GB, compared with the time that writing it takes.

It stands still for the copy in memory. What the thread that writes then takes from cores that all compute is measured
apart: a product of matrices beside it, against the same alone.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.harness import Measure, ratios
from stackwise_core.training.saved_state import StateWriter, write_state
from stackwise_core.training.training import TrainingState

PARAMETERS = 83_000_000
"""With their two moments in float32: 1 GB."""
AT_MOST = 0.05


def measure(quick: bool) -> list[Measure]:
    state = state_of(PARAMETERS // 12 if quick else PARAMETERS)
    stalls, writes, slower = list[float](), list[float](), list[float]()
    written = threading.Event()
    written.set()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:

        def write(state: TrainingState) -> None:
            write_state(Path(folder, "state"), state)
            written.set()

        writer = StateWriter(write)
        for n in range(2 if quick else 8):
            alone = _seconds_of_a_product(written)
            written.clear()
            began = time.perf_counter()
            writer.put(state)
            stalled = time.perf_counter()
            beside = _seconds_of_a_product(written)
            writer.settle()
            if n:  # the first makes the memory of the copy
                stalls.append(stalled - began)
                writes.append(time.perf_counter() - stalled)
                slower.append(beside / alone)
    size = sum(tensor.nbytes for tensor in state.tensors.values()) / 1e9
    case = f"{size:.2f} GB, {torch.get_num_threads()} threads compute"
    return [
        Measure(case, "training stands still, of the time to write", "", ratios(stalls, writes), at_most=AT_MOST),
        Measure(case, "training stands still", "s", stalls),
        Measure(case, "a checkpoint is written", "s", writes),
        Measure(case, "a product of matrices meanwhile / alone", "", slower),
    ]


def state_of(n_parameters: int) -> TrainingState:
    """Return the state of 24 matrices, as AdamW leaves it."""
    kinds = ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")
    tensors = {kind.format(n): torch.randn(n_parameters // 24) for n in range(24) for kind in kinds}
    return TrainingState(1, tensors, [{"step": 0.0}])


def _seconds_of_a_product(until: threading.Event) -> float:
    """Return the seconds of a product of matrices, repeated ten times, and until something is done."""
    matrix, count, began = torch.randn(1024, 1024), 0, time.perf_counter()
    while count < 10 or not until.is_set():
        matrix = (matrix @ matrix).clamp_(-1.0, 1.0)
        count += 1
    return (time.perf_counter() - began) / count
