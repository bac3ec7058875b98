"""`stackwise`: parse and delegate. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib.metadata import version
from typing import Any

from flows.cli.housekeeping import add_housekeeping
from flows.cli.operating import add_operating
from stackwise_core.errors import ConfigError, Fault, StackWiseError


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 a stage failed; 2 the command or the configuration is wrong; 3 an artifact is missing,
        unsealed or corrupt.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except StackWiseError as error:
        print(f"stackwise: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stackwise: interrupted; run the same command to go on", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `stackwise status | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # a file or the disk, told by the system
        where = f"{error.filename}: " if error.filename else ""
        print(f"stackwise: {where}{error.strerror or error}; what was sealed is kept", file=sys.stderr)
        return 1
    except MemoryError:
        print("stackwise: not enough memory; lower the sizes of the model or training.batch_size", file=sys.stderr)
        return 1
    except Exception:  # a fault of ours: the traceback is for us, the last line for whoever sees it
        traceback.print_exc()
        print("stackwise: an unexpected error, please report it; what was sealed is kept", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="stackwise",
        description="Grow a deep transformer one stack at a time, on cached activations, resumable at every stage.",
        epilog="example: stackwise train configs/quickstart.yaml\n\n"
        "exit codes: 0 done, 1 a stage failed, 2 the command or the configuration is wrong,\n"
        "            3 an artifact is missing, unsealed or corrupt",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"stackwise {version('stackwise')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def plain(name: str, summary: str, example: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example: {example}", formatter_class=formatter
        )
        sub.set_defaults(run=run, load_config=_load_config)
        return sub

    def command(name: str, summary: str, example: str, run: Any) -> argparse.ArgumentParser:
        sub = plain(name, summary, example, run)
        sub.add_argument(
            "--artifacts",
            default="artifacts",
            metavar="ROOT",
            help="where artifacts live: a folder (artifacts/), or s3://BUCKET/PREFIX",
        )
        return sub

    train = command("train", "grow the rack of a configuration to its target", _TRAIN_EXAMPLE, _train)
    _add_config(train)
    train.add_argument("--from-stack", type=int, default=-1, metavar="K", help="redo the stages from K on (0-based)")
    train.add_argument("--force", default="", metavar="TASK", help="redo build, trunk, train, cache or validate")

    plan = command("plan", "show what would run, what it costs and what is there", _PLAN_EXAMPLE, _plan)
    _add_config(plan)
    _add_json(plan)

    status = command("status", "show the runs, or one run's stages and artifacts", _STATUS_EXAMPLE, _status)
    status.add_argument("name", nargs="?", metavar="RUN", help="name of a run; without it, all runs")
    _add_json(status)

    inspect = command("inspect", "show one artifact: layout, provenance, statistics", _INSPECT_EXAMPLE, _inspect)
    inspect.add_argument("uri", metavar="URI", help="folder or name of an artifact; a unique start of its name will do")
    _add_json(inspect)
    inspect.add_argument("--html", default="", metavar="FILE", help="write a page about a store or a stack")
    inspect.add_argument(
        "--against",
        default="",
        metavar="URI2",
        help="measure the drift of a store from URI2, not from the one below",
    )
    inspect.add_argument("--rows", type=int, metavar="N", help="read so many rows of a store for its statistics (64)")

    verify = command("verify", "recompute every checksum, derive sampled rows again", _VERIFY_EXAMPLE, _verify)
    verify.add_argument("what", nargs="?", metavar="URI|RUN", help="an artifact or a run; without it, everything")

    add_housekeeping(command)
    add_operating(plain)
    return parser


_TRAIN_EXAMPLE = "stackwise train configs/quickstart.yaml --set training.progressive.target_stacks=4"
_PLAN_EXAMPLE = "stackwise plan configs/quickstart.yaml --json"
_STATUS_EXAMPLE = "stackwise status quickstart"
_INSPECT_EXAMPLE = "stackwise inspect activations-1-3f2a --html store.html"
_VERIFY_EXAMPLE = "stackwise verify quickstart"


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, such as training.batch_size=8"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def _load_config(options: argparse.Namespace) -> Any:
    from stackwise_core.config import StackWiseConfig
    from stackwise_core.config.yaml import parse_value

    overrides: dict[str, Any] = {}
    for entry in options.set:
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise ConfigError([Fault("--set", repr(entry), "KEY=VALUE is expected, such as training.batch_size=8")])
        overrides[key] = parse_value(value)
    return StackWiseConfig.from_yaml(options.config, overrides)


def _train(options: argparse.Namespace) -> int:
    from flows.cli.train import train

    if options.from_stack < -1:
        raise ConfigError([Fault("--from-stack", str(options.from_stack), "stages are counted from 0")])
    command = ["stackwise", "train", options.config, *(word for entry in options.set for word in ("--set", entry))]
    train(_load_config(options), command, options.artifacts, options.from_stack, options.force)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from flows.cli.plan import show_plan

    show_plan(_load_config(options), options.artifacts, as_json=options.json)
    return 0


def _status(options: argparse.Namespace) -> int:
    from flows.cli.status import show_runs, show_stages

    if options.name is None:
        show_runs(options.artifacts, as_json=options.json)
    else:
        show_stages(options.artifacts, options.name, as_json=options.json)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from flows.cli.inspect import Look, show_artifact

    look = Look(as_json=options.json, html=options.html, against=options.against, rows=options.rows)
    return show_artifact(options.artifacts, options.uri, look)


def _verify(options: argparse.Namespace) -> int:
    from flows.cli.verify import verify

    return verify(options.artifacts, options.what)
