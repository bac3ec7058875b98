"""What must be right on a card: its tests, and a stage that is stopped and resumed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Run
from benchmarks.harness import ROOT, Measure
from flows.run.events import StepTaken, request_stop, subscribed
from flows.run.reading import Reading
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import StageInterruptedError
from storage.adopt import plan_in
from storage.artifacts import artifacts_at

# ---------------------------------------------------------------- B: tests


def gpu_tests(run: Run) -> Iterator[Measure]:
    """The tests that are marked gpu, in this process; without a card they are skipped."""
    import pytest

    counts = {"passed": 0, "failed": 0, "skipped": 0}

    class Counting:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the plugins of an image are not ours
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    # pytest's own limit takes the place of the script's: a test that hangs ends the process.
    plain = ["-q", "-W", "default", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--rootdir", str(ROOT)]
    code = pytest.main(["-m", "gpu", *plain, *marked], plugins=[Counting()])
    yield Measure("tests marked gpu", "passed", "", [counts["passed"]], at_least=run.size(1, 0))
    yield Measure("tests marked gpu", "failed", "", [counts["failed"]], at_most=0)
    yield Measure("tests marked gpu", "skipped", "", [counts["skipped"]])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


# ---------------------------------------------------------------- C: stopped and resumed


def resumed_growth(run: Run) -> Iterator[Measure]:
    """Three stacks in bf16, twice undisturbed, and once stopped in every stage and resumed: equal weights."""
    corpus = run.scratch / "corpus.txt"
    corpus.write_text("".join(random.Random(0).choices("stack wise\n", k=run.size(400_000, 4_000))))
    steps, stop_at = run.size((40, 20), (2, 1))
    n_stacks = run.size(3, 2)
    config = _growth(run, corpus, n_stacks, steps)
    first, again, resumed = (run.scratch / name for name in ("first", "again", "resumed"))
    for root in (first, again):
        grow(config, str(root))
    stops = _grow_stopping(config, resumed, stop_at)
    wanted = _weights(config, first)
    yield Measure(f"{n_stacks} stacks in bf16", "files of weights that differ, undisturbed twice", "",
                  [_differ(wanted, _weights(config, again))], at_most=0)  # fmt: skip
    yield Measure(f"{n_stacks} stacks in bf16", f"files of weights that differ, stopped {stops} times", "",
                  [_differ(wanted, _weights(config, resumed))], at_most=0)  # fmt: skip


def _growth(run: Run, corpus: Path, n_stacks: int, steps: int) -> StackWiseConfig:
    progressive = {"target_stacks": n_stacks, "training_objective": "clm", "new_stack_precision": "bfloat16"}
    values: dict[str, Any] = {
        "data": {"source": str(corpus), "seq_len": run.size(256, 16), "validation_fraction": 0.1},
        "model": {"d_model": run.size(512, 16), "n_heads": run.size(8, 2), "blocks_per_stack": run.size(2, 1)},
        "training": {
            "batch_size": run.size(16, 2), "steps_per_stack": steps, "warmup_steps": 1, "progressive": progressive
        },
        "hardware": {"device": str(run.device), "threads": 1},
    }  # fmt: skip
    return StackWiseConfig.from_dict(values)


def _grow_stopping(config: StackWiseConfig, root: Path, stop_at: int) -> int:
    """Grow a rack, stopping once in every stage; return how often it was stopped."""
    met: set[int] = set()

    def stop(event: object) -> None:
        if isinstance(event, StepTaken) and event.step + 1 == stop_at and event.stage not in met:
            met.add(event.stage)
            request_stop()

    with subscribed(stop):
        while True:
            try:
                grow(config, str(root))
            except StageInterruptedError:
                continue
            return len(met)


def _weights(config: StackWiseConfig, root: Path) -> dict[str, str]:
    """Return the checksums of the weights of every stage, by stage and file."""
    artifacts = artifacts_at(str(root)).open()
    _, plan = plan_in(artifacts, config, Reading("read"))
    found: dict[str, str] = {}
    for stage in plan.stages:
        files = artifacts.manifest(stage.ref("stack")).files
        found |= {f"{stage.spec.index}/{name}": entry.checksum for name, entry in files.items() if entry.content}
    return found


def _differ(wanted: dict[str, str], found: dict[str, str]) -> int:
    return sum(wanted.get(name) != found.get(name) for name in wanted.keys() | found.keys())
