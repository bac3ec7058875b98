"""`stackwise du`: how much disk space each run uses."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from flows.cli.arguments import add_common
from flows.run.numbers import size
from flows.run.say import complain, say_json
from flows.run.terminal import plain_console, plain_table
from storage.artifacts import Artifacts, artifacts_at
from storage.inventory import Inventory
from storage.reachability import find_reachable


def add_du(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `du`."""
    add_common(parser, show_usage, json=True)


def measure(artifacts: Artifacts) -> dict[str, Any]:
    """Return the disk usage in bytes: of each run with its record, and of each place, where every byte counts once.

    `shared` are the artifacts of a run that other runs reach too, `unique` are the others.

    A run whose record is damaged is left out, with a line on stderr.
    """
    inventory, reachable = Inventory(artifacts), find_reachable(artifacts, on_damage=complain)
    sizes = {found.path.name: found.n_bytes for found in inventory.artifacts()}
    readers = Counter(name for names in reachable.runs.values() for name in names)
    runs: list[dict[str, Any]] = []
    for run, names in reachable.runs.items():
        shared = sum(sizes.get(name, 0) for name in names if readers[name] > 1)
        unique = sum(sizes.get(name, 0) for name in names if readers[name] == 1) + inventory.n_bytes(f"runs/{run}")
        runs.append({"name": run, "total": shared + unique, "shared": shared, "unique": unique})
    places: dict[str, int] = dict.fromkeys(
        ("reached by one run", "reached by several runs", "pinned only", "reached by no run"), 0
    )
    for name, n_bytes in sizes.items():
        if readers[name]:
            places["reached by one run" if readers[name] == 1 else "reached by several runs"] += n_bytes
        else:
            places["pinned only" if name in reachable.pinned else "reached by no run"] += n_bytes
    places["records of runs"] = inventory.n_bytes("runs")
    places |= {folder: inventory.n_bytes(folder) for folder in ("work", "trash", "quarantine")}
    total = inventory.n_bytes()
    places["other"] = total - sum(places.values())
    return {"artifacts": artifacts.uri, "total": total, "runs": runs, "places": places}


def show_usage(options: argparse.Namespace) -> None:
    """Print the disk usage by run and by place."""
    usage = measure(artifacts_at(options.artifacts).existing())
    if options.json:
        say_json(usage)
        return
    runs = plain_table("run", "|total", "|shared", "|unique")
    for run in usage["runs"]:
        runs.add_row(run["name"], *(size(run[column]) for column in ("total", "shared", "unique")))
    places = plain_table("where", "|size")
    for place, n_bytes in {**usage["places"], "total": usage["total"]}.items():
        places.add_row(place, size(n_bytes))
    console = plain_console()
    if usage["runs"]:
        console.print(runs, "")
    console.print(places)
