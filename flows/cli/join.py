"""`stackwise join`: train as a further node of the runs in a folder."""

from __future__ import annotations

import argparse

from flows.cli.arguments import add_common
from flows.run.events import stopping_on_signals
from flows.run.say import say
from storage.artifacts import artifacts_at


def add_join(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `join`."""
    add_common(parser, _run)


def _run(options: argparse.Namespace) -> None:
    from flows.run.ranks import join  # imports torch

    artifacts = artifacts_at(options.artifacts).reachable()
    say(f"waits for stages of several nodes in {artifacts.uri}; Ctrl-C or SIGTERM ends it")
    with stopping_on_signals():
        join(artifacts)
