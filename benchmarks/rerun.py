"""Time of `stackwise` commands with nothing to run: they must answer at once, without importing torch or Prefect."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, Measure, interleaved

SEALED_SECONDS = 3.0

# Runs what `stackwise` runs, then checks which modules it imported.
_LOOK = """
import sys
from flows.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "prefect"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def measure(quick: bool) -> list[Measure]:
    with tempfile.TemporaryDirectory() as scratch:
        train = ["train", "configs/quickstart.yaml", "--artifacts", str(Path(scratch) / "artifacts")]
        if quick:
            train += ["--set", "training.steps_per_stack=2", "--set", "training.warmup_steps=1"]
        _stackwise(train)
        commands = {"train, everything sealed": train, "--help": ["--help"]}
        for arguments in commands.values():
            _run([sys.executable, "-c", _LOOK, *arguments])
        seconds = interleaved({name: _caller(arguments) for name, arguments in commands.items()}, 3 if quick else 11)
    goals = {"train, everything sealed": SEALED_SECONDS, "--help": None}
    case = "whole process, neither torch nor prefect imported"
    return [Measure(case, f"stackwise {name}", "s", seconds[name], at_most=goals[name]) for name in commands]


def _caller(arguments: list[str]) -> Callable[[], None]:
    return lambda: _stackwise(arguments)


def _stackwise(arguments: list[str]) -> None:
    _run([str(Path(sys.executable).with_name("stackwise")), *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr[-2000:]}")
