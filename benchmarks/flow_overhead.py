"""Overhead of growing the quickstart rack as a Prefect flow, compared with plain calls of the same stages.

The difference is flow minus plain in each round. The cost per stage is measured with short stages, whose training time
hides little of it. Progress updates depend on time, so the share of ten minutes is measured with full-length stages and
scaled to a run of ten minutes with as many stages.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.harness import ROOT, Measure, interleaved, ratios
from flows.server import embedded_server, quiet_prefect
from stackwise_core.config import StackWiseConfig

AT_MOST = 1.1
AT_MOST_A_STAGE = 2.0
"""Seconds."""
AT_MOST_OF_TEN_MINUTES = 2.0
"""Percent."""
_SHORT_STEPS, _SHORT_ROUNDS, _WHOLE_ROUNDS = 20, 6, 2
_SHORT, _WHOLE = f"quickstart, {_SHORT_STEPS} steps a stage", "quickstart"


def measure(quick: bool) -> list[Measure]:
    quiet_prefect()
    with tempfile.TemporaryDirectory() as scratch:
        # A separate database, so that other runs do not affect the measurement.
        os.environ["PREFECT_HOME"] = str(Path(scratch) / "prefect")
        with embedded_server(Path(scratch) / "server.log") as server:
            server.wait_until_ready()
            # A new folder for every run, so that every artifact must be made.
            folders = (f"{scratch}/artifacts-{n}" for n in count())
            _seconds(quickstart(steps=2), folders, rounds=1)  # imports and compiles
            short = _seconds(quickstart(steps=_SHORT_STEPS), folders, rounds=2 if quick else _SHORT_ROUNDS)
            whole = None if quick else _seconds(quickstart(steps=0), folders, rounds=_WHOLE_ROUNDS)
    n_stages = quickstart(steps=0).training.progressive.target_stacks
    measures = [
        *_both(_SHORT, short),
        Measure(_SHORT, "difference a stage", "s", _difference(short, 1 / n_stages), at_most=AT_MOST_A_STAGE),
    ]
    if whole is None:
        return measures
    return [
        *measures,
        *_both(_WHOLE, whole),
        Measure(_WHOLE, "flow / plain", "x", ratios(whole["flow"], whole["plain"]), at_most=AT_MOST),
        Measure(_WHOLE, "difference, of ten minutes", "%", _difference(whole, 1 / 6), at_most=AT_MOST_OF_TEN_MINUTES),
    ]


def _seconds(config: StackWiseConfig, folders: Iterator[str], rounds: int) -> dict[str, list[float]]:
    from flows.run.run import grow
    from flows.train_rack import train_rack

    ways = {"plain": lambda: grow(config, next(folders)), "flow": lambda: train_rack(config, next(folders))}
    return interleaved(ways, rounds=rounds, warmup=0)


def _both(case: str, seconds: dict[str, list[float]]) -> list[Measure]:
    return [Measure(case, way, "s", seconds[way]) for way in ("plain", "flow")]


def _difference(seconds: dict[str, list[float]], times: float) -> list[float]:
    """Return the extra time of the flow over the plain functions in each round, times a factor."""
    return [times * (flow - plain) for flow, plain in zip(seconds["flow"], seconds["plain"], strict=True)]


def quickstart(steps: int) -> StackWiseConfig:
    """Return the quickstart configuration with `steps` steps per stage; 0 keeps its own number."""
    overrides = {"training.steps_per_stack": steps, "training.warmup_steps": 1} if steps else {}
    return StackWiseConfig.from_yaml(ROOT / "configs" / "quickstart.yaml", overrides)
