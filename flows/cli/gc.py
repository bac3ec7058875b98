"""`stackwise gc`: remove artifacts that no run reaches, and leftovers of killed processes."""

from __future__ import annotations

import argparse

from flows.cli.arguments import add_common, print_waiting
from flows.run.maintenance import bytes_freed, collect_garbage, find_artifact, removal_lines
from flows.run.say import complain, say, say_json
from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import without_gc
from storage.manifest import read_manifest
from storage.reachability import pin, pins, unpin


def add_gc(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gc`."""
    add_common(parser, _run, json=True)
    help_text = "list what would be removed and its bytes; remove nothing"
    parser.add_argument("--dry-run", action="store_true", help=help_text)
    help_text = "only the N newest runs count; the records of the others go too; with 0 all goes but pins"
    parser.add_argument("--keep-last", type=int, metavar="N", help=help_text)
    help_text = "of each run, only the newest attempt counts"
    parser.add_argument("--superseded", action="store_true", help=help_text)
    pinning = parser.add_mutually_exclusive_group()
    help_text = "keep an artifact and everything it was made from, until it is unpinned; remove nothing now"
    pinning.add_argument("--pin", metavar="ID", help=help_text)
    pinning.add_argument("--unpin", metavar="ID", help="no longer keep a pinned artifact; remove nothing now")


def _run(options: argparse.Namespace) -> None:
    artifacts = artifacts_at(options.artifacts).existing()
    if options.pin is not None or options.unpin is not None:
        _change_pins(artifacts, options.pin, options.unpin)
        return
    dry_run: bool = options.dry_run
    collection = collect_garbage(artifacts, options.keep_last, superseded=options.superseded, dry_run=dry_run)
    if options.json:
        items = [
            {"path": artifacts.location(removal.path), "bytes": removal.n_bytes, "why": removal.why}
            for removal in collection.removals
        ]
        found = {"bytes": collection.n_bytes, "items": items, "damaged": collection.damaged, "notes": collection.notes}
        say_json({"artifacts": artifacts.uri, "dry_run": dry_run, **found})
        return
    say(*removal_lines(artifacts, collection))
    complain(*collection.damaged, *collection.notes)
    say(bytes_freed(collection, dry_run=dry_run))


def _change_pins(artifacts: Artifacts, to_pin: str | None, to_unpin: str | None) -> None:
    """Pin or unpin an artifact, then print what is pinned."""
    with without_gc(artifacts, print_waiting):
        if to_pin is not None:
            folder = find_artifact(artifacts, to_pin)
            ref = read_manifest(folder).ref
            if artifacts.folder(ref) != folder:
                raise ConfigError([Fault("--pin", repr(to_pin), f"an artifact of {artifacts.uri} is expected")])
            pin(artifacts, ref)
        if to_unpin is not None:
            unpin(artifacts, to_unpin)
    pinned = ", ".join(ref.name for ref in pins(artifacts))
    say(f"pinned: {pinned}; they stay, and all they were made from" if pinned else "nothing is pinned")
