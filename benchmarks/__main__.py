"""Run benchmarks: `python -m benchmarks [NAME...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

from benchmarks.harness import ROOT, machine, page, write

NAMES = ("training_step", "flow_overhead", "rerun")


def main() -> int:
    """Run one benchmark here, several in a process each: none inherits another's threads and imports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="few and short rounds, to try it out; writes nothing")
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if len(names) == 1:
        run(names[0], options.quick)
        return 0
    flags = ["--quick"] if options.quick else []
    commands = [[sys.executable, "-m", "benchmarks", name, *flags] for name in names]
    return max(subprocess.run(command, cwd=ROOT).returncode for command in commands)


def run(name: str, quick: bool) -> None:
    """Run one benchmark and show its table."""
    module = importlib.import_module(f"benchmarks.{name}")
    where, title = machine(), (module.__doc__ or "").strip()
    measures = module.measure(quick)
    if not quick:
        write(name, title, where, measures)
    print(page({"name": name, "title": title, "machine": where, "measures": [m.dump() for m in measures]}))


if __name__ == "__main__":
    sys.exit(main())
