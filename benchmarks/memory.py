"""Peak tensor memory while the k-th stage trains, depending on how much of the trunk is in memory; and its forecast.

The flow's training task with two steps; see `benchmarks.peak` for what is counted.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Measure
from benchmarks.peak import peak_bytes
from benchmarks.plot import line_chart
from flows.run.run import grow
from flows.run.stage import Stage
from flows.run.steps import build_stack, cache_activations, configure_trunk
from flows.run.training import train
from flows.run.validating import validate
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.stages.memory import memory

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
    found = {case: peaks(changes, n_stacks, d_model) for case, changes in CASES.items()}
    measures = [
        Measure(f"{k} stacks" if k > 1 else "1 stack", case, "MiB", [found[case][k - 1][0] / 2**20])
        for k in range(1, n_stacks + 1)
        for case in CASES
    ]
    later = [peak for peak, _ in found[CACHED][1:]]
    flat = f"{CACHED}: largest / smallest"
    flatness = Measure(f"2 to {n_stacks} stacks", flat, "x", [max(later) / min(later)], at_most=FLAT)
    forecasts = [
        Measure("every stage", f"{case}: forecast / peak", "x", [forecast / peak for peak, forecast in found[case]])
        for case in CASES
    ]
    return [*measures, flatness, *forecasts]


def peaks(changes: Mapping[str, Any], n_stacks: int, d_model: int) -> list[tuple[int, int]]:
    """Return the peak bytes of training with 1 .. n stacks, measured and forecast, with some values changed."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text("".join(random.Random(0).choices("stack wise\n", k=20_000)))
        if not changes.get(f"{PROGRESSIVE}.enabled", True):
            # Joint training has one stage, so every depth is a separate run.
            racks = [_grow(_config(corpus, changes, k, d_model), f"{scratch}/{k}") for k in range(1, n_stacks + 1)]
            return [stage for (stage,) in racks]
        return _grow(_config(corpus, changes, n_stacks, d_model), scratch)


def _grow(config: StackWiseConfig, root: str) -> list[tuple[int, int]]:
    """Return the peak bytes of every stage's training, measured and forecast."""
    found: list[tuple[int, int]] = []

    def add(stage: Stage) -> None:
        build, trunk = build_stack(stage), configure_trunk(stage)
        with peak_bytes(stage.device) as peak:
            stack = train(stage, build, trunk)
        found.append((peak[0], memory(stage.setting).peak))
        validate(stage, stack, cache_activations(stage, stack))

    grow(config, root, add=add)
    return found


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


# ---------------------------------------------------------------- the plot


def publish(measures: Sequence[Measure]) -> None:
    """Draw peak bytes against the number of stacks into results/memory.svg."""
    series = {
        case: [(float(m.case.split()[0]), m.median) for m in measures if m.what == case and m.unit == "MiB"]
        for case in CASES
    }
    chart = line_chart(series, "stacks of the rack", "peak bytes of tensors in training [MiB]", y_from=0.0)
    (RESULTS / "memory.svg").write_text(chart)
