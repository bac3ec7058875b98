"""The commands that run Prefect's server and workers: parse and delegate. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse

from flows.cli.housekeeping import Command


def add_operating(command: Command) -> None:
    """Add server, worker and heartbeat."""
    server = command("server", "run Prefect's server, with its pages", "stackwise server --port 4200", _server)
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1)")
    server.add_argument("--port", type=_port, default=4200, metavar="N", help="port to listen on (4200)")

    worker = command("worker", "register the deployments and run what is started from them", _WORKER_EXAMPLE, _worker)
    worker.add_argument("--limit", type=_at_least_one, default=1, metavar="N", help="runs at once (1)")
    worker.add_argument("--name", type=_name, default="", metavar="NAME", help="name of this worker on Prefect's pages")
    worker.add_argument("--with-healthcheck", action="store_true", help="answer /health on port 8080")

    command("heartbeat", "let Prefect mark runs of dead machines as crashed", "stackwise heartbeat", _heartbeat)


_WORKER_EXAMPLE = "stackwise worker, then: prefect deployment run train-rack/quickstart"


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; a port from 1 to 65535 is expected")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number of runs, 1 or more, is expected")
    return int(text)


def _name(text: str) -> str:
    if set(text) & set("/%&<>"):  # which Prefect refuses in a name
        raise argparse.ArgumentTypeError(f"got {text!r}; a name without / % & < > is expected")
    return text


def _server(options: argparse.Namespace) -> int:
    from flows.operate import serve

    serve(options.host, options.port)
    return 0


def _worker(options: argparse.Namespace) -> int:
    from flows.operate import work

    work(options.limit, options.name, healthcheck=options.with_healthcheck)
    return 0


def _heartbeat(options: argparse.Namespace) -> int:
    from flows.operate import register_heartbeat

    register_heartbeat()
    return 0
