"""`stackwise quarantine`: the stores that failed their validation."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from flows.cli.arguments import add_common, add_json, print_waiting
from flows.run.numbers import size
from flows.run.say import say, say_json
from flows.run.terminal import plain_console, plain_table
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.quarantine import drop, find_quarantined, quarantined, release


def add_quarantine(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quarantine`."""
    add_common(parser, _run)
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--release", metavar="ID", help="put it back if every byte is as sealed")
    actions.add_argument("--drop", metavar="ID", help="delete it")
    add_json(actions)


def _run(options: argparse.Namespace) -> None:
    artifacts = artifacts_at(options.artifacts).existing()
    if options.release is None and options.drop is None:
        _show(artifacts, as_json=options.json)
        return
    with without_gc(artifacts, print_waiting):
        if options.release is not None:
            ref = release(artifacts, find_quarantined(artifacts, options.release)).ref
            say(f"{ref.name} is back in {artifacts.where(ref)}; the next run validates it again")
        else:
            path = find_quarantined(artifacts, options.drop)
            drop(artifacts, path)
            say(f"{path.name} is deleted")


def _show(artifacts: Artifacts, *, as_json: bool) -> None:
    """Print what is in quarantine, since when and why."""
    found = quarantined(artifacts)
    if as_json:
        entries = [{**asdict(entry), "path": artifacts.location(entry.path)} for entry in found]
        say_json({"artifacts": artifacts.uri, "quarantine": entries})
        return
    table = plain_table("what", "since", "|size", "why")
    for entry in found:
        table.add_row(entry.path.name, entry.since, size(entry.n_bytes), entry.reason)
    plain_console().print(table if found else "nothing is in quarantine")
