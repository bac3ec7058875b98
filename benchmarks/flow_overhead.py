"""Growing the quickstart rack as a Prefect flow, over the same stages called as plain functions.

Difference: flow less plain, by round. Its share of ten minutes is that of a run of as many stages that takes so long;
the updates of progress, which come by time, are in it for as long as the quickstart takes.
"""

from __future__ import annotations

import os
import tempfile
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
_QUICK_STEPS = 20


def measure(quick: bool) -> list[Measure]:
    config = quickstart(steps=_QUICK_STEPS if quick else 0)
    quiet_prefect()
    with tempfile.TemporaryDirectory() as scratch:
        # A database of its own: what other runs wrote, or are writing, must not be in the measurement.
        os.environ["PREFECT_HOME"] = str(Path(scratch) / "prefect")
        seconds = _time(config, Path(scratch))
    extra = [flow - plain for flow, plain in zip(seconds["flow"], seconds["plain"], strict=True)]
    n_stages = config.training.progressive.target_stacks
    a_stage, share = [each / n_stages for each in extra], [100 * each / 600 for each in extra]
    case = "quickstart" + (f", {_QUICK_STEPS} steps a stage" if quick else "")
    return [
        Measure(case, "plain functions", "s", seconds["plain"]),
        Measure(case, "flow", "s", seconds["flow"]),
        Measure(case, "flow / plain", "x", ratios(seconds["flow"], seconds["plain"]), at_most=AT_MOST),
        Measure(case, "difference a stage", "s", a_stage, at_most=AT_MOST_A_STAGE),
        Measure(case, "difference, of ten minutes", "%", share, at_most=AT_MOST_OF_TEN_MINUTES),
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
