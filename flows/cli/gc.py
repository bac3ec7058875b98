"""`stackwise gc`: remove what no run reaches, and what dead processes left. Needs no torch."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from flows.cli.inspect import find_artifact
from flows.run.numbers import size
from flows.run.terminal import plain_table
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import Collection, collect, in_use_by, plan_collection, without_gc
from storage.manifest import read_manifest
from storage.reachability import pin, pins, unpin


def collect_garbage(root: str, *, keep_last: int | None, superseded: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what no run reaches, or list it.

    Args:
        root: the artifacts folder.
        keep_last: only so many runs count, the records of the others go too.
        superseded: what only earlier attempts of a run planned goes too.
        dry_run: remove nothing.
        as_json: print one document.

    Raises:
        RunBusyError: a run or another gc is at work.
        ArtifactCorruptError: a record says no longer what must stay.
    """
    if keep_last is not None and keep_last < 0:
        raise ConfigError([Fault("--keep-last", str(keep_last), "a number of runs, 0 or more")])
    artifacts = artifacts_at(root).existing()
    work = plan_collection if dry_run else collect
    collection = work(artifacts, keep_last, newest_only=superseded)
    if dry_run and not artifacts.is_remote and (others := in_use_by(artifacts)):
        collection.notes.append(f"now it would be refused: {artifacts.uri} is in use by {others}")
    if as_json:
        print(json.dumps(_document(artifacts, collection, dry_run), indent=1))
        return
    _print(artifacts, collection, dry_run)


def change_pins(root: str, to_pin: str | None, to_unpin: str | None) -> None:
    """Pin an artifact or take a pin back, and say what is pinned."""
    artifacts = artifacts_at(root).existing()
    with without_gc(artifacts, lambda holder: print(f"waiting for {holder}", file=sys.stderr)):
        if to_pin is not None:
            folder = find_artifact(artifacts, to_pin)
            ref = read_manifest(folder).ref
            if artifacts.folder(ref) != folder:
                raise ConfigError([Fault("--pin", repr(to_pin), f"an artifact of {artifacts.uri} is expected")])
            pin(artifacts, ref)
        if to_unpin is not None:
            unpin(artifacts, to_unpin)
    pinned = ", ".join(ref.name for ref in pins(artifacts))
    print(f"pinned: {pinned}; they stay, and all they were made from" if pinned else "nothing is pinned")


def _document(artifacts: Artifacts, collection: Collection, dry_run: bool) -> dict[str, object]:
    items = [
        {"path": artifacts.location(removal.path), "bytes": removal.n_bytes, "why": removal.why}
        for removal in collection.removals
    ]
    return {
        "artifacts": artifacts.uri,
        "dry_run": dry_run,
        "bytes": collection.n_bytes,
        "items": items,
        "damaged": collection.damaged,
        "notes": collection.notes,
    }


def _print(artifacts: Artifacts, collection: Collection, dry_run: bool) -> None:
    table = plain_table("|size", "what", "why")
    for removal in collection.removals:
        table.add_row(size(removal.n_bytes), str(removal.path.relative_to(artifacts.root)), removal.why)
    if collection.removals:
        Console().print(table)
    for note in (*collection.damaged, *collection.notes):
        print(note, file=sys.stderr)
    verb = "would be freed; nothing was removed" if dry_run else "freed"
    print(f"{size(collection.n_bytes)} ({collection.n_bytes:,} bytes) {verb}")
