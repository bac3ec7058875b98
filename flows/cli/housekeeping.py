"""The commands that keep house in an artifacts folder: parse and delegate. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Command = Callable[[str, str, str, Any], argparse.ArgumentParser]
"""Adds a command: name, summary, example, what runs it."""


def add_housekeeping(command: Command) -> None:
    """Add gc, du, why, push, pull, quarantine and doctor."""
    _add_gc(command)

    du = command("du", "say whose bytes the artifacts folder holds", "stackwise du --json", _du)
    _add_json(du)

    why = command("why", "say why an id differs from the nearest there is", _WHY_EXAMPLE, _why)
    why.add_argument("id", metavar="ID", help="an artifact, there or planned; a unique start of its name will do")
    why.add_argument("config", nargs="?", metavar="CONFIG", help="look the id up in the plan of this configuration")
    why.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of CONFIG")
    _add_json(why)

    what = "artifacts, with all they were made from, and runs; without any, everything"
    push = command("push", "copy artifacts and runs into another artifacts folder", _PUSH_EXAMPLE, _push)
    push.add_argument("uri", metavar="URI", help="the folder or bucket they go to; a folder is made if need be")
    push.add_argument("names", nargs="*", metavar="ID|RUN", help=what)
    pull = command("pull", "copy artifacts and runs from another artifacts folder", _PULL_EXAMPLE, _pull)
    pull.add_argument("uri", metavar="URI", help="the folder or bucket they come from")
    pull.add_argument("names", nargs="*", metavar="ID|RUN", help=what)

    quarantine = command("quarantine", "list what failed its validation, or put it back", _ASIDE_EXAMPLE, _quarantine)
    what_to_do = quarantine.add_mutually_exclusive_group()
    what_to_do.add_argument("--release", metavar="ID", help="put it back, if every byte is as sealed")
    what_to_do.add_argument("--drop", metavar="ID", help="delete it")
    what_to_do.add_argument("--json", action="store_true", help="print one JSON document and nothing else")

    doctor = command("doctor", "say what works on this machine", "stackwise doctor", _doctor)
    _add_json(doctor)


def _add_gc(command: Command) -> None:
    gc = command("gc", "remove what no run reaches, and leftovers of dead writers", "stackwise gc --dry-run", _gc)
    gc.add_argument("--dry-run", action="store_true", help="list what would go and its bytes; remove nothing")
    gc.add_argument(
        "--keep-last", type=int, metavar="N", help="only the N runs started last count; records of the others go too"
    )
    gc.add_argument(
        "--superseded", action="store_true", help="of each run only the newest attempt counts, not earlier ones"
    )
    pins = gc.add_mutually_exclusive_group()
    pins.add_argument("--pin", metavar="ID", help="keep it, and all it was made from, for good; remove nothing now")
    pins.add_argument("--unpin", metavar="ID", help="take that back; remove nothing now")
    _add_json(gc)


_WHY_EXAMPLE = "stackwise why stack-1-3f2a configs/quickstart.yaml --set training.batch_size=8"
_PUSH_EXAMPLE = "stackwise push /mnt/shared/artifacts quickstart"
_PULL_EXAMPLE = "stackwise pull /mnt/shared/artifacts stack-1-3f2a"
_ASIDE_EXAMPLE = "stackwise quarantine --release activations-1-3f2a"


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def _gc(options: argparse.Namespace) -> int:
    from flows.cli.gc import change_pins, collect_garbage

    if options.pin is not None or options.unpin is not None:
        change_pins(options.artifacts, options.pin, options.unpin)
        return 0
    collect_garbage(
        options.artifacts,
        keep_last=options.keep_last,
        superseded=options.superseded,
        dry_run=options.dry_run,
        as_json=options.json,
    )
    return 0


def _du(options: argparse.Namespace) -> int:
    from flows.cli.du import show_usage

    show_usage(options.artifacts, as_json=options.json)
    return 0


def _why(options: argparse.Namespace) -> int:
    from flows.cli.why import explain

    config = options.load_config(options) if options.config is not None else None
    explain(options.artifacts, options.id, config, as_json=options.json)
    return 0


def _push(options: argparse.Namespace) -> int:
    from flows.cli.move import copy

    copy(options.artifacts, options.uri, options.names)
    return 0


def _pull(options: argparse.Namespace) -> int:
    from flows.cli.move import copy

    copy(options.uri, options.artifacts, options.names)
    return 0


def _quarantine(options: argparse.Namespace) -> int:
    from flows.cli.quarantine import drop_from_quarantine, release_from_quarantine, show_quarantine

    if options.release is not None:
        release_from_quarantine(options.artifacts, options.release)
    elif options.drop is not None:
        drop_from_quarantine(options.artifacts, options.drop)
    else:
        show_quarantine(options.artifacts, as_json=options.json)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from flows.cli.doctor import examine

    return examine(options.artifacts, as_json=options.json)
