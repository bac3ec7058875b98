"""Growing the quickstart rack as a Prefect flow, over the same stages called as plain functions."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

from benchmarks.harness import ROOT, Measure, interleaved, ratios
from flows.server import embedded_server, quiet_prefect
from stackwise_core.config import StackWiseConfig

AT_MOST = 1.1
_QUICK_STEPS = 20


def measure(quick: bool) -> list[Measure]:
    config = quickstart(steps=_QUICK_STEPS if quick else 0)
    quiet_prefect()
    with tempfile.TemporaryDirectory() as scratch:
        # A database of its own: what other runs wrote, or are writing, must not be in the measurement.
        os.environ["PREFECT_HOME"] = str(Path(scratch) / "prefect")
        seconds = _time(config, Path(scratch))
    case = "quickstart" + (f", {_QUICK_STEPS} steps a stage" if quick else "")
    return [
        Measure(case, "plain functions", "s", seconds["plain"]),
        Measure(case, "flow", "s", seconds["flow"]),
        Measure(case, "flow / plain", "x", ratios(seconds["flow"], seconds["plain"]), at_most=AT_MOST),
    ]


def _time(config: StackWiseConfig, scratch: Path) -> dict[str, list[float]]:
    with embedded_server(scratch / "server.log") as server:
        from flows.run import grow
        from flows.train_rack import train_rack

        server.wait_until_ready()
        # A folder of its own for every run: nothing may be there already.
        folders = (str(scratch / f"artifacts-{n}") for n in count())
        for run in (grow, train_rack):
            run(quickstart(steps=2), next(folders))
        return interleaved(
            {"plain": lambda: grow(config, next(folders)), "flow": lambda: train_rack(config, next(folders))},
            rounds=2,
            warmup=0,
        )


def quickstart(steps: int) -> StackWiseConfig:
    """Return the quickstart configuration, with so many steps a stage; 0 leaves them."""
    overrides = {"training.steps_per_stack": steps, "training.warmup_steps": 1} if steps else {}
    return StackWiseConfig.from_yaml(ROOT / "configs" / "quickstart.yaml", overrides)
