"""`stackwise server`, `worker`, `heartbeat`, `notify`: behind deployments. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from flows.run.say import say
from flows.server import is_url
from flows.services import (
    AUTOMATION,
    NOTIFICATION,
    register_heartbeat,
    register_notification,
    remove_notification,
    serve,
    work,
)
from stackwise_core.errors import ConfigError, Fault


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `server`."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1)")
    parser.add_argument(
        "--port",
        type=_number("a port from 1 to 65535", 65535),
        default=4200,
        metavar="N",
        help="port to listen on (4200)",
    )
    parser.set_defaults(run=_server)


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `worker`."""
    parser.add_argument(
        "--limit",
        type=_number("a number of runs, 1 or more,"),
        default=1,
        metavar="N",
        help="runs at the same time (1)",
    )
    parser.add_argument("--name", type=_name, default="", metavar="NAME", help="name of this worker on Prefect's pages")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer /health on port 8080")
    help_text = "also register train-rack/docker, for the worker of docker/compose.yaml"
    parser.add_argument("--in-containers", action="store_true", help=help_text)
    parser.set_defaults(run=_worker)


def add_heartbeat(parser: argparse.ArgumentParser) -> None:
    """`heartbeat` takes no arguments."""
    parser.set_defaults(run=_heartbeat)


def add_notify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `notify`."""
    help_text = "where the server posts a line, such as https://hooks.slack.com/services/..."
    parser.add_argument("address", nargs="?", default="", metavar="URL", help=help_text)
    parser.add_argument("--done", action="store_true", help="also when a run has completed")
    parser.add_argument("--off", action="store_true", help="tell nobody any more")
    parser.set_defaults(run=_notify)


def _notify(options: argparse.Namespace) -> None:
    """Register or remove the automation that tells when a run has ended.

    Raises:
        ConfigError: there is no address of http or https, or one where none is wanted.
    """
    if options.off:
        if options.address or options.done:
            raise ConfigError([Fault("--off", options.address or "--done", "it takes nothing; leave the other out")])
        say(f"automation {NOTIFICATION!r} {'is removed' if remove_notification() else 'was not there'}")
        return
    if not is_url(options.address):
        allowed = "the address to post to is expected, such as https://hooks.slack.com/services/..."
        raise ConfigError([Fault("URL", repr(options.address), allowed)])
    changed = register_notification(options.address, done=options.done)
    how = "is registered" if changed else "was there already"
    say(f"automation {NOTIFICATION!r} {how}, and posts to this address")


def _server(options: argparse.Namespace) -> None:
    serve(options.host, options.port)


def _worker(options: argparse.Namespace) -> None:
    work(options.limit, options.name, healthcheck=options.with_healthcheck, in_containers=options.in_containers)


def _heartbeat(options: argparse.Namespace) -> None:
    changed = register_heartbeat()
    say(f"automation {AUTOMATION!r} {'is registered' if changed else 'was there already'}")


def _number(what: str, largest: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"got {text!r}; {what} is expected")
        return int(text)

    return parse


def _name(text: str) -> str:
    if set(text) & set("/%&<>"):  # Prefect rejects these in a name
        raise argparse.ArgumentTypeError(f"got {text!r}; a name without / % & < > is expected")
    return text
