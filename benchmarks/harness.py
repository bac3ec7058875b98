"""Measuring candidates in turn, and writing the results."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


# ---------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Measure:
    """One quantity, with one value per round."""

    case: str
    """Under which circumstances."""
    what: str
    unit: str
    values: Sequence[float]
    at_least: float | None = None
    """The goal, where there is one."""
    at_most: float | None = None

    @property
    def median(self) -> float:
        """The median over the rounds, which goals are compared with."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Return whether the median meets the goal; None without a goal."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.median >= self.at_least) and (
            self.at_most is None or self.median <= self.at_most
        )

    def dump(self) -> dict[str, Any]:
        """Return the values as JSON, with the numbers derived from them."""
        low, high = quartiles(self.values)
        summary = {"median": self.median, "quartiles": [low, high], "range": [min(self.values), max(self.values)]}
        return {**dataclasses.asdict(self), **summary, "met": self.met}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Time candidates in turn, so that other load on the machine affects all of them equally.

    The order differs between rounds, so that no candidate always finds the same data in the CPU's caches.

    Args:
        candidates: functions to call, by name.
        rounds: how many times each is timed.
        warmup: untimed rounds before the others.
        before: called with the name of a candidate before each of its calls, untimed.

    Returns:
        Seconds per call in each round, by name. Values of the same round can be compared, see `ratios`.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    orders = random.Random(0)
    for n in range(warmup + rounds):
        for name in orders.sample(names, len(names)):
            before(name)
            began = time.perf_counter()
            candidates[name]()
            if n >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio of every round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartiles, or the extremes of fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# ---------------------------------------------------------------- where it was measured


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the time of the measurement."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "busy_cores": _busy_cores(),
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
        "prefect": version("prefect"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(reversed([part.strip() for part in line.split(":", 1)]) for line in lines if "model name" in line)
    return next(iter(facts), "unknown")


def _busy_cores() -> float:
    """Return how many cores other processes use, measured over two idle seconds; the load average would include us."""

    def ticks() -> int:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
        return user + nice + system

    before, began = ticks(), time.perf_counter()
    time.sleep(2.0)
    return round((ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - began), 2)


def commit() -> str:
    """Return the commit, with a plus if the code differs from it; 'unknown' where the folder is no git repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- what is written


def write(name: str, title: str, where: Mapping[str, Any], measures: Sequence[Measure]) -> None:
    """Write results/<name>.json, and rewrite the table of all results."""
    RESULTS.mkdir(exist_ok=True)
    result = {"name": name, "title": title, "machine": dict(where), "measures": [m.dump() for m in measures]}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table()


def write_table() -> None:
    """Write results/README.md from the JSON files beside it."""
    pages = [page(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    (RESULTS / "README.md").write_text("\n".join([_PREFACE, *pages]))


_PREFACE = """# Results

Generated by `python -m benchmarks` from the JSON files beside it; edit neither. Candidates take turns within one
run, and a ratio is taken within each round. Spread: the quartiles, or the extremes of fewer than four rounds.
"""


_BUSY_CORES = 0.2
"""Cores that other processes may use at the start; a result that lacks this number is judged by its load average."""
_UNTIMED = frozenset({"nats", "TFLOP", "blocks", "bits/byte", "tokens"})
"""Units of quantities that do not depend on how busy the machine is."""
_BUSY = ("", "**The machine was busy with other work: these numbers judge no goal. Run it again on a quiet one.**")


def page(result: Mapping[str, Any]) -> str:
    """Return one benchmark's results as Markdown."""
    where = result["machine"]
    busy = where.get("busy_cores", where["load"][0]) > _BUSY_CORES
    timed = any(m["unit"] not in _UNTIMED for m in result["measures"])
    lines = [
        f"## {result['name']}",
        "",
        result["title"],
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads unless said otherwise, "
        f"load {where['load'][0]} at the start; torch {where['torch']}, transformers {where['transformers']}, "
        f"prefect {where['prefect']}, Python {where['python']}; commit {where['commit']}, {where['date']}.",
        *(_BUSY if busy and timed else ()),
        "",
        *table(result["measures"]),
    ]
    return "\n".join([*lines, ""])


def table(measures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of measures, each as `Measure.dump` gives it."""
    lines = ["| case | what | median | spread | rounds | goal |", "|---|---|--:|--:|--:|---|"]
    for m in measures:
        low, high = m["quartiles"]
        spread = f"{number(low)} to {number(high)}"
        lines.append(
            f"| {m['case']} | {m['what']} | {number(m['median'])} {m['unit']} | {spread} | {len(m['values'])} "
            f"| {_goal(m)} |"
        )
    return lines


def number(value: float) -> str:
    """Return a number with its significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _goal(measure: Mapping[str, Any]) -> str:
    if measure["met"] is None:
        return ""
    bounds = {"at least": measure["at_least"], "at most": measure["at_most"]}
    goal = ", ".join(f"{side} {bound:g}" for side, bound in bounds.items() if bound is not None)
    return f"{goal}: {'met' if measure['met'] else '**missed**'}"
