"""`stackwise verify`: recompute every checksum, and recompute sampled cache rows from tokens."""

from __future__ import annotations

import argparse

from flows.cli.arguments import add_common
from flows.run.maintenance import verify
from flows.run.say import complain, say
from flows.run.terminal import say_hanging


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    add_common(parser, _run)
    parser.add_argument("what", nargs="?", metavar="URI|RUN", help="an artifact or a run; default: everything")


def _run(options: argparse.Namespace) -> int:
    found = verify(options.artifacts, options.what, on_artifact=say)
    complain(*found.problems, *found.notes)
    say_hanging("", found.verdict)
    return 3 if found.problems else 0
