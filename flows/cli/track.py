"""`stackwise track`: send the curves of a run to a tracker of experiments, after it was trained."""

from __future__ import annotations

import argparse
from typing import get_args

from flows.cli.arguments import add_common
from flows.run.say import say
from stackwise_core.config.schema import TrackerName, TrackingConfig
from storage.artifacts import artifacts_at


def add_track(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `track`."""
    add_common(parser, _run)
    parser.add_argument("name", metavar="RUN", help="name of a run; its sealed stages are sent")
    parser.add_argument("--to", required=True, choices=get_args(TrackerName), help="where to")
    default = TrackingConfig().project
    parser.add_argument("--project", default=default, metavar="NAME", help=f"project, or experiment ({default})")


def _run(options: argparse.Namespace) -> None:
    from flows.run.tracking import replay

    artifacts = artifacts_at(options.artifacts).existing()
    say(replay(artifacts, options.name, options.to, options.project))
