"""Growing the quickstart rack as a Prefect flow, over the same stages called as plain functions."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

from benchmarks.harness import ROOT, Measure, interleaved, ratios
from flows.server import embedded_server, quiet_prefect
from stackwise_core.config import StackWiseConfig

AT_MOST = 1.1


def measure(quick: bool) -> list[Measure]:
    config = quickstart(steps=20 if quick else 0)
    quiet_prefect()
    with tempfile.TemporaryDirectory() as scratch, embedded_server(Path(scratch) / "server.log") as server:
        from flows.run import grow
        from flows.train_rack import train_rack

        server.wait_until_ready()
        # A folder of its own for every run: nothing may be there already.
        folders = (str(Path(scratch) / f"artifacts-{n}") for n in count())
        for run in (grow, train_rack):
            run(quickstart(steps=2), next(folders))
        seconds = interleaved(
            {"plain": lambda: grow(config, next(folders)), "flow": lambda: train_rack(config, next(folders))},
            rounds=2,
            warmup=0,
        )
    case = "quickstart" + (", 20 steps a stage" if quick else "")
    return [
        Measure(case, "plain functions", "s", seconds["plain"]),
        Measure(case, "flow", "s", seconds["flow"]),
        Measure(case, "flow / plain", "x", ratios(seconds["flow"], seconds["plain"]), at_most=AT_MOST),
    ]


def quickstart(steps: int) -> StackWiseConfig:
    """Return the quickstart configuration, with so many steps a stage; 0 leaves them."""
    overrides = {"training.steps_per_stack": steps, "training.warmup_steps": 1} if steps else {}
    return StackWiseConfig.from_yaml(ROOT / "configs" / "quickstart.yaml", overrides)
