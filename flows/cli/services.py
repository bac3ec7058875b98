"""`stackwise server`, `worker` and `heartbeat`: the processes behind deployments. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse

from flows.services import AUTOMATION, register_heartbeat, serve, work


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `server`."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=4200, metavar="N", help="port to listen on (4200)")
    parser.set_defaults(run=_server)


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `worker`."""
    parser.add_argument("--limit", type=_at_least_one, default=1, metavar="N", help="runs at the same time (1)")
    parser.add_argument("--name", type=_name, default="", metavar="NAME", help="name of this worker on Prefect's pages")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer /health on port 8080")
    parser.set_defaults(run=_worker)


def add_heartbeat(parser: argparse.ArgumentParser) -> None:
    """`heartbeat` takes no arguments."""
    parser.set_defaults(run=_heartbeat)


def _server(options: argparse.Namespace) -> None:
    serve(options.host, options.port)


def _worker(options: argparse.Namespace) -> None:
    work(options.limit, options.name, healthcheck=options.with_healthcheck)


def _heartbeat(options: argparse.Namespace) -> None:
    created = register_heartbeat()
    print(f"automation {AUTOMATION!r} {'is registered' if created else 'was there already'}")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; a port from 1 to 65535 is expected")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number of runs, 1 or more, is expected")
    return int(text)


def _name(text: str) -> str:
    if set(text) & set("/%&<>"):  # Prefect rejects these in a name
        raise argparse.ArgumentTypeError(f"got {text!r}; a name without / % & < > is expected")
    return text
