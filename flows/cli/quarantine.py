"""`stackwise quarantine`: stores that failed their validation. Needs no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console

from flows.run.numbers import size
from flows.run.terminal import plain_table
from storage.artifacts import artifacts_at
from storage.collect import without_gc
from storage.quarantine import drop, find_quarantined, quarantined, release


def show_quarantine(root: str, *, as_json: bool) -> None:
    """Print what is in quarantine, since when and why."""
    artifacts = artifacts_at(root).existing()
    found = quarantined(artifacts)
    if as_json:
        entries = [{**asdict(entry), "path": artifacts.location(entry.path)} for entry in found]
        print(json.dumps({"artifacts": artifacts.uri, "quarantine": entries}, indent=1))
        return
    table = plain_table("what", "since", "|size", "why")
    for entry in found:
        table.add_row(entry.path.name, entry.since, size(entry.n_bytes), entry.reason)
    Console().print(table if found else "nothing is in quarantine")


def release_from_quarantine(root: str, name: str) -> None:
    """Put an artifact back, if every byte is as sealed and nothing is in its place."""
    artifacts = artifacts_at(root).existing()
    with without_gc(artifacts, _tell_waiting):
        manifest = release(artifacts, find_quarantined(artifacts, name))
    print(f"{manifest.ref.name} is back in {artifacts.where(manifest.ref)}; the next run validates it again")


def drop_from_quarantine(root: str, name: str) -> None:
    """Delete an artifact in quarantine."""
    artifacts = artifacts_at(root).existing()
    with without_gc(artifacts, _tell_waiting):
        path = find_quarantined(artifacts, name)
        drop(artifacts, path)
    print(f"{path.name} is deleted")


def _tell_waiting(holder: str) -> None:
    print(f"waiting for {holder}", file=sys.stderr)
