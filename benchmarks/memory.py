"""Peak tensor memory while the k-th stage trains, depending on how much of the trunk is in memory.

The flow's training task with two steps. On a CPU, torch's profiler reports every allocation and release: the count is
exact and includes buffers inside operators, but not memory of numpy, such as tokens. On CUDA it is
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import RESULTS, Measure
from benchmarks.plot import line_chart
from flows.run.run import grow
from flows.run.stage import Stage
from flows.run.steps import build_stack, cache_activations, configure_trunk
from flows.run.training import train
from flows.run.validating import validate
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides

N_STACKS = 12
FLAT = 1.02
"""How much a stage with a cached trunk may differ from another, from the second on."""

PROGRESSIVE = "training.progressive"
END_TO_END = "end to end"
CACHED = "frozen, cached"
CASES: dict[str, dict[str, Any]] = {
    END_TO_END: {f"{PROGRESSIVE}.enabled": False},
    "frozen, recomputed": {f"{PROGRESSIVE}.cache_activations": False},
    CACHED: {},
    "qlora, NF4": {f"{PROGRESSIVE}.trunk_strategy": "qlora", f"{PROGRESSIVE}.new_stack_precision": "qlora"},
}


def measure(quick: bool) -> list[Measure]:
    n_stacks, d_model = (3, 64) if quick else (N_STACKS, 256)
    peaks = {case: _peaks(changes, n_stacks, d_model) for case, changes in CASES.items()}
    measures = [
        Measure(f"{k} stacks" if k > 1 else "1 stack", case, "MiB", [peaks[case][k - 1] / 2**20])
        for k in range(1, n_stacks + 1)
        for case in CASES
    ]
    later = peaks[CACHED][1:]
    flatness = Measure(f"2 to {n_stacks} stacks", f"{CACHED}: largest / smallest", "x", [max(later) / min(later)])
    return [*measures, Measure(flatness.case, flatness.what, "x", flatness.values, at_most=FLAT)]


def _peaks(changes: Mapping[str, Any], n_stacks: int, d_model: int) -> list[int]:
    """Return the peak bytes of training with 1 .. n stacks."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text("".join(random.Random(0).choices("stack wise\n", k=20_000)))
        if not changes.get(f"{PROGRESSIVE}.enabled", True):
            # Joint training has one stage, so every depth is a separate run.
            racks = [_grow(_config(corpus, changes, k, d_model), f"{scratch}/{k}") for k in range(1, n_stacks + 1)]
            return [peak for (peak,) in racks]
        return _grow(_config(corpus, changes, n_stacks, d_model), scratch)


def _grow(config: StackWiseConfig, root: str) -> list[int]:
    """Return the peak bytes of every stage's training."""
    peaks: list[int] = []

    def add(stage: Stage) -> None:
        build, trunk = build_stack(stage), configure_trunk(stage)
        with peak_bytes(stage.device) as peak:
            stack = train(stage, build, trunk)
        peaks.extend(peak)
        validate(stage, stack, cache_activations(stage, stack))

    grow(config, root, add=add)
    return peaks


def _config(corpus: Path, changes: Mapping[str, Any], n_stacks: int, d_model: int) -> StackWiseConfig:
    values: dict[str, Any] = {
        "data": {"source": str(corpus), "seq_len": 128, "validation_fraction": 0.2},
        "model": {"d_model": d_model, "blocks_per_stack": 2},
        "training": {
            "batch_size": 8,
            "steps_per_stack": 2,  # AdamW's moments exist from the second on
            "warmup_steps": 0,
            "progressive": {"target_stacks": n_stacks, "max_stacks": n_stacks, "training_objective": "clm"},
        },
        "hardware": {"threads": 1},
        "validation": {"max_sequences": 1, "sampled_rows": 1},
    }
    apply_overrides(values, dict(changes))
    return StackWiseConfig.from_dict(values)


# ---------------------------------------------------------------- counting bytes


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Generator[list[int]]:
    """Yield a list that holds one number after the block: the peak bytes of its tensors.

    Tensors that were allocated before the block and are released in it do not count.
    """
    peak: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    peak.append(peak_of((e["args"]["Addr"], e["args"]["Bytes"]) for e in allocations))


def peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """Return the peak of the bytes held.

    Args:
        allocations: (address, bytes) in order of time; negative bytes release the address.
    """
    held: dict[int, int] = {}
    now = peak = 0
    for address, n_bytes in allocations:
        # An unknown address was allocated before the block.
        now += n_bytes - held.pop(address, 0) if n_bytes > 0 else -held.pop(address, 0)
        if n_bytes > 0:
            held[address] = n_bytes
        peak = max(peak, now)
    return peak


# ---------------------------------------------------------------- the plot


def publish(measures: Sequence[Measure]) -> None:
    """Draw peak bytes against the number of stacks into results/memory.svg."""
    series = {
        case: [(float(m.case.split()[0]), m.median) for m in measures if m.what == case and m.unit == "MiB"]
        for case in CASES
    }
    chart = line_chart(series, "stacks of the rack", "peak bytes of tensors in training [MiB]", y_from=0.0)
    (RESULTS / "memory.svg").write_text(chart)
