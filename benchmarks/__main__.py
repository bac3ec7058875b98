"""Run benchmarks: `python -m benchmarks [NAME...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

from benchmarks.harness import ROOT, machine, page, write

NAMES = (
    "training_step",
    "generate",
    "export",
    "import",
    "flow_overhead",
    "rerun",
    "cache_saving",
    "memory",
    "checkpoint",
    "large_vocabulary",
    "storage_types",
    "stream_types",
    "store_reading",
    "store_writing",
    "store_growth",
    "cache_feeding",
    "cache_fill",
    "data_parallel",
    "corpora",
)
DEEPER = "deeper_checkpoint"
LONG = (DEEPER, "queued_runs", "huge_corpus")
"""Those that take long: only by name."""


def main() -> int:
    """Run one benchmark in this process, or several in a separate one each: they must not share threads or imports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all these); {', '.join(LONG)}"
    )
    parser.add_argument("--quick", action="store_true", help="a few short rounds to try it out; writes no results")
    parser.add_argument("--artifacts", default="", metavar="FOLDER", help="folder kept, and resumed from")
    parser.add_argument("--checkpoint", default="", metavar="FOLDER", help=f"the model of {DEEPER}")
    parser.add_argument("--source", default="", metavar="FILE", help=f"the text of {DEEPER}")
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := [name for name in names if name not in NAMES + LONG]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES + LONG)}")
    own = {name: value for name in ("artifacts", "checkpoint", "source") if (value := getattr(options, name))}
    if own and names != [DEEPER]:
        parser.error(f"--{next(iter(own))} goes with {DEEPER} alone")
    if DEEPER in names and not {"checkpoint", "source"} <= own.keys():
        parser.error(f"{DEEPER} needs --checkpoint and --source")
    if len(names) == 1:
        run(names[0], options.quick, **own)
        return 0
    flags = ["--quick"] if options.quick else []
    commands = [[sys.executable, "-m", "benchmarks", name, *flags] for name in names]
    return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)


def run(name: str, quick: bool, **options: str) -> None:
    """Run one benchmark, show its table, and write its pages and plots if it has any."""
    signal.signal(signal.SIGTERM, _end)
    module = importlib.import_module(f"benchmarks.{name}")
    where, title = machine(), (module.__doc__ or "").strip()
    measures = module.measure(quick, **options)
    if not quick:
        write(name, title, where, measures)
        if hasattr(module, "publish"):
            module.publish(measures)
    print(page({"name": name, "title": title, "machine": where, "measures": [m.dump() for m in measures]}))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that servers and folders of a benchmark are removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
