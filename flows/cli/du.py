"""`stackwise du`: how much disk space each run uses."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass

from rich.console import Console

from flows.cli.arguments import add_artifacts, add_json
from flows.run.numbers import size
from flows.run.terminal import plain_table
from storage.artifacts import Artifacts, artifacts_at
from storage.inventory import Inventory
from storage.reachability import find_reachable


def add_du(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `du`."""
    add_artifacts(parser)
    add_json(parser)
    parser.set_defaults(run=show_usage)


@dataclass(frozen=True)
class RunBytes:
    """Disk usage of a run, including its record [bytes]."""

    name: str
    total: int
    shared: int
    """Artifacts that other runs reach too."""
    unique: int


@dataclass(frozen=True)
class Usage:
    """Disk usage of an artifacts folder; the places add up to the total [bytes]."""

    total: int
    runs: list[RunBytes]
    places: dict[str, int]


def measure(artifacts: Artifacts) -> Usage:
    """Count every byte once by place, and for each run the bytes that it reaches.

    Raises:
        ArtifactCorruptError: a run's record cannot be read.
    """
    inventory, reach = Inventory(artifacts), find_reachable(artifacts)
    held = {found.path.name: found.n_bytes for found in inventory.artifacts()}
    readers = Counter(name for names in reach.runs.values() for name in names)
    runs: list[RunBytes] = []
    for run, names in reach.runs.items():
        shared = sum(held.get(name, 0) for name in names if readers[name] > 1)
        alone = sum(held.get(name, 0) for name in names if readers[name] == 1)
        record = inventory.n_bytes(f"runs/{run}")
        runs.append(RunBytes(run, shared + alone + record, shared, alone + record))
    places = {
        "reached by one run": sum(n_bytes for name, n_bytes in held.items() if readers[name] == 1),
        "reached by several runs": sum(n_bytes for name, n_bytes in held.items() if readers[name] > 1),
        "pinned only": sum(n for name, n in held.items() if not readers[name] and name in reach.pinned),
        "reached by no run": sum(n for name, n in held.items() if not readers[name] and name not in reach.pinned),
        "records of runs": inventory.n_bytes("runs"),
        **{room: inventory.n_bytes(room) for room in ("work", "trash", "quarantine")},
    }
    total = inventory.n_bytes()
    return Usage(total, runs, {**places, "other": total - sum(places.values())})


def show_usage(options: argparse.Namespace) -> None:
    """Print the disk usage by run and by place."""
    artifacts = artifacts_at(options.artifacts).existing()
    usage = measure(artifacts)
    if options.json:
        print(json.dumps({"artifacts": artifacts.uri, **asdict(usage)}, indent=1))
        return
    runs = plain_table("run", "|total", "|shared", "|unique")
    for run in usage.runs:
        runs.add_row(run.name, size(run.total), size(run.shared), size(run.unique))
    places = plain_table("where", "|size")
    for place, n_bytes in usage.places.items():
        places.add_row(place, size(n_bytes))
    places.add_row("total", size(usage.total))
    console = Console()
    if usage.runs:
        console.print(runs, "")
    console.print(places)
